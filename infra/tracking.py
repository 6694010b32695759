"""The door of MLflow's tracking: runs are opened, tagged, closed and read here, and tasks log to theirs.

`Tracker` is for the orchestrator, which must know that a run exists before it spends anything: its errors are raised.
`RunLog` is for a task in the middle of its work, which a lost tracking server must never end: its records wait.
MLflow takes two seconds to import, so it is imported inside functions.
"""

import atexit
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from infra.outbox import Entry, Outbox, RefusedError, measures, now_ms, texts
from infra.runs import Bill, RunRecord, Status, Tag
from infra.tracking_store import TrackingError, artifact_uri, is_http, only_one, probe, shown

__all__ = ["Bill", "RunLog", "RunRecord", "Status", "Tag", "Tracker", "TrackingError", "connect"]

Result = TypeVar("Result")

REQUEST_SECONDS = 20
REQUEST_RETRIES = 2
SYSTEM_SECONDS = 15.0
HEARTBEAT_SECONDS = 30.0
PAGE_ROWS = 1000
EMBEDDED_UI = "http://127.0.0.1:5000"
# MLflow's limits: entries of one batch, and characters of a parameter's value.
BATCH_METRICS, BATCH_TEXTS, VALUE_CHARACTERS = 1000, 100, 6000
# Error codes of MLflow that no second try will change.
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")


class Tracker:
    """Runs of one MLflow store; safe to share between threads, and never touches MLflow's global active run.

    `uri` is `sqlite:///FILE` or the address of a server; `ui_url` is where people look at it. Every method but the
    constructor raises TrackingError when the store cannot be reached or refuses.
    """

    def __init__(self, uri: str, ui_url: str = "") -> None:
        """Remember the address; nothing is read or written yet."""
        self.uri = uri
        self.ui_url = (ui_url or (uri if is_http(uri) else EMBEDDED_UI)).rstrip("/")
        self._client: Any = None
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type["Tracker"], tuple[str, str]]:
        """Send the address to another process; connections stay."""
        return Tracker, (self.uri, self.ui_url)

    def check(self) -> None:
        """Prove in a few seconds that runs can be opened; makes and migrates an SQLite store on its first use."""
        self._call(lambda client: client.search_experiments(max_results=1))

    def open(
        self,
        experiment: str,
        name: str,
        tags: Mapping[str, object] | None = None,
        params: Mapping[str, object] | None = None,
    ) -> str:
        """Open a run, in status RUNNING, and return its id; the experiment is made when it is new.

        A run with the tag `parent` is shown below that run.
        """
        entries = texts("param", params or {})
        given = {str(key): str(value)[:VALUE_CHARACTERS] for key, value in (tags or {}).items()}
        above = {"mlflow.parentRunId": given[Tag.PARENT]} if Tag.PARENT in given else {}

        def create(client: Any) -> str:
            experiment_id = self._experiment_id(client, experiment)
            created = client.create_run(experiment_id, run_name=name, tags={**given, **above})
            run_id: str = created.info.run_id
            _send(client, run_id, entries)
            return run_id

        return self._call(create)

    def close(
        self,
        run_id: str,
        status: str = Status.FINISHED,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, object] | None = None,
    ) -> None:
        """Close a run with its last metrics and tags; closing it again sets a new status and end."""
        entries = [*texts("tag", tags or {}), *measures(metrics or {}, 0)]

        def finish(client: Any) -> None:
            _send(client, run_id, entries)
            client.set_terminated(run_id, str(Status(status)), end_time=now_ms())

        self._call(finish)

    def reopen(self, run_id: str) -> None:
        """Put a closed run back into status RUNNING; its old end stands until it is closed again."""
        self._call(lambda client: client.update_run(run_id, status=str(Status.RUNNING)))

    def tag(self, run_id: str, tags: Mapping[str, object]) -> None:
        """Set tags of a run, open or closed."""
        self._call(lambda client: _send(client, run_id, texts("tag", tags)))

    def get(self, run_id: str) -> RunRecord:
        """One run by its id."""

        def read(client: Any) -> RunRecord:
            run = client.get_run(run_id)
            return _record(run, client.get_experiment(run.info.experiment_id).name)

        return self._call(read)

    def runs(self, experiment: str | None = None, filter: str = "") -> list[RunRecord]:
        """Every run of an experiment, or of all, newest first; `filter` as MLflow writes it (`tags.step = 'shots'`)."""

        def read(client: Any) -> list[RunRecord]:
            found = _pages(lambda token: client.search_experiments(page_token=token))
            names = {e.experiment_id: e.name for e in found if experiment in (None, e.name)}
            if not names:
                return []
            pages = _pages(lambda token: client.search_runs(list(names), filter, 1, PAGE_ROWS, page_token=token))
            return [_record(run, names[run.info.experiment_id]) for run in pages]

        return self._call(read)

    def url(self, run_id: str) -> str:
        """Page of a run in the MLflow UI."""
        experiment_id = self._call(lambda client: client.get_run(run_id).info.experiment_id)
        return f"{self.ui_url}/#/experiments/{experiment_id}/runs/{run_id}"

    def _call(self, work: Callable[[Any], Result]) -> Result:
        with self._lock:
            if self._client is None:
                self._client = connect(self.uri)
            elif is_http(self.uri):
                probe(self.uri)
        return _guarded(self.uri, lambda: work(self._client))

    def _experiment_id(self, client: Any, name: str) -> str:
        """Id of an experiment; two processes may both find it missing, and then one of them makes it."""
        known = client.get_experiment_by_name(name)
        if known is None:
            with self._lock, suppress(Exception):
                return str(client.create_experiment(name, artifact_location=artifact_uri(self.uri)))
            known = client.get_experiment_by_name(name)
        return str(known.experiment_id)


