"""The nouns of compute: a task (one command on hardware), its handle, its state, and the launcher that runs it.

A launcher is one class in one file of this folder. It starts a task and answers questions about it from the handle
alone, so that an orchestrator that was killed can be replaced by another one that only read the handle.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args

from infra.compute.supervise import GRACE_SECONDS
from infra.workspace import RESULT

# Exit codes of a training that stopped before its end, with the numbers of sysexits.h that mean "try again" and three
# that no interpreter or shell uses by itself: asked to stop and saved its place; a rank took no step for too long; the
# device or the host had no memory left; another rank was gone without a word.
PREEMPTED, HUNG, OUT_OF_MEMORY, RANK_LOST = 75, 76, 77, 79
# In a step's folder: why it stopped (`infra/compute/ending.py`), the stacks of ranks that hung, a wish to stop.
STOPPED, STACKS, STOP = "stopped.json", "stacks", "stop"
# What asks for a stop: a cancelled task or a machine taken away, and Slurm's notice (`--signal=USR1@120`).
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# torchrun kills its ranks that much before the supervisor kills torchrun, which else would leave them behind.
TORCHRUN_MARGIN_SECONDS = 5
# What a training has to save its place: the notice that AWS gives before it takes a spot machine away.
SAVE_SECONDS = 120.0
LOOPBACK = "127.0.0.1"

Status = Literal["running", "succeeded", "failed", "preempted", "lost"]
TAIL_LINES = 60
_ACCELERATORS = re.compile(r"^([A-Z][A-Za-z0-9-]*):([1-9]\d*)$")


class ComputeError(RuntimeError):
    """A task, a handle or a launcher that cannot be used, or a launcher that could not do what it was asked."""


class TaskFailed(ComputeError):  # noqa: N818  the name that an asset's reader sees; it is a fact, not a defect
    """A task that ended without success: what it said last, the run that recorded it, and where the whole log is.

    `state` is how it ended.
    """

    def __init__(self, message: str, state: "TaskState | None" = None) -> None:
        super().__init__(message)
        self.state = state

    @property
    def first_line(self) -> str:
        """Which task it was and why, without its log."""
        return str(self).partition("\n")[0]


@dataclass(frozen=True)
class Resources:
    """Hardware of a task: `accelerators` per node (`CPU:2`, `H200:8`), nodes, the price-book row, where, spot or not.

    Raises ComputeError for accelerators that are not NAME:COUNT, and for fewer than one node.
    """

    accelerators: str
    nodes: int
    price_row: str
    infra: str | None = None
    use_spot: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        if not _ACCELERATORS.match(self.accelerators):
            raise ComputeError(f"accelerators {self.accelerators!r} is not NAME:COUNT; write `CPU:2` or `H200:8`")
        if self.nodes < 1:
            raise ComputeError(f"nodes is {self.nodes}; a task needs at least one")

    @property
    def kind(self) -> str:
        """`CPU`, or the name of the accelerator."""
        return self.accelerators.partition(":")[0]

    @property
    def per_node(self) -> int:
        """Accelerators of one node; cores of one node for `CPU:n`."""
        return int(self.accelerators.partition(":")[2])

    @property
    def devices(self) -> int:
        """Accelerators over all nodes; cores for `CPU:n`."""
        return self.per_node * self.nodes

    @property
    def on_cpu(self) -> bool:
        """Whether no accelerator is asked for."""
        return self.kind == "CPU"


@dataclass(frozen=True)
class Task:
    """One command on hardware: `python -m module *arguments`, which fills `out` and writes `result.json` there last.

    `name` is the step path (`v2_0-tiny/dit_stage1`); the folder name of `out` is the digest of the step's inputs.
    `purpose` is the ledger's word for what the money is spent on; `tags` go to the run as they are. More than one of
    `processes` on a node are ranks of torchrun. A task that resumes where it stopped may be started again by itself, up
    to `retries` times, and its attempts share a parent run (None: it does not resume); one that is asked to stop has
    `grace_seconds` to save its place. Raises ComputeError for fewer than one process.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    out: Path
    resources: Resources
    purpose: str
    experiment: str
    tags: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1
    retries: int | None = None
    grace_seconds: float = GRACE_SECONDS

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.processes < 1:
            raise ComputeError(
                f"{self.name} asks for {self.processes} processes; a task needs at least one on each node"
            )

    @property
    def key(self) -> str:
        """Digest of the step's inputs: with `name`, what makes two attempts attempts at the same thing."""
        return self.out.name

    @property
    def finished(self) -> bool:
        """Whether `result.json` is there: a finished step is never launched again."""
        return (self.out / RESULT).is_file()

    def command(self, python: str, run_id: str, tracking_uri: str) -> tuple[str, ...]:
        """The argument list that runs this task on one node under `python` and logs to run `run_id`."""
        # What torch serves over TCP listens on every network of the host, so that its agent meets nobody but in a file.
        met = ("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-id", run_id)
        alone = ("--nnodes", "1", *met, "--local-addr", LOOPBACK, *self.torchrun)
        ranks = ("-m", "torch.distributed.run", *alone) if self.processes > 1 else ()
        return (python, *ranks, *self.program(run_id, tracking_uri))

    def program(self, run_id: str, tracking_uri: str) -> tuple[str, ...]:
        """What every process of this task runs, from `-m` on."""
        return ("-m", self.module, *self.arguments, "--run-id", run_id, "--tracking-uri", tracking_uri)

    @property
    def torchrun(self) -> tuple[str, ...]:
        """Options of torchrun: it starts nobody again (an attempt is a run), and hands on every wish to stop."""
        patience = max(1, int(self.grace_seconds) - TORCHRUN_MARGIN_SECONDS)
        return (
            *("--nproc-per-node", str(self.processes), "--max-restarts", "0"),
            *("--signals-to-handle", SIGNALS, "--shutdown-timeout", str(patience)),
        )


