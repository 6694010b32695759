"""What sets a checkout up: lock, Makefile and Dagster instance agree with the sources and with each other."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import dagster as dg
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra.settings import TELEMETRY_OFF

ROOT = Path(__file__).resolve().parents[1]


def test_what_breaks_this_environment_stays_out() -> None:
    """They refuse pandas 3 or Great Expectations 1, or need a torchvision of their own."""
    names = {canonicalize_name(dist.name) for dist in importlib.metadata.distributions()}
    assert names & {"dagster-mlflow", "dagster-ge", "dagster-pandas", "dagster-pandera", "torchvision", "timm"} == set()


def test_the_lock_satisfies_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    groups = (project["project"]["dependencies"], *extras, project["dependency-groups"]["dev"])
    wanted = [requirement for group in groups for requirement in group]
    lock = (ROOT / "environments/main.txt").read_text(encoding="utf-8")
    pins = re.findall(r"^([^\s=\[]+)(?:\[[^\]]*\])?==([^\s;]+)", lock, re.MULTILINE)
    locked = {canonicalize_name(name): version for name, version in pins}
    missing = [
        text
        for text in wanted
        for need in [Requirement(text)]
        if not need.specifier.contains(locked.get(canonicalize_name(need.name), "0"), prereleases=True)
    ]
    assert missing == []


def test_make_turns_off_the_same_telemetry_as_our_servers_and_tasks() -> None:
    exported = dict(re.findall(r"^export (\w+) := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {name: exported.get(name) for name in TELEMETRY_OFF} == TELEMETRY_OFF


def test_dagster_keeps_everything_below_one_hidden_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dg.asset
    def one() -> int:
        return 1

    monkeypatch.chdir(tmp_path)
    with dg.DagsterInstance.from_config(str(ROOT)) as instance:
        assert instance.telemetry_enabled is False
        assert instance.run_monitoring_enabled
        assert instance.get_concurrency_config().pool_config.default_pool_limit == 1
        result = dg.materialize([one], instance=instance)
        assert result.success
        assert instance.get_runs_count() == 1
    assert [path.name for path in tmp_path.iterdir()] == [".dagster"]
    assert {path.name for path in (tmp_path / ".dagster").iterdir()} >= {"storage", "artifacts", "logs"}
