"""The names under which runs are written: changing one would orphan every run that exists."""

from infra.runs import Bill, Status, Tag


def test_tags_and_metrics_keep_their_names() -> None:
    names = ("recipe", "profile", "step", "step_key", "attempt", "purpose", "intended_purpose")
    machine = ("accelerators", "devices", "nodes", "price_row", "usd_per_hour")
    origin = ("git.commit", "handle", "out", "dagster.run_id", "dagster.asset_key", "heartbeat")
    family = ("parent", "parent_of")
    assert tuple(str(tag) for tag in Tag) == names + machine + origin + family
    assert [str(metric) for metric in Bill] == ["cost_usd", "gpu_hours", "wall_seconds"]


def test_statuses_are_those_of_mlflow() -> None:
    from mlflow.entities import RunStatus

    assert all(RunStatus.to_string(RunStatus.from_string(str(status))) == status for status in Status)
