"""What every table is expected to hold: one suite a manifest table, as plain data built from the recipe.

An expectation names a Great Expectations class, a severity and a sentence a reader understands. `critical` means that
what is built on the table would be wrong, `warning` that a person should look, `info` that it is worth knowing.
`evaluation/expectations.py` runs suites over frames that `evaluation/derived.py` has given a few more columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ml.manifest import CAPTIONS, CLIPS, CURATED, EXAMPLES, LATENTS, SCORES, SHOTS, VIDEOS, Table
from ml.recipe import Recipe
from ml.sections import Range

Severity = Literal["critical", "warning", "info"]
Limits = tuple[float | None, float | None]
SHA256 = r"^[0-9a-f]{64}$"
ID = r"^[0-9a-f]{16}$"
OK, REJECTED, KEPT = 'status == "ok"', 'status == "rejected"', "keep == True"
# Clips are whole frames, so one may differ from the wanted span by a frame at each end; 0.2 s covers 10 fps.
SPAN_SLACK_SECONDS = 0.2
# What a score can be at all (ml/curation/scorers): a text share is a fraction, luma has 8 bits, no score is negative.
SCORE_BOUNDS: Mapping[str, Range] = {"text_area": Range(min=0, max=1), "brightness": Range(min=0, max=255)}


class UnknownTableError(ValueError):
    """A table that no suite is written for."""


@dataclass(frozen=True)
class Expect:
    """One expectation: Great Expectations' class name, how bad a failure is, what it means, and its arguments."""

    kind: str
    severity: Severity
    meaning: str
    arguments: Mapping[str, Any]

    @property
    def column(self) -> str:
        """The column it is about, two joined by ` and `, or `(table)`."""
        found = [self.arguments[k] for k in ("column", "column_A", "column_B") if k in self.arguments]
        return " and ".join(found) or "(table)"


@dataclass(frozen=True)
class Suite:
    """All expectations of one table."""

    table: Table
    expects: tuple[Expect, ...]

    def as_json(self) -> dict[str, Any]:
        """The suite as JSON-able data, to store and to diff."""
        return {"table": self.table.name, "expectations": [asdict(expect) for expect in self.expects]}


def suite(table_name: str, recipe: Recipe | None) -> Suite:
    """The suite of a manifest table under a recipe; `videos` of a shared corpus has none, and any licence will do.

    Raises UnknownTableError naming the known tables, or the table that needs a recipe.
    """
    if table_name not in _SUITES:
        raise UnknownTableError(f"no suite for table {table_name!r}; known: {', '.join(_SUITES)}")
    table, build = _SUITES[table_name]
    if recipe is None and table is not VIDEOS:
        raise UnknownTableError(f"the suite of table {table_name} needs a recipe")
    every = (_rows(), *(_present(column.name) for column in table.columns), _unique(table.key))
    own = build(recipe) if recipe is not None else _videos_of(None)
    return Suite(table, (*every, *own))


def wanted_buckets(recipe: Recipe) -> list[str]:
    """Every `resolution/frames` cell that some training stage reads, sorted; without stages, the one of samples."""
    if not recipe.stages:
        return [f"{recipe.sampling.resolution}/{recipe.sampling.frames}"]
    cells = {f"{name}/{n}" for stage in recipe.stages for name, row in stage.buckets.items() for n in row}
    return sorted(cells)


# --- one suite a table --------------------------------------------------------------------------------------------


def _videos(recipe: Recipe) -> tuple[Expect, ...]:
    return _videos_of(recipe.corpus.licences)


def _videos_of(licences: tuple[str, ...] | None) -> tuple[Expect, ...]:
    allowed = _one_of("licence", licences, "only licences that the recipe allows", where=OK) if licences else None
    return (
        _matches("video_id", ID, "ids are 16 hex digits"),
        _matches("sha256", SHA256, "the file's digest is known", where=OK),
        allowed or _filled("licence", "the licence is written down", where=OK),
        _between("width", (16, 8192), "a plausible picture width in pixels", where=OK),
        _between("height", (16, 8192), "a plausible picture height in pixels", where=OK),
        _between("fps", (1, 240), "a plausible frame rate", where=OK),
        _between("num_frames", (2, None), "more than one frame", where=OK),
        _between("duration_seconds", (0.04, None), "it lasts", where=OK),
        _between("size_bytes", (1, None), "the file is not empty", where=OK),
        *_fate(),
        _mean("is_ok", (0.5, None), "at least half of the videos can be used"),
        _distinct("sha256", "no file is in the corpus twice", where=OK, severity="warning"),
        _filled("source", "where it came from is written down", severity="warning"),
    )


