"""The door of MLflow's model registry: checkpoints become registered versions, and aliases say which one is released.

Weights never enter MLflow. A checkpoint is an external LoggedModel that says where its weights lie and which digest
they have; a registered version points to it, and the aliases `candidate` and `champion` point to versions.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from infra.tracking import connect, first_line
from infra.tracking_store import artifact_uri

CANDIDATE, CHAMPION = "candidate", "champion"
WEIGHTS_URI, SHA256 = "weights_uri", "sha256"
IMPORTS = "opensora/weights"
_GLOBAL_URI = threading.Lock()


class RegistryError(RuntimeError):
    """A model, version or alias that does not exist or cannot be made, and what does."""


@dataclass(frozen=True)
class Checkpoint:
    """What is registered: weights somewhere, their digest, the run that made them, and what is known about them."""

    name: str
    run_id: str
    weights_uri: str
    sha256: str
    params: Mapping[str, object] = field(default_factory=dict)
    tags: Mapping[str, object] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True)
class Imported:
    """Weights that somebody else made: where ours lie and their digest; their file, address, digest and licence.

    `source` is the file that was imported, `source_url` where it came from ("" = not said).
    """

    name: str
    weights_uri: str
    sha256: str
    source: str
    source_sha256: str
    source_url: str = ""
    licence: str = ""
    params: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelVersion:
    """One registered version: its number, the LoggedModel and run behind it, its weights and its aliases."""

    name: str
    version: int
    model_id: str
    run_id: str
    weights_uri: str
    sha256: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]


class Registry:
    """Registered checkpoints of one MLflow store; raises TrackingError when it cannot be reached."""

    def __init__(self, uri: str) -> None:
        """Remember the address; nothing is read or written yet."""
        self.uri = uri
        self._client: Any = None

    def register(self, checkpoint: Checkpoint) -> ModelVersion:
        """A version for this checkpoint; registering the same weights of the same run again returns the first one."""
        client = self._connected()
        for known in self.versions(checkpoint.name):
            if (known.run_id, known.sha256) == (checkpoint.run_id, checkpoint.sha256):
                return known
        try:
            with _addressed(self.uri):
                number = _register(client, checkpoint)
        except Exception as error:  # MLflow lets the errors of SQLAlchemy and requests through beside its own
            what = f"{checkpoint.name} of run {checkpoint.run_id}"
            raise RegistryError(f"cannot register {what}: {first_line(error)}") from error
        return self.version(checkpoint.name, number)

    def record(self, imported: Imported) -> str:
        """An external LoggedModel for imported weights, and its id; recording the same again returns the first one."""
        client = self._connected()
        try:
            with _addressed(self.uri):
                return _record(client, imported)
        except Exception as error:  # MLflow lets the errors of SQLAlchemy and requests through beside its own
            raise RegistryError(f"cannot record {imported.name}: {first_line(error)}") from error

    def version(self, name: str, version: int) -> ModelVersion:
        """One version; raises RegistryError naming those that exist."""
        from mlflow.exceptions import MlflowException

        try:
            return _version(self._connected().get_model_version(name, str(version)))
        except MlflowException as error:
            numbers = [known.version for known in self.versions(name)]
            raise RegistryError(f"{name} has no version {version}; it has {numbers or 'none'}") from error

    def versions(self, name: str) -> list[ModelVersion]:
        """Every version of a model, oldest first; none for a model that was never registered."""
        client, found, token = self._connected(), [], None
        while True:
            page = client.search_model_versions(f"name = '{name}'", page_token=token)
            found += list(page)
            token = page.token
            if not token:
                break
        # The search may leave aliases out, so they are read with the model itself.
        aliases = _aliases(client, name) if found else {}
        return sorted((_version(v, aliases) for v in found), key=lambda version: version.version)

    def set_alias(self, name: str, alias: str, version: int) -> ModelVersion:
        """Point an alias to a version, away from any other; raises RegistryError for a version that does not exist."""
        self.version(name, version)
        self._connected().set_registered_model_alias(name, alias, str(version))
        return self.version(name, version)

    def drop_alias(self, name: str, alias: str) -> None:
        """Remove an alias; nothing happens when it points nowhere."""
        self._connected().delete_registered_model_alias(name, alias)

    def by_alias(self, name: str, alias: str) -> ModelVersion | None:
        """The version that an alias points to, or None."""
        number = next((n for n, names in _aliases(self._connected(), name).items() if alias in names), None)
        return self.version(name, number) if number is not None else None

    def tag(self, name: str, version: int, tags: Mapping[str, object]) -> ModelVersion:
        """Set tags of a version, the reasons of a gate for example."""
        client = self._connected()
        for key, value in tags.items():
            client.set_model_version_tag(name, str(version), str(key), str(value))
        return self.version(name, version)

    def score(self, version: ModelVersion, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of an evaluation run as metrics of the checkpoint too, so that checkpoints can be searched."""
        client = self._connected()
        for key, value in metrics.items():
            client.log_metric(run_id, key, value, step=step, model_id=version.model_id)

    def _connected(self) -> Any:
        if self._client is None:
            self._client = connect(self.uri)
        return self._client


