"""From noise to a sample, for every generation: Euler along a flow, ancestral steps, DPM-Solver++; with given frames.

Letters: B batch, C latent channels, t h w latent grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ml import processes
from ml.diffusion import conditions, dpm_solver, guidance, timesteps
from ml.diffusion.conditions import Given, Kind
from ml.diffusion.guidance import Call, Guided
from ml.diffusion.iddpm import Schedule
from ml.diffusion.means import per_frame
from ml.diffusion.process import build_process
from ml.diffusion.rectified_flow import RectifiedFlow
from ml.diffusion.timesteps import Shape
from ml.models.inputs import Inputs

Velocity = Callable[[Tensor, float, int], Tensor]
Progress = Callable[[int], None]
Fresh = Callable[[], Tensor]


class Noise:
    """Noise [B,*shape] on a device, drawn on the CPU from one generator a seed: `noise()` gives the next.

    A sample's noise therefore depends on its seed and not on its batch; the first draw is where sampling starts.
    """

    def __init__(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.shape, self.device = tuple(shape), device
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        """The next noise of every seed."""
        drawn = [torch.randn(*self.shape, generator=generator) for generator in self._generators]
        return torch.stack(drawn).to(self.device)


def noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Starting noise [B,*shape] on the CPU, one seed a sample."""
    return Noise(shape, seeds)()


@torch.no_grad()
def solve(velocity: Velocity, start: Tensor, grid: Tensor, progress: Progress | None = None) -> Tensor:
    """Euler from `start` [B,C,t,h,w] at grid[0] to grid[-1]: x += (t_next - t) velocity(x, t, index).

    `progress` is called after each step with the number of steps done.
    """
    x, times = start, grid.tolist()
    for index, (now, then) in enumerate(pairwise(times)):
        x = x + (then - now) * velocity(x, now, index)
        if progress is not None:
            progress(index + 1)
    return x


