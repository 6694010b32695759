"""What no resolver checks: that the packages which were installed together also work together."""

from importlib.metadata import distributions
from pathlib import Path

OURS = ("orchestration", "assets", "evaluation", "ml", "infra")
OUR_NAME = "opensora-pipeline"


def test_a_string_asset_selection_parses() -> None:
    """DVC's stable hydra brings an antlr that breaks exactly this, and `pip check` finds nothing wrong with it."""
    import dagster

    @dagster.asset
    def clips() -> None: ...

    @dagster.asset(deps=[clips])
    def scores() -> None: ...

    selection = dagster.AssetSelection.from_string("clips+")
    assert selection.resolve([clips, scores]) == {dagster.AssetKey("clips"), dagster.AssetKey("scores")}
    job = dagster.define_asset_job("everything", "*")
    definitions = dagster.Definitions(assets=[clips, scores], jobs=[job])
    assert len(list(definitions.resolve_job_def("everything").asset_layer.executable_asset_keys)) == 2


def test_exactly_one_opencv_is_installed() -> None:
    """Two distributions of `cv2` overwrite each other's files, and the last one installed wins."""
    names = {d.metadata["Name"].lower() for d in distributions()}
    assert {name for name in names if name.startswith("opencv-")} == {"opencv-python-headless"}


def test_nobody_else_owns_a_file_under_our_names() -> None:
    """Five plain top-level names are ours by convention only: a package that ships one of them would shadow it."""
    strangers = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        tops = {Path(str(file)).parts[0].removesuffix(".py") for file in distribution.files or ()}
        if name != OUR_NAME and tops.intersection(OURS):
            strangers[name] = sorted(tops.intersection(OURS))
    assert strangers == {}


def test_no_package_of_tests_shadows_ours() -> None:
    """Some distributions install a top-level `tests`; ours has no `__init__.py`, so nobody may import from it."""
    assert not list(Path(__file__).parent.rglob("__init__.py"))
