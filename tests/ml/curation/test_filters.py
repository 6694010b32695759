import numpy as np
import pandas as pd
import pytest

from ml.curation import filters
from ml.manifest import CLIPS, SCORES
from ml.sections import Keep, Range

LICENCES = ("CC0-1.0",)


def clips(count: int, **columns: object) -> pd.DataFrame:
    """`count` clips that were cut, with distinct bytes; columns override."""
    numbers = np.arange(count)
    frame = pd.DataFrame(
        {column.name: [{"str": "x", "int": 1, "float": 1.0}[column.kind]] * count for column in CLIPS.columns}
    )
    frame["clip_id"] = [f"{n:016x}" for n in numbers]
    frame["sha256"] = [f"sha{n}" for n in numbers]
    return frame.assign(**({"status": "ok", "reason": "", "licence": "CC0-1.0"} | columns))


def table(motion: list[float], hashes: list[str] | None = None, **columns: object) -> pd.DataFrame:
    """Clips with scores: motion as given, sharpness rising, hashes far apart unless given."""
    rng = np.random.default_rng(0)
    far = [f"{v:016x}" for v in rng.integers(0, 2**63, len(motion), dtype=np.uint64).tolist()]
    scored = clips(len(motion), **columns).assign(motion=motion, hash=hashes or far)
    return scored.assign(sharpness=np.arange(len(motion), dtype=float))


def test_a_dropped_clip_keeps_its_row_and_the_first_reason():
    keep = Keep(thresholds={"motion": Range(min=1, max=5), "sharpness": Range(min=3)}, dedup_bits=0)
    curated, funnel = filters.curate(table([0.5, 9.0, 2.0, 2.0, 2.0]), keep, LICENCES)
    assert curated.keep.tolist() == [False, False, False, True, True]
    assert curated.reason.tolist()[:3] == ["motion 0.5 is below 1", "motion 9 is above 5", "sharpness 2 is below 3"]
    assert [(step.name, step.before, step.dropped) for step in funnel] == [
        ("cutting", 5, 0),
        ("licence", 5, 0),
        ("motion", 5, 2),
        ("sharpness", 3, 1),
        ("duplicate", 2, 0),
    ]


def test_bounds_belong_to_the_range():
    keep = Keep(thresholds={"motion": Range(min=1, max=5)}, dedup_bits=0)
    assert filters.curate(table([1.0, 5.0]), keep, LICENCES)[0].keep.all()


def test_a_clip_that_was_not_cut_keeps_that_reason():
    rows = table([2.0, 2.0], status=["ok", "rejected"], reason=["", "0.5 s is shorter than 1 s"])
    rows.loc[1, ["motion", "sharpness", "hash"]] = None
    curated, funnel = filters.curate(rows, Keep(thresholds={}, dedup_bits=0), LICENCES)
    assert curated.reason.tolist() == ["", "0.5 s is shorter than 1 s"]
    assert funnel[0].dropped == 1


def test_of_two_alike_the_sharper_is_kept_and_only_among_those_that_passed():
    hashes = ["00000000000000ff", "00000000000000fe", "00000000000000fc", "ffffffff00000000"]
    keep = Keep(thresholds={"motion": Range(max=5)}, dedup_bits=2)
    curated, _ = filters.curate(table([1.0, 1.0, 9.0, 1.0], hashes), keep, LICENCES)
    assert curated.keep.tolist() == [False, True, False, True]
    assert curated.duplicate_of.tolist() == [curated.clip_id[1], "", "", ""]
    assert curated.reason[0] == f"near-duplicate of {curated.clip_id[1]} (1 of 64 bits differ)"


def test_equal_bytes_are_called_so():
    rows = table([1.0, 1.0], ["0" * 16] * 2, sha256=["same", "same"])
    curated, _ = filters.curate(rows, Keep(thresholds={}, dedup_bits=0), LICENCES)
    assert curated.reason.tolist() == [f"same bytes as {curated.clip_id[1]}", ""]


def test_a_licence_withdrawn_later_drops_the_clip():
    rows = table([1.0, 1.0], licence=["CC0-1.0", "CC-BY-3.0"])
    curated, _ = filters.curate(rows, Keep(thresholds={}, dedup_bits=0), LICENCES)
    assert curated.keep.tolist() == [True, False]
    assert "CC-BY-3.0 is not allowed" in curated.reason[1]


def test_an_empty_result_names_the_threshold_and_a_better_one():
    keep = Keep(thresholds={"sharpness": Range(min=2), "motion": Range(max=0.5)}, dedup_bits=0)
    with pytest.raises(filters.FilterError) as error:
        filters.curate(table([1.0, 2.0, 3.0, 4.0, 5.0]), keep, LICENCES)
    assert "curation.keep.thresholds.motion.max=0.5 alone drops 5 of 5; 3 would keep half" in str(error.value)
    better = Keep(thresholds={"motion": Range(max=3)}, dedup_bits=0)
    assert filters.curate(table([1.0, 2.0, 3.0, 4.0, 5.0]), better, LICENCES)[0].keep.sum() == 3


def test_an_empty_result_of_forbidden_licences_says_so():
    with pytest.raises(filters.FilterError, match="licence 2"):
        filters.curate(table([1.0, 2.0]), Keep(thresholds={}, dedup_bits=0), ("MIT",))


def test_a_threshold_without_a_score_is_an_error():
    with pytest.raises(filters.FilterError, match="aesthetics: the scores hold no such column"):
        filters.curate(table([1.0]), Keep(thresholds={"aesthetics": Range(min=4)}, dedup_bits=0), LICENCES)


def test_gathering_counts_what_two_shards_share(tmp_path):
    scores = pd.DataFrame(
        {"clip_id": [f"{n:016x}" for n in range(3)], "hash": ["0" * 16] * 3, "motion": [1.0, 2.0, 3.0]}
    )
    for name, count in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        CLIPS.write(clips(count), tmp_path / name)
        SCORES.write(scores.head(count), tmp_path / name)
    folders = [tmp_path / "a", tmp_path / "b"]
    rows, repeated = filters.gather(folders, folders)
    assert (len(rows), repeated) == (3, 2)
    assert rows.motion.tolist() == [1.0, 2.0, 3.0]


def test_gathering_refuses_clips_without_scores_and_no_clips_at_all(tmp_path):
    CLIPS.write(clips(2), tmp_path)
    SCORES.write(pd.DataFrame({"clip_id": [f"{0:016x}"], "hash": ["0" * 16]}), tmp_path)
    with pytest.raises(filters.FilterError, match="1 clips have no scores"):
        filters.gather([tmp_path], [tmp_path])
    CLIPS.write(clips(2, status="rejected", reason="too short"), tmp_path)
    with pytest.raises(filters.FilterError, match=r"all 2 were rejected when they were cut; .*too short"):
        filters.gather([tmp_path], [tmp_path])


def test_quantiles_are_of_the_clips_that_were_cut():
    rows = table([0.0, 1.0, 2.0, 3.0, 4.0])
    assert filters.quantiles(rows, ["motion"])["motion"] == {"p5": 0.2, "p25": 1.0, "p50": 2.0, "p75": 3.0, "p95": 3.8}