class RunLog:
    """What a task says about itself while it works: silent without a run id, and never the reason that a task fails.

    Entries are buffered and sent every two seconds and at exit, with system metrics of this machine beside them.
    """

    def __init__(self, uri: str | None = None, run_id: str | None = None) -> None:
        """Start the thread that sends, if there is a run to send to."""
        self.uri, self.run_id = uri, run_id
        self._client: Any = None
        self._outbox: Outbox | None = None
        self._monitor: Any = None
        self._samples, self._sampled, self._beaten = 0, time.monotonic(), -math.inf
        if uri and run_id:
            self._monitor = _system_monitor(uri, run_id)
            self._outbox = Outbox(self._deliver, self._sample)
            atexit.register(self.close)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers; one that is not finite is logged as `nonfinite/<key>` = 1, since charts cannot hold it."""
        self._put(measures(values, step))

    def params(self, values: Mapping[str, object]) -> None:
        """Log settings; a parameter keeps its first value for ever."""
        self._put(texts("param", values))

    def picture(self, path: Path) -> None:
        """Keep a picture with the run; the file is read a little later, so leave it in place."""
        self.artifact(path, "pictures")

    def artifact(self, path: Path, folder: str = "files") -> None:
        """Keep a small file with the run, below `folder`; weights stay in the workspace."""
        self._put([Entry("artifact", str(path), folder)])

    def heartbeat(self, path: Path | None = None) -> None:
        """Show that the task is alive: touch `path` if given, and tag the run with the time twice a minute."""
        if path is not None:
            path.touch()
        now = time.monotonic()
        if now - self._beaten >= HEARTBEAT_SECONDS:
            self._beaten = now
            self._put([Entry("tag", Tag.HEARTBEAT, datetime.now(UTC).isoformat(timespec="seconds"))])

    def flush(self) -> bool:
        """Send what waits, now; True when everything arrived."""
        return self._outbox is None or self._outbox.flush()

    def close(self) -> None:
        """Send what waits and stop; runs by itself at exit."""
        if self._outbox is not None:
            atexit.unregister(self.close)
            self._outbox.close()

    def _put(self, entries: Sequence[Entry]) -> None:
        if self._outbox is not None:
            self._outbox.put(*entries)

    def _deliver(self, entries: Sequence[Entry]) -> None:
        assert self.uri is not None
        assert self.run_id is not None
        if self._client is None:
            self._client = connect(self.uri)
        elif is_http(self.uri):
            probe(self.uri)
        _send(self._client, self.run_id, entries)

    def _sample(self) -> None:
        """Read the machine's load when it is time to, and once more at the end."""
        if self._monitor is None or (time.monotonic() - self._sampled < SYSTEM_SECONDS and self._samples):
            return
        with suppress(Exception):  # a machine that hides its load is no reason to stop
            self._monitor.collect_metrics()
            values = {f"system/{key}": value for key, value in self._monitor.aggregate_metrics().items()}
            for part in self._monitor.monitors:
                part.clear_metrics()
            self._put(measures(values, self._samples))
        self._samples, self._sampled = self._samples + 1, time.monotonic()