class Sampler:
    """How clips of one shape are sampled: solver, times, guidance, and what their `kind` is given.

    `kind` is the section's when None. `evaluations` counts the network's rows for one clip, `shift` how far its times
    are shifted. Raises ValueError when the solver is not the objective's, or there are more steps than were trained.
    """

    def __init__(
        self,
        objective: processes.IDDPM | processes.RectifiedFlow,
        sampling: processes.Sampling,
        shape: Shape,
        kind: Kind | None = None,
    ) -> None:
        processes.check_solver(objective, sampling)
        self.objective, self.sampling = objective, sampling
        self.kind = sampling.condition if kind is None else kind
        self.process = build_process(objective)
        self.shift = self.process.shift(shape) if sampling.flow_shift is None else sampling.flow_shift
        self.guidance = guidance.Guidance.of(objective, sampling)
        self.steps = guidance.plan(self.guidance, sampling.steps, self.kind, shape.latent_frames)
        self.evaluations = guidance.num_evaluations(self.steps)
        self.schedule = Schedule.of(objective) if isinstance(objective, processes.IDDPM) else None
        if self.schedule is not None and sampling.solver == "ddpm":
            self.schedule = self.schedule.respaced(sampling.steps)

    @torch.no_grad()
    def run(
        self,
        call: Call,
        fresh: Fresh,
        prompt: Inputs,
        null: Inputs,
        given: Given | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Samples [B,C,t,h,w]: `call(x, t, inputs)` is the network, `fresh()` the next noise (`Noise`).

        `prompt` and `null` (see `guidance.null_text`) are the inputs of B clips without given frames, which `given` (of
        B clips, or of one for all) adds; `progress` is told the steps done. Raises ValueError when the kind and `given`
        do not agree.
        """
        given = self._checked(given, len(prompt.text.context))
        guided = self._guided(call, prompt, null, given)
        if isinstance(self.process, RectifiedFlow):
            return self._euler(self.process, guided, fresh, given, progress)
        assert self.schedule is not None
        if self.sampling.solver == "dpm_solver":
            return self._dpm_solver(self.schedule, guided, fresh, progress)
        return self._ddpm(self.schedule, guided, fresh, given, progress)

    def _checked(self, given: Given | None, count: int) -> Given | None:
        if self.kind == "t2v":
            return None
        if given is None or given.kind != self.kind:
            has = "nothing is given" if given is None else f"{given.kind} is given"
            raise ValueError(f"sampling {self.kind} but {has}: place its references first, or sample t2v")
        return given.expand(count)

    def _guided(self, call: Call, prompt: Inputs, null: Inputs, given: Given | None) -> Guided:
        """1.3 goes on telling the network which frames would be given where it shows none of them; 2.0 does not."""
        nothing: Tensor | None = None
        if given is not None and self.kind != "mask":
            shown = given.condition.to(prompt.text.context.device)
            nothing = torch.zeros_like(shown)
            if self._law == "v1_3":
                nothing[:, 0] = shown[:, 0]
            prompt, null = (replace(part, condition=shown, given=given.indices) for part in (prompt, null))
        return Guided(call, self.guidance, self.steps, prompt, null, nothing)

    @property
    def _law(self) -> str:
        return "iddpm" if isinstance(self.objective, processes.IDDPM) else self.objective.law

    def _euler(
        self, process: RectifiedFlow, guided: Guided, fresh: Fresh, given: Given | None, progress: Progress | None
    ) -> Tensor:
        """Steps along the flow; frames of a mask join when its level is reached, with noise of that level (1.2)."""
        x = _started(fresh(), given)
        level = None if given is None or self.kind != "mask" else given.mask.double().to(x.device)
        joined = torch.zeros((), dtype=torch.bool) if level is None else level == 1
        for index, (now, then) in enumerate(pairwise(timesteps.grid(self.sampling.steps, self.shift).tolist())):
            times = torch.full((len(x),), now, dtype=torch.float64, device=x.device)
            active = None if level is None else level >= now
            if active is not None:
                x = torch.where(per_frame(active & ~joined, x), process.noisy(x, fresh(), times), x)
                joined = active
            elif self.sampling.sdedit and given is not None:
                again = process.noisy(given.latent.to(x), fresh(), times)
                x = torch.where(per_frame(given.mask == 0, x), again, x)
            output = guided(x, process.network_time(times), index, active)
            moved = x + (then - now) * process.velocity(output, x)
            x = moved if active is None else torch.where(per_frame(active, x), moved, x)
            if progress is not None:
                progress(index + 1)
        # 2.0 writes given pictures over the result, untouched (ou/sampling.py, main).
        return conditions.restore(x, given.condition.to(x)) if given is not None and self._restores else x

    @property
    def _restores(self) -> bool:
        return self._law == "v2_0" and self.kind.startswith("i2v")

    def _ddpm(
        self, schedule: Schedule, guided: Guided, fresh: Fresh, given: Given | None, progress: Progress | None
    ) -> Tensor:
        """Ancestral steps; a frame of a mask is kept above its level and noised at it, as 1.1 released it.

        At its level a frame is still told to be clean and is already updated; a level of 0 is reached at the last
        step, so a kept frame passes one step of least noise (p_sample, os/iddpm/gaussian_diffusion.py, 1.1).
        """
        x = _started(fresh(), given)
        level = None if given is None else (given.mask.float().to(x.device) * len(schedule)).int()
        for done, index in enumerate(reversed(range(len(schedule)))):
            here = torch.full((len(x),), index, device=x.device)
            before, active = x, None
            if level is not None:
                x = torch.where(per_frame(level == index, x), schedule.noisy(x, fresh(), here), x)
                active = level > index
            output = guided(x, schedule.steps.to(x.device)[here].float(), done, active)
            x = schedule.step(output, x, index, fresh())
            if level is not None:
                x = torch.where(per_frame(level < index, x), before, x)
            if progress is not None:
                progress(done + 1)
        return x

    def _dpm_solver(self, schedule: Schedule, guided: Guided, fresh: Fresh, progress: Progress | None) -> Tensor:
        def noise_of(x: Tensor, step: float, index: int) -> Tensor:
            return guided(x, torch.full((len(x),), step, device=x.device), index)[:, : x.shape[1]]

        return dpm_solver.solve(noise_of, fresh(), schedule, self.sampling.steps, progress)


def _started(start: Tensor, given: Given | None) -> Tensor:
    """Starting noise, with the latents of a mask in their places."""
    if given is None or given.kind != "mask":
        return start
    return torch.where(per_frame(given.mask < 1, start), given.latent.to(start), start)
