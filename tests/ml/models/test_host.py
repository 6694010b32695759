"""Tensors come back from the host as they went."""

import pytest
import torch

from ml.models.host import Parked, park


def test_a_cpu_tensor_stays_where_it_is_and_keeps_no_graph() -> None:
    x = torch.randn(3, 4, requires_grad=True) * 2
    parked = park(x)
    parked.start()
    assert parked.take().data_ptr() == x.data_ptr()
    assert not parked.take().requires_grad


@pytest.mark.gpu
def test_a_gpu_tensor_leaves_the_device_and_comes_back_whole() -> None:
    torch.cuda.empty_cache()
    wanted = [torch.randn(1 << 20).view(1024, 1024).t() for _ in range(6)]
    there = [x.to("cuda") for x in wanted]
    held = torch.cuda.memory_allocated()
    parked = [park(x) for x in there]
    strides = [x.stride() for x in there]
    del there
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held - 6 * (4 << 20)
    assert all(one.kept.is_pinned() for one in parked)
    for one, x, stride in reversed(list(zip(parked, wanted, strides, strict=True))):
        back = Parked.take(one)
        assert back.is_cuda
        assert back.stride() == stride
        assert torch.equal(back.cpu(), x)
    assert torch.equal(parked[0].take().cpu(), wanted[0]), "a second time, for a graph that is kept"