@dataclass(frozen=True)
class Handle:
    """What a launcher needs to find a task again: its own name and its own data, kept as a tag on the run."""

    launcher: str
    data: Mapping[str, Any]

    def to_json(self) -> str:
        """The handle as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The handle from `to_json`'s line; raises ComputeError when it is not one."""
        try:
            document = json.loads(text)
            return cls(launcher=document["launcher"], data=dict(document["data"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ComputeError(f"not a task handle: {text[:120]!r} ({error})") from error


@dataclass(frozen=True)
class TaskState:
    """Where a task stands. Times are seconds since the epoch; `ended` of a lost task is its last sign of life.

    `preempted` means that the machine was taken away; `lost` that the task is gone and left no record of its end.
    `reason` is what the task itself, or torchrun, said about its end.
    """

    status: Status
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    tail: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        """Check the status."""
        if self.status not in get_args(Status):
            raise ComputeError(f"status {self.status!r} is none of {', '.join(get_args(Status))}")

    @property
    def running(self) -> bool:
        """Whether the task may still change."""
        return self.status == "running"


class Launcher(Protocol):
    """Starts tasks and answers for them from their handles. Every method may raise ComputeError.

    `name` stands in every handle; `pause_seconds` is how long to wait between two polls at most.
    """

    @property
    def name(self) -> str:
        """Name of the launcher, as handles and settings write it."""
        ...

    @property
    def pause_seconds(self) -> float:
        """Longest pause between two polls."""
        ...

    def submit(self, task: Task, run_id: str, tracking_uri: str) -> Handle:
        """Start the task and return at once; the run id is the idempotency key."""
        ...

    def find(self, task: Task, run_id: str, started: float) -> Handle | None:
        """The handle of a run whose orchestrator died before it could write it down, if the task was started at all."""
        ...

    def poll(self, handle: Handle) -> TaskState:
        """Where the task stands now."""
        ...

    def cancel(self, handle: Handle) -> None:
        """Stop the task if it runs, and give its machine back if it has one of its own."""
        ...

    def log_tail(self, handle: Handle) -> str:
        """The last lines of the task's log."""
        ...


def last_lines(text: str, count: int = TAIL_LINES) -> str:
    """The last `count` lines of a log, without trailing space."""
    return "\n".join(text.rstrip().splitlines()[-count:])
