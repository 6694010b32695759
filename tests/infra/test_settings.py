"""Settings resolve to absolute places, refuse what they do not know, and import in no time."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.settings import TELEMETRY_OFF, Settings
from ml.recipe import available

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"OPENSORA_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)


def test_embedded_defaults_lie_in_an_absolute_workspace(tmp_path: Path) -> None:
    settings = Settings()
    assert settings.space.root == tmp_path / "workspace"
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/workspace/mlflow.db"
    assert settings.dvc_remote == str(tmp_path / "workspace" / "dvc-remote")
    assert settings.mlflow_url == "http://127.0.0.1:5000"
    assert settings.recipe_names == tuple(sorted(available())), "every packaged recipe stands in the code location"
    assert not (tmp_path / "workspace").exists()


def test_variables_move_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENSORA_TRACKING_URI", "https://mlflow.example.org/")
    monkeypatch.setenv("OPENSORA_DVC_REMOTE", "s3://bucket/dvc")
    monkeypatch.setenv("OPENSORA_RECIPES", "v2_0, v1_2,")
    settings = Settings()
    assert settings.mlflow_url == "https://mlflow.example.org"
    assert settings.dvc_remote == "s3://bucket/dvc"
    assert settings.recipe_names == ("v2_0", "v1_2")


def test_an_empty_variable_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENSORA_TRACKING_URI", "")
    assert Settings().tracking_uri.startswith("sqlite:////")


@pytest.mark.parametrize(("name", "value"), [("LAUNCHER", "slurm"), ("MLFLOW_PORT", "0"), ("MLFLOW_PORT", "web")])
def test_a_wrong_value_names_its_field(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"OPENSORA_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_a_misspelt_variable_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENSORA_WORKSAPCE", "/data")
    with pytest.raises(ValidationError, match="did you mean OPENSORA_WORKSPACE"):
        Settings()


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.profile = "paper"  # type: ignore[misc]


def test_every_switch_is_a_variable() -> None:
    assert all(name == name.upper() and value for name, value in TELEMETRY_OFF.items())
    assert TELEMETRY_OFF["DO_NOT_TRACK"] == "1"


def test_the_ground_floor_loads_light() -> None:
    code = (
        "import sys, infra.settings, infra.tracking, infra.registry, infra.prices, infra.storage\n"
        "heavy = {'mlflow', 'torch', 'dvc', 'sky', 'pandas', 'dagster', 'great_expectations'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