@contextmanager
def _addressed(uri: str) -> Iterator[None]:
    """Set MLflow's global tracking URI for a moment, and only here.

    An external model can be made for the global URI only, and over SQLite even a client's `create_model_version` looks
    its source up there (mlflow 3.17, store/model_registry/sqlalchemy_store.py).
    """
    import mlflow

    tracking: Any = mlflow.tracking
    with _GLOBAL_URI:
        before = tracking.get_tracking_uri() if tracking.is_tracking_uri_set() else None
        tracking.set_tracking_uri(uri)
        try:
            yield
        finally:
            tracking.set_tracking_uri(before)


def _register(client: Any, checkpoint: Checkpoint) -> int:
    """Make the LoggedModel and the version that points to it; returns the version's number."""
    import mlflow
    from mlflow.entities import LoggedModelOutput

    model = mlflow.create_external_model(
        name=checkpoint.name,
        source_run_id=checkpoint.run_id,
        tags=_tags(checkpoint),
        params={str(key): str(value) for key, value in checkpoint.params.items()},
        model_type="checkpoint",
        experiment_id=client.get_run(checkpoint.run_id).info.experiment_id,
    )
    client.log_outputs(checkpoint.run_id, [LoggedModelOutput(model.model_id, checkpoint.step)])
    made = mlflow.register_model(f"models:/{model.model_id}", checkpoint.name, tags=_tags(checkpoint))
    return int(made.version)


def _record(client: Any, imported: Imported) -> str:
    """The LoggedModel of imported weights, made unless the experiment has it; no run made them, so none is named."""
    import mlflow

    known = client.get_experiment_by_name(IMPORTS)
    experiment = (
        known.experiment_id
        if known
        else client.create_experiment(IMPORTS, artifact_location=artifact_uri(client.tracking_uri))
    )
    tags = {f.name: str(getattr(imported, f.name)) for f in fields(imported) if f.name not in ("name", "params")}
    for model in client.search_logged_models([experiment], filter_string=f"tags.{SHA256} = '{imported.sha256}'"):
        if model.name == imported.name and tags.items() <= model.tags.items():
            return str(model.model_id)
    params = {str(key): str(value) for key, value in imported.params.items()}
    made = mlflow.create_external_model(
        name=imported.name, tags=tags, params=params, model_type="imported", experiment_id=experiment
    )
    return str(made.model_id)


def _tags(checkpoint: Checkpoint) -> dict[str, str]:
    known = {WEIGHTS_URI: checkpoint.weights_uri, SHA256: checkpoint.sha256}
    return {**{str(key): str(value) for key, value in checkpoint.tags.items()}, **known}


def _aliases(client: Any, name: str) -> dict[int, tuple[str, ...]]:
    """Aliases by version number; none for a model that was never registered."""
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
    found: dict[int, tuple[str, ...]] = {}
    for alias, version in sorted(model.aliases.items()):
        found[int(version)] = (*found.get(int(version), ()), alias)
    return found


def _version(version: Any, aliases: Mapping[int, tuple[str, ...]] | None = None) -> ModelVersion:
    number, tags = int(version.version), dict(version.tags)
    return ModelVersion(
        name=version.name,
        version=number,
        model_id=str(version.model_id or version.source.rpartition("/")[2]),
        run_id=str(version.run_id or ""),
        weights_uri=tags.get(WEIGHTS_URI, ""),
        sha256=tags.get(SHA256, ""),
        aliases=tuple(sorted(version.aliases)) if aliases is None else aliases.get(number, ()),
        tags=tags,
    )
