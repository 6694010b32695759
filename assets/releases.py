"""Releases: the gate reads the report, and the registry remembers the decision."""

import json
from functools import partial

from assets.checkpoints import checkpoint_key
from assets.steps import Function, Step
from evaluation.gates import judge
from evaluation.report import Report
from infra.registry import Registry
from infra.settings import Settings
from infra.storage import sha256_of
from ml.entry import Call
from ml.recipe import Recipe


def release_steps(recipe: Recipe, settings: Settings) -> list[Step]:
    """`release`: a registered version, `candidate` always, `champion` only through the gate."""
    return [
        Step(
            key=(recipe.name, "release"),
            group="release",
            description="The last checkpoint as a registered model version; the gate decides who is champion.",
            work=Function(partial(release, tracking_uri=settings.tracking_uri)),
            purpose="eval",
            recipe=recipe,
            reads=("evaluation.gate",),
            inputs={
                "report": ((recipe.name, "report"),),
                "checkpoint": (checkpoint_key(recipe, recipe.stages[-1]),),
                "dataset": ((recipe.name, "dataset_version"),),
            },
            kinds=frozenset({"mlflow"}),
            owner="team:evaluation",
        )
    ]


def release(call: Call, tracking_uri: str) -> None:
    """Judge the report, register the weights with their provenance, set the aliases, write `release.json`."""
    report = Report.from_json((call.input("report") / "report.json").read_text(encoding="utf-8"))
    decision = judge(report, call.recipe.evaluation.gate)
    weights = call.input("checkpoint") / "weights.safetensors"
    dataset = json.loads((call.input("dataset") / "revision.json").read_text(encoding="utf-8"))
    facts = {
        "report": report.id,
        "dataset": dataset["dvc_revision"],
        "gate": "passed" if decision.passed else "failed",
        "recipe": call.recipe.id,
        "weights_sha256": sha256_of(weights),
        "weights_path": weights.relative_to(call.workspace).as_posix(),
    }
    registry = Registry(tracking_uri)
    name = f"opensora-{call.recipe.name}-{call.recipe.profile}"
    version = registry.register(name, call.log.run_id, weights, facts, dict(report.metrics))
    registry.alias(name, version, "candidate")
    if decision.passed:
        registry.alias(name, version, "champion")
    record = {**facts, "model": name, "version": version, "rules": list(decision.lines)}
    (call.out / "release.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    call.finish({"gate_passed": float(decision.passed)}, facts=record, data=["release.json"])