def _shots(recipe: Recipe) -> tuple[Expect, ...]:
    minimum = recipe.curation.shots.min_seconds - SPAN_SLACK_SECONDS
    return (
        _matches("shot_id", ID, "ids are 16 hex digits"),
        _greater("end_frame", "start_frame", "a shot has frames"),
        _greater("end_seconds", "start_seconds", "a shot lasts"),
        _between("start_frame", (0, None), "a shot starts inside its video"),
        _between("shot_seconds", (minimum, None), "shots are not shorter than asked", severity="warning", mostly=0.9),
    )


def _clips(recipe: Recipe) -> tuple[Expect, ...]:
    clips = recipe.curation.clips
    shortest, longest = clips.min_seconds - SPAN_SLACK_SECONDS, clips.max_seconds + SPAN_SLACK_SECONDS
    return (
        _matches("clip_id", ID, "ids are 16 hex digits"),
        _matches("sha256", SHA256, "the clip file's digest is known", where=OK),
        _filled("path", "the clip file is named", where=OK),
        _one_of("licence", recipe.corpus.licences, "only licences that the recipe allows", where=OK),
        _between("duration_seconds", (shortest, longest), "clips last as long as the recipe asks", where=OK),
        _between("fps", (1, clips.fps + 0.01), "the frame rate does not exceed the cap", where=OK),
        _between("short_side_px", (16, clips.short_side_px + 1), "the shorter side does not exceed the cap", where=OK),
        _between("num_frames", (2, None), "more than one frame", where=OK),
        _greater("end_seconds", "start_seconds", "a clip lasts"),
        *_fate(),
        _distinct("sha256", "no two clips are the same file", where=OK, severity="warning"),
        _mean("is_ok", (0.3, None), "at least three clips in ten could be cut"),
    )


def _scores(recipe: Recipe) -> tuple[Expect, ...]:
    expects = [_matches("hash", ID, "the perceptual hash is 16 hex digits")]
    for scorer in recipe.curation.scores:
        bounds = SCORE_BOUNDS.get(scorer, Range(min=0))
        expects += [
            _present(scorer),
            _between(scorer, (bounds.min, bounds.max), f"{scorer} lies in its range"),
            _present(f"{scorer}_revision"),
        ]
    return tuple(expects)


def _curated(recipe: Recipe) -> tuple[Expect, ...]:
    thresholds = {k: r for k, r in recipe.curation.keep.thresholds.items() if (r.min, r.max) != (None, None)}
    held = (
        _between(k, (r.min, r.max), f"kept clips pass the {k} threshold", where=KEPT) for k, r in thresholds.items()
    )
    return (
        *held,
        _one_of("licence", recipe.corpus.licences, "kept clips have an allowed licence", where=KEPT),
        _filled("reason", "a dropped clip keeps its reason", where="keep == False"),
        _lengths("reason", (0, 0), "a kept clip has no reason to be dropped", where=KEPT),
        _some("is_kept", "at least one clip is kept", "critical"),
        _mean("is_kept", (0.2, None), "at least a fifth of the clips is kept"),
        _mean("is_kept", (None, 0.98), "the thresholds drop something", severity="info"),
    )


def _captions(recipe: Recipe) -> tuple[Expect, ...]:
    wanted = recipe.curation.captions
    return (
        _filled("caption", "every caption says something"),
        _between(
            "caption_words", (wanted.min_words, wanted.max_words), "captions have the length in words that is asked"
        ),
        _filled("captioner", "who wrote it is written down"),
        _filled("revision", "the captioner's revision is written down", severity="warning"),
        _proportion_unique("caption", 0.5, "at least half of the captions differ from each other"),
    )


def _examples(recipe: Recipe) -> tuple[Expect, ...]:
    want = recipe.dataset.holdout_fraction
    tiers = "|".join(tier.name for tier in recipe.dataset.tiers)
    low, high = 0.3 * want, min(1.0, 3 * want)
    return (
        _one_of("split", ("train", "holdout"), "split is train or holdout"),
        _contains("split", ("train", "holdout"), "both splits have examples"),
        _between("splits_of_short_video", (1, 1), "no video is in both splits, but one long enough for a block"),
        _between("splits_of_shot", (1, 1), "no shot is in both splits"),
        _between("split_changes_of_video", (0, 2), "a long video holds out one unbroken block"),
        _between("splits_of_file", (1, 1), "no clip file is in both splits"),
        _matches("tiers", rf"^(?:(?:{tiers})(?: (?:{tiers}))*)?$", "tiers are the recipe's"),
        *(_some(f"in_{t.name}", f"tier {t.name} has examples", "warning") for t in recipe.dataset.tiers),
        _matches("sha256", SHA256, "the clip file's digest is known"),
        _one_of("licence", recipe.corpus.licences, "only licences that the recipe allows"),
        _filled("caption", "every example has a text"),
        _filled("path", "every example has a file"),
        _mean("is_holdout", (low, high), f"the held-out share is near the wanted {want:g}"),
    )


