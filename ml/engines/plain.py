"""The plain engine: one device, no process group. The embedded default, and the reference for every other engine.

In bf16 the model's weights are bf16 and the masters fp32, as ZeRO does it: gradients are added up in fp32, the update
is made on the masters, and the weights are their rounded copy.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ml.engines.protocol import Engine, EngineError, MakeOptimizer, MakeScheduler, Tensors
from ml.methods import Engine as EngineSection
from ml.sections import Compute

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PlainEngine:
    """One device in fp32, or in bf16 with fp32 masters. See `ml.engines.protocol.Engine` for what each method does."""

    is_main, data_rank, data_size = True, 0, 1
    model: nn.Module

    def __init__(self, device: torch.device, dtype: torch.dtype, grad_clip: float) -> None:
        self.device, self.dtype, self.grad_clip = device, dtype, grad_clip
        self._masters: dict[str, nn.Parameter] = {}
        self._optimizer: Optimizer
        self._scheduler: LRScheduler

    def setup(self, model: nn.Module, optimizer: MakeOptimizer, scheduler: MakeScheduler) -> None:
        """Take the model (fp32 weights) to the device and dtype, and make optimizer and schedule over its masters."""
        model.to(self.device)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.dtype == torch.float32:
            self._masters = trained
        else:
            self._masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in trained.items()}
            model.to(self.dtype)
        self.model = model
        self._optimizer = optimizer(self._masters.values())
        self._scheduler = scheduler(self._optimizer)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Nothing to synchronise on one device."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients to the masters', in fp32."""
        loss.backward()  # type: ignore[no-untyped-call]
        if self.dtype == torch.float32:
            return
        for name, weight in self._weights().items():
            if weight.grad is None:
                continue
            master = self._masters[name]
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

    def step(self) -> float:
        """Clip, update, advance the schedule, clear the gradients; returns the gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self._masters.values(), self.grad_clip)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._publish()
        return float(norm)

    def learning_rate(self) -> float:
        """The rate that the next step uses."""
        return float(self._scheduler.get_last_lr()[0])

    def mean(self, value: float) -> float:
        """The value: there is one rank."""
        return value

    def masters(self) -> Tensors:
        """The live fp32 weights by name."""
        return {name: p.detach() for name, p in self._masters.items()}

    def gather(self, shards: Mapping[str, Tensor]) -> Tensors:
        """Copies on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in shards.items()}

    def scatter(self, full: Mapping[str, Tensor]) -> Tensors:
        """Copies on the device."""
        return {name: tensor.to(self.device, copy=True) for name, tensor in full.items()}

    def save(self, folder: Path) -> None:
        """Write `master.safetensors`, `optimizer/state.pt` and `scheduler.pt`."""
        (folder / "optimizer").mkdir(parents=True, exist_ok=True)
        save_file(
            {name: t.contiguous() for name, t in self.gather(self.masters()).items()}, folder / "master.safetensors"
        )
        torch.save(self._optimizer.state_dict(), folder / "optimizer" / "state.pt")
        torch.save(self._scheduler.state_dict(), folder / "scheduler.pt")

    def load(self, folder: Path) -> None:
        """Take them back; raises EngineError when the weights are of another network."""
        saved = load_file(folder / "master.safetensors")
        wanted = {name: tuple(p.shape) for name, p in self._masters.items()}
        found = {name: tuple(t.shape) for name, t in saved.items()}
        if wanted != found:
            name = next(n for n in sorted({*wanted, *found}) if wanted.get(n) != found.get(n))
            raise EngineError(f"{folder} holds {name} as {found.get(name)}, the model has {wanted.get(name)}")
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(saved[name])
        self._publish()
        self._optimizer.load_state_dict(torch.load(folder / "optimizer" / "state.pt", self.device, weights_only=True))
        self._scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing is held."""

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the masters into the model's weights."""
        if self.dtype != torch.float32:
            for name, weight in self._weights().items():
                weight.copy_(self._masters[name])


def make_engine(section: EngineSection, compute: Compute) -> Engine:
    """The engine that a recipe asks for, on the hardware that it asks for.

    Raises EngineError when the plain engine cannot serve: sequence parallelism, several GPUs or processes, or no such
    device here.
    """
    if section.sequence_parallel > 1:
        raise EngineError(
            f"engine plain keeps sequences on one device; sequence_parallel is {section.sequence_parallel}: set it to 1"
        )
    # torchrun announces its process group in this variable: reading it is how a process learns that it is not alone.
    world = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else 1
    if world > 1:
        raise EngineError(f"engine plain drives one process, {world} were started: start one, without torchrun")
    if not compute.accelerators.startswith("CPU:") and compute.devices > 1:
        raise EngineError(
            f"engine plain drives one GPU, compute asks for {compute.accelerators} on {compute.nodes} node(s)"
        )
    return PlainEngine(device_of(compute), DTYPES[section.precision], section.grad_clip)


def device_of(compute: Compute) -> torch.device:
    """The first device of the hardware that a recipe asks for; on a CPU, torch is given that many threads.

    Raises EngineError when there is no such device here.
    """
    if compute.accelerators.startswith("CPU:"):
        torch.set_num_threads(compute.devices)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EngineError(f"compute asks for {compute.accelerators}, and torch sees no CUDA device here")
    return torch.device("cuda")
