"""Releases: the gate reads the report, and the registry remembers the decision."""

import json
from functools import partial

from assets.checkpoints import last_checkpoint_key
from assets.steps import Function, Step
from evaluation.gates import judge
from evaluation.report import Report
from infra.registry import Checkpoint, Registry
from infra.runs import Status
from infra.settings import Settings
from infra.storage import sha256_of
from infra.tracking import Tracker
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
                "checkpoint": (last_checkpoint_key(recipe),),
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
    registry, name = Registry(tracking_uri), f"opensora-{call.recipe.id}"
    trained_by = training_run(Tracker(tracking_uri), call.recipe, weights.parent.name)
    checkpoint = Checkpoint(name, trained_by, weights.absolute().as_uri(), facts["weights_sha256"], tags=facts)
    version = registry.register(checkpoint)
    registry.tag(name, version.version, facts)  # the same weights may be judged again
    registry.score(version, str(call.log.run_id), report.metrics)
    for alias in ("candidate", "champion") if decision.passed else ("candidate",):
        registry.set_alias(name, alias, version.version)
    record = {**facts, "model": name, "version": version.version, "rules": list(decision.lines)}
    (call.out / "release.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    call.finish({"gate_passed": float(decision.passed)}, facts=record, data=["release.json"])


def training_run(tracker: Tracker, recipe: Recipe, step_key: str) -> str:
    """The run that finished the checkpoint of this step key; raises LookupError when the store has forgotten it."""
    runs = tracker.runs(f"opensora/{recipe.id}", f"tags.step_key = '{step_key}'")
    for run in runs:
        if run.status == Status.FINISHED:
            return run.run_id
    raise LookupError(f"no finished run with step key {step_key} in MLflow: train the stage again to have one")
