"""Tensors parked in the host's memory between the forward and the backward pass.

On a GPU they are copied to pinned memory and back on a stream of their own, beside the computing one; taking one starts
the way back of those parked just before it, which are the next that a backward pass asks for. On a CPU a tensor stays
where it is.
"""

from dataclasses import dataclass, field
from functools import cache
from weakref import ReferenceType, ref

import torch
from torch import Tensor

# A double block of the MMDiT has three inputs; the block before it should be on its way while this one computes.
AHEAD = 4


@dataclass(eq=False)
class Parked:
    """A tensor on the host: its copy, the device it came from, and what was parked there before it."""

    kept: Tensor
    device: torch.device
    before: "ReferenceType[Parked] | None" = None
    returning: Tensor | None = field(default=None, init=False)
    taken: bool = field(default=False, init=False)

    def start(self) -> None:
        """Let it set out for its device, unless it has."""
        if self.device.type == "cuda" and self.returning is None and not self.taken:
            with torch.cuda.stream(_stream(self.device)):
                self.returning = self.kept.to(self.device, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor, on its device again; a second time (a graph that is kept) it is copied once more."""
        if self.device.type != "cuda":
            return self.kept
        self.taken = False
        self.start()
        self._start_earlier()
        back, self.returning, self.taken = self.returning, None, True
        assert back is not None
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(_stream(self.device))
        back.record_stream(computing)
        return back

    def _start_earlier(self) -> None:
        earlier = self.before and self.before()
        for _ in range(AHEAD):
            if earlier:
                earlier.start()
                earlier = earlier.before and earlier.before()


_last: dict[torch.device, "ReferenceType[Parked]"] = {}


def park(tensor: Tensor) -> Parked:
    """Start to copy a tensor to the host; its memory on the device is free once nobody else holds it."""
    device = tensor.device
    if device.type != "cuda":
        return Parked(tensor.detach(), device)
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    kept = torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)
    with torch.cuda.stream(stream):
        kept.copy_(tensor.detach(), non_blocking=True)
    tensor.record_stream(stream)
    parked = Parked(kept, device, _last.get(device))
    _last[device] = ref(parked)
    return parked


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies: the way to the host and back are in order on it."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
