"""Curation tasks: `python -m ml.curate {probe,shots,clips,scores,filter,captions} --recipe ... --out ...`.

From a shard of footage to captioned clips, each op one table. probe, shots, clips and scores run once a shard; filter
and captions see all shards at once.
"""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import cv2
import pandas as pd

from infra.storage import atomic_write
from infra.workspace import Workspace
from ml import entry, manifest
from ml.curation import captions, clips, filters, pictures, probe, scores, shots
from ml.curation.footage import Footage
from ml.curation.parallel import num_workers, spread
from ml.curation.scorers import registry


def main(argv: Sequence[str] | None = None) -> None:
    """Run one op and write its result."""
    call = entry.parse(argv, tuple(OPS), __doc__ or "")
    cv2.setNumThreads(1)  # clips already run side by side, one a core
    OPS[call.op](call, Workspace(call.workspace))


def run_probe(call: entry.Call, workspace: Workspace) -> None:
    """Options corpus, shard -> videos.parquet."""
    corpus, shard = call.option("corpus"), call.option("shard")
    rows = probe.read_list(workspace, corpus, shard)
    probed = spread(partial(probe.probe_row, workspace=workspace), rows, "probe", call.log.heartbeat)
    videos = probe.tabulate(probed, corpus, shard)
    manifest.VIDEOS.write(videos, call.out)
    sound = videos[videos.status == "ok"]
    numbers = {"videos_ok": len(sound), "videos_rejected": len(videos) - len(sound)}
    hours = float(sound.duration_seconds.sum()) / 3600
    call.finish({**numbers, "hours": hours}, facts={"rejected": _reasons(videos, "path")})


