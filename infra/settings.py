"""Settings of an installation: where the workspace is, which servers and which launcher, all as `OPENSORA_*` variables.

A recipe says what to make; the settings say where this installation keeps it. Moving from the embedded defaults to
PostgreSQL, S3 and a cluster is a change of settings and of no code.
"""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.tracking_store import sqlite_uri
from infra.workspace import Workspace

Port = Annotated[int, Field(ge=1, le=65535)]

# One switch for each tool that reports home by default, checked in an empty network namespace (environments.md, 5).
TELEMETRY_OFF: dict[str, str] = {
    "DO_NOT_TRACK": "1",
    "DAGSTER_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DAFT_ANALYTICS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Not telemetry: without it the MLflow server starts eight more processes (2.3 GB against 0.5 GB).
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


class Settings(BaseSettings):
    """One installation; every field can be set by an environment variable (`OPENSORA_WORKSPACE`, ...).

    Fields come out resolved: the workspace is absolute, because tasks and servers run in other working directories, and
    an empty or missing URI is the embedded default. Raises pydantic's ValidationError naming the field that is wrong.
    """

    model_config = SettingsConfigDict(
        env_prefix="OPENSORA_", env_ignore_empty=True, frozen=True, extra="forbid", validate_default=True
    )

    workspace: Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())] = Path("workspace")
    profile: str = "tiny"
    recipes: str = "v1_0,v1_1,v1_2,v1_3,v2_0,v2_0_hc"
    tracking_uri: str = Field(default_factory=lambda data: sqlite_uri(Workspace(data["workspace"]).tracking_db))
    launcher: Literal["local", "skypilot"] = "local"
    dvc_remote: str = Field(default_factory=lambda data: str(Workspace(data["workspace"]).dvc_remote))
    host: str = "127.0.0.1"
    dagster_port: Port = 3000
    mlflow_port: Port = 5000
    arena_port: Port = 7862
    dagster_url: str = Field(default_factory=lambda data: f"http://{data['host']}:{data['dagster_port']}")
    mlflow_url: str = Field(default_factory=lambda data: _mlflow_url(data))

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_variable(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A misspelt variable would otherwise be ignored, and its default used without a word."""
        known = [f"OPENSORA_{name.upper()}" for name in cls.model_fields]
        for name in sorted(os.environ):
            if name.upper().startswith("OPENSORA_") and name.upper() not in known:
                near = difflib.get_close_matches(name.upper(), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"unknown variable {name}; {hint}")
        return values

    @property
    def space(self) -> Workspace:
        """The workspace, as everybody else takes it."""
        return Workspace(self.workspace)

    @property
    def recipe_names(self) -> tuple[str, ...]:
        """Recipes that this installation serves, from the comma-separated list."""
        return tuple(name.strip() for name in self.recipes.split(",") if name.strip())


def _mlflow_url(data: dict[str, Any]) -> str:
    """Where people reach MLflow: the tracking server itself if there is one, else the local UI over the SQLite file."""
    uri: str = data["tracking_uri"]
    return (
        uri.rstrip("/") if uri.startswith(("http://", "https://")) else f"http://{data['host']}:{data['mlflow_port']}"
    )