def connect(uri: str) -> Any:
    """An MlflowClient for tracking and registry, known to answer; raises TrackingError within seconds if none can.

    The first use of an SQLite store makes its tables (several seconds): a file lock keeps two processes from doing it.
    """
    probe(uri)
    _import_mlflow()
    from mlflow import MlflowClient

    def first_contact() -> Any:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        return client

    with only_one(uri):
        return _guarded(uri, first_contact)


def first_line(error: Exception) -> str:
    """What an error says, without the pages that SQLAlchemy and MLflow add."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _import_mlflow() -> None:
    """Import MLflow with short network limits, unless the user set others, and without its notes about tables."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    retries: Any = MLFLOW_HTTP_REQUEST_MAX_RETRIES
    timeout: Any = MLFLOW_HTTP_REQUEST_TIMEOUT
    for variable, value in ((retries, REQUEST_RETRIES), (timeout, REQUEST_SECONDS)):
        if not variable.is_set():
            variable.set(value)
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _guarded(uri: str, work: Callable[[], Result]) -> Result:
    try:
        return work()
    except TrackingError:
        raise
    except Exception as error:  # MLflow lets the errors of SQLAlchemy and requests through beside its own
        raise TrackingError(f"MLflow at {shown(uri)}: {first_line(error)}") from error


def _system_monitor(uri: str, run_id: str) -> Any:
    """MLflow's readers of CPU, memory, disk, network and GPU load; their thread is not used, ours bears outages."""
    _import_mlflow()
    from mlflow.system_metrics import system_metrics_monitor

    with suppress(Exception):
        module: Any = system_metrics_monitor
        monitor = module.SystemMetricsMonitor(run_id, tracking_uri=uri)
        monitor.collect_metrics()  # the first reading of CPU and network is a base line
        for part in monitor.monitors:
            part.clear_metrics()
        return monitor
    return None


def _send(client: Any, run_id: str, entries: Sequence[Entry]) -> None:
    """Send entries in batches; raises RefusedError for those that MLflow will never take."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    metrics = [Metric(e.key, float(e.value), e.time_ms, e.step) for e in entries if e.kind == "metric"]
    params = [Param(e.key, str(e.value)[:VALUE_CHARACTERS]) for e in entries if e.kind == "param"]
    tags = [RunTag(e.key, str(e.value)[:VALUE_CHARACTERS]) for e in entries if e.kind == "tag"]
    try:
        for i in range(0, len(metrics), BATCH_METRICS):
            client.log_batch(run_id, metrics=metrics[i : i + BATCH_METRICS])
        for i in range(0, max(len(params), len(tags)), BATCH_TEXTS):
            client.log_batch(run_id, params=params[i : i + BATCH_TEXTS], tags=tags[i : i + BATCH_TEXTS])
        for entry in entries:
            if entry.kind == "artifact":
                client.log_artifact(run_id, entry.key, str(entry.value))
    except FileNotFoundError as error:
        raise RefusedError(f"no such file: {error}") from error
    except MlflowException as error:
        if error.error_code in REFUSALS:
            raise RefusedError(first_line(error)) from error
        raise


def _record(run: Any, experiment: str) -> RunRecord:
    info, data = run.info, run.data
    tags = {key: value for key, value in data.tags.items() if not key.startswith("mlflow.")}
    return RunRecord(
        run_id=info.run_id,
        experiment=experiment,
        name=info.run_name,
        status=info.status,
        started=_time(info.start_time),
        ended=_time(info.end_time) if info.end_time else None,
        metrics=dict(data.metrics),
        tags=tags,
        params=dict(data.params),
    )


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _pages(read: Callable[[str | None], Any]) -> list[Any]:
    """Every item of a paged answer."""
    token, items = None, []
    while True:
        page = read(token)
        items += page
        token = page.token
        if not token:
            return items
