"""The dataset version: the manifest that training reads, frozen with a DVC revision, with its data card."""

import json
from functools import partial

from assets.steps import Function, Step
from infra.settings import Settings
from infra.versioning import DataRepo
from infra.workspace import Workspace
from ml.curation.examples import build_examples, data_card, in_tier
from ml.entry import Call
from ml.manifest import CAPTIONS, CURATED, EXAMPLES
from ml.recipe import Recipe


def dataset_steps(recipe: Recipe, settings: Settings) -> list[Step]:
    """`dataset_version`, on the curated and captioned clips."""
    return [
        Step(
            key=(recipe.name, "dataset_version"),
            group="dataset",
            description="Frozen manifest with splits and tiers, its DVC revision on the remote, and the data card.",
            work=Function(partial(freeze_dataset, remote=settings.dvc_remote)),
            purpose="storage",
            recipe=recipe,
            reads=("dataset", "seed"),
            inputs={"curated": ((recipe.name, "curated"),), "captions": ((recipe.name, "captions"),)},
            kinds=frozenset({"dvc", "pandas"}),
            owner="team:data",
            table="examples",
        )
    ]


def freeze_dataset(call: Call, remote: str) -> None:
    """Write `examples.parquet` and `card.md`, freeze both with the clip files they name, and push."""
    curated, captions = CURATED.read(call.input("curated")), CAPTIONS.read(call.input("captions"))
    examples = build_examples(call.recipe, curated, captions)
    EXAMPLES.write(examples, call.out)
    (call.out / "card.md").write_text(data_card(call.recipe, examples, curated), encoding="utf-8")
    (call.out / "revision.json").unlink(missing_ok=True)  # left by a killed attempt, and no part of the version
    repo = DataRepo(Workspace(call.workspace).data_repo, remote)
    clips = [(call.workspace / path, path) for path in examples["path"]]
    revision = repo.freeze(call.out, call.recipe.id, f"{call.recipe.title}: {len(examples)} examples", clips)
    facts = {
        "dvc_revision": revision.name,
        "git_commit": revision.commit,
        "dvc_md5": revision.md5,
        "dvc_remote": remote,
    }
    (call.out / "revision.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    holdout = int((examples["split"] == "holdout").sum())
    metrics = {"examples": len(examples), "examples_train": len(examples) - holdout, "examples_holdout": holdout}
    tiers = {f"tier_{t.name}": int(in_tier(examples, t.name).sum()) for t in call.recipe.dataset.tiers}
    call.finish(metrics | tiers, facts=facts, data=["examples.parquet"])