def _latents(recipe: Recipe) -> tuple[Expect, ...]:
    pixels = recipe.strides.pixels
    wanted = wanted_buckets(recipe)
    return (
        _one_of("split", ("train", "holdout"), "split is train or holdout"),
        _contains("bucket", wanted, "every bucket that a stage reads has a latent", severity="warning"),
        _between("splits_of_clip", (1, 1), "no clip is in both splits"),
        _matches("shard", r"\.safetensors$", "latents lie in a safetensors shard"),
        _between("height_rest", (0, 0), f"height is divisible by {pixels} pixels"),
        _between("width_rest", (0, 0), f"width is divisible by {pixels} pixels"),
        _between("frames", (1, None), "at least one frame"),
    )


def _fate() -> tuple[Expect, ...]:
    return (
        _one_of("status", ("ok", "rejected"), "status is ok or rejected"),
        _filled("reason", "a rejected row says why", where=REJECTED, severity="warning"),
    )


_SUITES: Mapping[str, tuple[Table, Callable[[Recipe], tuple[Expect, ...]]]] = {
    "videos": (VIDEOS, _videos),
    "shots": (SHOTS, _shots),
    "clips": (CLIPS, _clips),
    "scores": (SCORES, _scores),
    "curated": (CURATED, _curated),
    "captions": (CAPTIONS, _captions),
    "examples": (EXAMPLES, _examples),
    "latents": (LATENTS, _latents),
}


# --- words for expectations ---------------------------------------------------------------------------------------


def _expect(kind: str, severity: Severity, meaning: str, **arguments: Any) -> Expect:
    given = {key: value for key, value in arguments.items() if value is not None}
    if "row_condition" in given:
        given["condition_parser"] = "pandas"
    return Expect(kind, severity, meaning, given)


def _rows() -> Expect:
    return _expect("ExpectTableRowCountToBeBetween", "critical", "the table has rows", min_value=1)


def _present(column: str) -> Expect:
    return _expect("ExpectColumnValuesToNotBeNull", "critical", "a value in every row", column=column)


def _unique(column: str) -> Expect:
    return _expect("ExpectColumnValuesToBeUnique", "critical", "the key is unique", column=column)


def _distinct(column: str, meaning: str, where: str | None = None, severity: Severity = "critical") -> Expect:
    return _expect("ExpectColumnValuesToBeUnique", severity, meaning, column=column, row_condition=where)


def _matches(column: str, regex: str, meaning: str, where: str | None = None) -> Expect:
    kind = "ExpectColumnValuesToMatchRegex"
    return _expect(kind, "critical", meaning, column=column, regex=regex, row_condition=where)


def _one_of(column: str, values: tuple[str, ...], meaning: str, where: str | None = None) -> Expect:
    kind = "ExpectColumnValuesToBeInSet"
    return _expect(kind, "critical", meaning, column=column, value_set=list(values), row_condition=where)


def _contains(column: str, values: Any, meaning: str, severity: Severity = "critical") -> Expect:
    kind = "ExpectColumnDistinctValuesToContainSet"
    return _expect(kind, severity, meaning, column=column, value_set=list(values))


def _between(
    column: str,
    limits: Limits,
    meaning: str,
    where: str | None = None,
    severity: Severity = "critical",
    mostly: float | None = None,
) -> Expect:
    low, high = limits
    options = {"min_value": low, "max_value": high, "row_condition": where, "mostly": mostly}
    return _expect("ExpectColumnValuesToBeBetween", severity, meaning, column=column, **options)


def _lengths(
    column: str, limits: Limits, meaning: str, where: str | None = None, severity: Severity = "critical"
) -> Expect:
    low, high = limits
    options = {"min_value": low, "max_value": high, "row_condition": where}
    return _expect("ExpectColumnValueLengthsToBeBetween", severity, meaning, column=column, **options)


def _filled(column: str, meaning: str, where: str | None = None, severity: Severity = "critical") -> Expect:
    return _lengths(column, (1, None), meaning, where, severity)


def _greater(column: str, than: str, meaning: str) -> Expect:
    kind = "ExpectColumnPairValuesAToBeGreaterThanB"
    return _expect(kind, "critical", meaning, column_A=column, column_B=than)


def _mean(column: str, limits: Limits, meaning: str, severity: Severity = "warning") -> Expect:
    low, high = limits
    kind = "ExpectColumnMeanToBeBetween"
    return _expect(kind, severity, meaning, column=column, min_value=low, max_value=high)


def _some(column: str, meaning: str, severity: Severity) -> Expect:
    """At least one row of a column of zeros and ones holds a one."""
    return _expect("ExpectColumnMaxToBeBetween", severity, meaning, column=column, min_value=1)


def _proportion_unique(column: str, low: float, meaning: str) -> Expect:
    kind = "ExpectColumnProportionOfUniqueValuesToBeBetween"
    return _expect(kind, "warning", meaning, column=column, min_value=low)
