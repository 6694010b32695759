"""What networks are told, and the two turns between the house's inputs and a network's own forward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml.models.inputs import Inputs, Text, denoise


def text(count: int, value: float = 1.0) -> Text:
    mask = torch.tensor([True, True, False]).expand(count, 3)
    return Text(torch.full((count, 3, 5), value), torch.full((count, 2), value), mask)


def inputs(count: int, value: float = 1.0, **more: Any) -> Inputs:
    return Inputs(text(count, value), height=48, width=80, frames=5, fps=torch.full((count,), value), **more)


def test_text_moves_its_floats_and_keeps_its_mask_true_or_false() -> None:
    moved = text(2).to("cpu", torch.bfloat16)
    assert (moved.context.dtype, moved.pooled.dtype, moved.mask.dtype) == (torch.bfloat16, torch.bfloat16, torch.bool)


def test_one_text_serves_many_samples() -> None:
    wide = text(1).expand(4)
    assert (wide.context.shape, wide.pooled.shape, wide.mask.shape) == ((4, 3, 5), (4, 2), (4, 3))


def test_stacked_inputs_are_the_batches_after_each_other() -> None:
    conditions = [torch.full((2, 4, 2, 6, 10), float(value)) for value in (1, 2)]
    active = torch.tensor([[True, False]]).expand(2, 2)
    rows = [
        inputs(2, value, condition=c, active=active, given=(0,)) for value, c in zip((1, 2), conditions, strict=True)
    ]
    both = Inputs.stack(rows)
    assert both.text.context[:, 0, 0].tolist() == both.fps.tolist() == [1, 1, 2, 2]
    assert both.text.mask.shape == (4, 3)
    assert both.condition is not None
    assert both.condition[:, 0, 0, 0, 0].tolist() == [1, 1, 2, 2]
    assert both.active is not None
    assert both.active.shape == (4, 2)
    assert (both.height, both.width, both.frames, both.given) == (48, 80, 5, (0,))


def test_inputs_without_a_condition_stay_without() -> None:
    both = Inputs.stack([inputs(1), inputs(1)])
    assert both.condition is both.active is None


def test_a_batch_is_given_something_or_nothing_as_a_whole() -> None:
    some = inputs(1, condition=torch.zeros(1, 4, 2, 6, 10))
    with pytest.raises(ValueError, match="must all have a condition, or none"):
        Inputs.stack([some, inputs(1)])


class Network(nn.Module):
    """A forward with names of its own, and an output in another layout than the house's."""

    def forward(self, latent: Tensor, timestep: Tensor, size: int) -> Tensor:
        return (latent * size + timestep[:, None, None, None, None]).transpose(1, 2)

    def arguments(self, x: Tensor, t: Tensor, inputs: Inputs) -> dict[str, Any]:
        return {"latent": x, "timestep": t, "size": inputs.height}

    def result(self, output: Tensor, x: Tensor) -> Tensor:
        return output.transpose(1, 2)


class Wrapped(nn.Module):
    """What an engine does to a network: another module in front of it, whose forward is all there is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = module, 0

    def forward(self, **arguments: Any) -> Tensor:
        self.calls += 1
        return self.inner(**arguments)


def test_a_wrapped_network_is_called_through_its_wrapper() -> None:
    network, x, t = Network(), torch.randn(2, 4, 3, 6, 10), torch.tensor([1.0, 2.0])
    wrapped = Wrapped(network)
    found = denoise(wrapped, network, x, t, inputs(2))  # type: ignore[arg-type]
    assert wrapped.calls == 1
    torch.testing.assert_close(found, 48 * x + t[:, None, None, None, None])
