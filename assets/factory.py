"""A step as a Dagster asset: its story for the UI, and a body that runs it and shows what came out."""

import base64
import importlib.util
import io
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from assets.steps import Entry, Step
from assets.tasks import Done, Runner
from ml.recipe import Recipe

SHARDS = dg.DynamicPartitionsDefinition(name="shards")
SHARDED = ("shots", "clips", "scores")
FRESH = "opensora/fresh"
MAX_PICTURE_BYTES = 150_000


def shard_assets(recipe: Recipe, partition: str) -> list[dg.AssetKey]:
    """What curating one shard makes: its own corpus and the recipe's partitioned steps, no other corpus."""
    return [dg.AssetKey(["corpus", partition.partition(".")[0]]), *(dg.AssetKey([recipe.name, n]) for n in SHARDED)]


def to_asset(step: Step) -> dg.AssetsDefinition:
    """The Dagster asset of a step, with everything its page shows before it was ever made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # code references are beta in Dagster 1.13
        return _asset(step)


def _asset(step: Step) -> dg.AssetsDefinition:

    @dg.asset(
        key=dg.AssetKey(list(step.key)),
        deps=[dg.AssetKey(list(key)) for key in step.upstream],
        group_name=_group(step),
        description=step.description,
        kinds=set(step.kinds),
        owners=[step.owner],
        code_version=step.code_version,
        tags=_tags(step),
        metadata=_facts(step),
        partitions_def=SHARDS if step.partitioned else None,
        pool=_pool(step),
    )
    def made(context: dg.AssetExecutionContext, runner: dg.ResourceParam[Runner]) -> dg.MaterializeResult[None]:
        partition = context.partition_key if context.has_partition_key else ""
        tags = {"dagster.run_id": context.run.run_id, "dagster.asset_key": "/".join(step.key)}
        fresh = context.run.tags[FRESH] if FRESH in context.run.tags and step.group == "judgement" else ""
        done = runner.run(step, partition, tags, fresh)
        return dg.MaterializeResult(
            metadata=metadata(done, runner), data_version=dg.DataVersion(done.made.data_version)
        )

    return made


def metadata(done: Done, runner: Runner) -> dict[str, Any]:
    """What the asset page shows: plain numbers (they plot themselves), facts, pictures, and where the run is."""
    result, folder = done.made.result, done.made.folder
    shown: dict[str, Any] = {key: float(value) for key, value in result["metrics"].items()}
    shown |= {key: value for key, value in result["facts"].items() if isinstance(value, str | int | bool)}
    shown |= {key: dg.MetadataValue.json(v) for key, v in result["facts"].items() if isinstance(v, dict | list)}
    shown |= {"reused": done.reused, "folder": dg.MetadataValue.path(str(folder))}
    if not done.reused:  # a point at 0 would pull down the plot of what making it costs
        shown["cost_usd"] = done.cost_usd
    for name in result["pictures"]:
        shown[Path(name).stem] = picture(folder / name)
    if done.made.run_id:
        shown["mlflow_run"] = dg.MetadataValue.url(runner.tracker.url(done.made.run_id))
    return shown


def picture(path: Path) -> dg.MetadataValue[Any]:
    """A picture inside the page, made smaller when its file would swell the event log."""
    content, kind = path.read_bytes(), "png"
    if len(content) > MAX_PICTURE_BYTES:
        content, kind = _smaller(path), "jpeg"
    encoded = base64.b64encode(content).decode()
    return dg.MetadataValue.md(f"![{path.stem}](data:image/{kind};base64,{encoded})")


def _smaller(path: Path) -> bytes:
    """The picture as JPEG, at most 1,100 pixels wide."""
    from PIL import Image

    stream = io.BytesIO()
    with Image.open(path) as full:
        shown = full.convert("RGB")
        shown.thumbnail((1100, 4400))
        shown.save(stream, "JPEG", quality=82)
    return stream.getvalue()


def _group(step: Step) -> str:
    """Part of the walk, one chain of them a recipe (`v2_0_training`): recipes stand side by side in the graph."""
    return step.group if step.recipe is None else f"{step.recipe.name}_{step.group}"


def _tags(step: Step) -> dict[str, str]:
    recipe = {"recipe": step.recipe.name, "profile": step.recipe.profile} if step.recipe else {}
    return {**recipe, "purpose": step.purpose, "part": step.group}


def _facts(step: Step) -> dict[str, Any]:
    """Definition metadata: the recipe sections that decide the content, the hardware, the command."""
    shown: dict[str, Any] = {"recipe_sections": ", ".join(step.reads) or "none"}
    if isinstance(step.work, Entry):
        compute = step.work.compute
        shown["command"] = f"python -m {step.work.module} {step.work.op}"
        shown["hardware"] = f"{compute.nodes} x {compute.accelerators}, price {compute.price}"
    return shown | {"dagster/code_references": _source(step)}


def _source(step: Step) -> dg.CodeReferencesMetadataValue:
    """Where the work of a step is written: the entry module of a task, or the function."""
    if isinstance(step.work, Entry):
        found = importlib.util.find_spec(step.work.module)
        path, line = (str(found.origin) if found else "", 1)
    else:
        call = step.work.call
        code = (call.func if isinstance(call, partial) else call).__code__
        path, line = code.co_filename, code.co_firstlineno
    reference = dg.LocalFileCodeReference(file_path=path, line_number=line, label=step.name)
    return dg.CodeReferencesMetadataValue(code_references=[reference])


def _pool(step: Step) -> str | None:
    """Tasks that fill the machine wait for one another; small steps do not."""
    return "machine" if isinstance(step.work, Entry) else None