def run_shots(call: entry.Call, workspace: Workspace) -> None:
    """Input videos -> shots.parquet."""
    videos = manifest.VIDEOS.read(call.input("videos"))
    rows = _records(videos[videos.status == "ok"])
    threads = max(1, num_workers() // max(1, len(rows)))

    def detect(video: dict[str, Any]) -> pd.DataFrame:
        return shots.shots_of(workspace.resolve(video["path"]), video, call.recipe.curation.shots, threads)

    found = spread(detect, rows, "shots", call.log.heartbeat, weigh=lambda video: float(video["num_frames"]))
    table = pd.concat(found, ignore_index=True) if found else manifest.SHOTS.empty()
    manifest.SHOTS.write(table, call.out)
    seconds = (table.end_seconds - table.start_seconds).median() if len(table) else 0.0
    call.finish({"shots": len(table), "median_shot_seconds": float(seconds)})


def run_clips(call: entry.Call, workspace: Workspace) -> None:
    """Inputs videos, shots -> clips.parquet, clips/*.mp4, contact.png; resumes what an earlier attempt left."""
    videos, found = manifest.VIDEOS.read(call.input("videos")), manifest.SHOTS.read(call.input("shots"))
    settings = call.recipe.curation.clips
    groups = clips.plan_groups(videos, found, settings, workspace, call.out)
    cut = partial(clips.cut, settings=settings, licences=call.recipe.corpus.licences, workspace=workspace)
    parts = spread(cut, groups, "clips", call.log.heartbeat, weigh=lambda group: group.seconds)
    table = clips.tabulate([row for part in parts for row in part])
    manifest.CLIPS.write(table, call.out)
    good = table[table.status == "ok"]
    pictures.contact_sheet(good, workspace, call.out / "contact.png")
    numbers = {
        "clips_cut": len(good),
        "clips_rejected": len(table) - len(good),
        "seconds_cut": good.duration_seconds.sum(),
    }
    call.finish(numbers, facts={"rejected": _reasons(table, "clip_id")}, pictures=["contact.png"])


def run_scores(call: entry.Call, workspace: Workspace) -> None:
    """Input clips -> scores.parquet, scores.png."""
    curation = call.recipe.curation
    table = manifest.CLIPS.read(call.input("clips"))
    chosen = registry.build(curation.scores)
    score = partial(scores.score_clip, scorers=chosen, workspace=workspace)
    rows = spread(score, _records(table[table.status == "ok"]), "scores", call.log.heartbeat)
    scored = scores.tabulate(rows, chosen)
    manifest.SCORES.write(scored, call.out)
    beside = table.merge(scored, on="clip_id", how="left")
    pictures.score_plot(beside, curation.scores, curation.keep.thresholds, call.out / "scores.png")
    medians = {f"{name}_median": float(scored[name].median()) for name in curation.scores if len(scored)}
    facts = {"units": {scorer.name: scorer.unit for scorer in chosen}}
    call.finish({"clips_scored": len(scored), **medians}, facts=facts, pictures=["scores.png"])


def run_filter(call: entry.Call, workspace: Workspace) -> None:
    """Inputs clips (one folder a shard), scores (likewise) -> curated.parquet, funnel.json and its pictures."""
    curation = call.recipe.curation
    table, repeated = filters.gather(call.inputs["clips"], call.inputs["scores"])
    pictures.score_plot(table, curation.scores, curation.keep.thresholds, call.out / "scores.png")
    curated, funnel = filters.curate(table, curation.keep, call.recipe.corpus.licences)
    manifest.CURATED.write(curated, call.out)
    kept = curated[curated.keep]
    pictures.funnel_plot(funnel, call.out / "funnel.png")
    pictures.contact_sheet(kept, workspace, call.out / "contact.png")
    facts = {
        "funnel": [{**vars(step), "after": step.after} for step in funnel],
        "quantiles": filters.quantiles(table, curation.scores),
        "repeated_across_shards": repeated,
    }
    atomic_write(call.out / "funnel.json", json.dumps(facts, indent=2))
    numbers = {"clips_in": len(curated), "clips_kept": len(kept), "seconds_kept": float(kept.duration_seconds.sum())}
    dropped = {f"dropped_{step.name}": step.dropped for step in funnel}
    call.finish(numbers | dropped, facts, ["funnel.png", "scores.png", "contact.png"], data=["curated.parquet"])


def run_captions(call: entry.Call, workspace: Workspace) -> None:
    """Input curated -> captions.parquet; captions that hygiene refused are listed in the facts."""
    limits = call.recipe.curation.captions
    table = manifest.CURATED.read(call.input("curated"))
    rows, captioner = _records(table[table.keep]), captions.build(limits.captioner)

    def write(clip: dict[str, Any]) -> captions.Cleaned:
        footage = Footage.read(workspace.resolve(clip["path"]), int(clip["num_frames"]), float(clip["fps"]))
        return captions.clean(captioner.caption(clip, footage), limits)

    texts = spread(write, rows, "captions", call.log.heartbeat)
    frame = captions.tabulate([row["clip_id"] for row in rows], texts, captioner)
    manifest.CAPTIONS.write(frame, call.out)
    words = [len(text.split()) for text in frame.caption]
    numbers = {
        "captions": len(frame),
        "captions_rejected": len(rows) - len(frame),
        "captions_unique": frame.caption.nunique(),
    }
    refused = {row["clip_id"]: text.reason for row, text in zip(rows, texts, strict=True) if text.reason}
    facts = {"hygiene": captions.hygiene_counts(texts), "rejected": refused, "examples": frame.caption.head(5).tolist()}
    call.finish({**numbers, "words_mean": sum(words) / max(1, len(words))}, facts=facts)


OPS = {
    "probe": run_probe,
    "shots": run_shots,
    "clips": run_clips,
    "scores": run_scores,
    "filter": run_filter,
    "captions": run_captions,
}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _reasons(table: pd.DataFrame, key: str, limit: int = 50) -> dict[str, str]:
    """Why rows were rejected, the first fifty of them; the table holds all."""
    rejected = table[table.status == "rejected"].head(limit)
    return dict(zip(rejected[key], rejected.reason, strict=True))


if __name__ == "__main__":
    main()
