"""Which process a recipe's objective means."""

import torch

from ml import processes
from ml.diffusion.iddpm import IDDPM
from ml.diffusion.process import Process, Shape, build_process
from ml.diffusion.rectified_flow import RectifiedFlow

FLOW = processes.RectifiedFlow(law="v2_0", sigma_min=1e-5, shift=processes.LinearShift(), drop_context=0.3)


def test_the_section_chooses_the_process() -> None:
    assert isinstance(build_process(processes.IDDPM()), IDDPM)
    assert isinstance(build_process(FLOW), RectifiedFlow)


def test_every_process_trains_on_raw_outputs_of_one_shape() -> None:
    """A perfect prediction of either has no squared error; times are in the process's own unit."""
    shape, generator = Shape(17, 64, 64, 5, 16), torch.Generator().manual_seed(0)
    data, noise = (torch.randn(3, 4, 5, 2, 2, generator=generator) for _ in range(2))
    for section, exact in ((processes.IDDPM(), noise), (FLOW, (1 - 1e-5) * noise - data)):
        process: Process = build_process(section)
        times = process.draw(3, shape, generator)
        assert times.shape == (3,)
        assert process.network_time(times).dtype == torch.float32
        assert process.noisy(data, noise, times).shape == data.shape
        output = torch.cat([exact, torch.zeros_like(exact)], dim=1)
        assert process.losses(output, data, noise, times).shape == (3,)
        assert process.errors(output, data, noise, times).max() < 1e-9
    assert build_process(processes.IDDPM()).shift(shape) == 1.0
    assert build_process(FLOW).shift(shape) > 1.0
