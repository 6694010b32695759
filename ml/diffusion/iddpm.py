"""Denoising diffusion with a learned variance, as 1.0 and 1.1 train and sample it (arXiv 2102.09672; os/iddpm, 1.1).

Letters: B batch, C latent channels, t h w latent grid; i an index of a schedule's steps, 0 (least noise) to N - 1; a_i
the product of 1 - beta up to i. x_i = sqrt(a_i) x0 + sqrt(1 - a_i) eps. The network gives eps in the first C channels
and, in the other C, where the log variance of a step lies between the posterior's (-1) and beta's (+1).
"""

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ml import processes
from ml.diffusion.means import over_frames, per_frame, per_sample
from ml.diffusion.timesteps import Shape

# Half the width of a bin in the decoder's likelihood: values were read as 8-bit pixels in -1..1.
HALF_BIN = 1 / 255


@dataclass(frozen=True)
class Normal:
    """A normal distribution for every element: mean and log variance [B,C,t,h,w]."""

    mean: Tensor
    log_variance: Tensor


class Schedule:
    """Betas of N steps and all that follows from them, float64; `steps` [N] are the training steps they stand for."""

    def __init__(self, betas: Tensor, steps: Tensor, learned: bool) -> None:
        self.betas, self.steps, self.learned = betas, steps, learned
        self.kept = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1, dtype=betas.dtype), self.kept[:-1]])
        self.posterior = betas * (1 - before) / (1 - self.kept)
        # The first posterior variance is 0: its logarithm is taken from the second.
        first = self.posterior[1:2] if len(betas) > 1 else betas
        self.log_posterior = torch.log(torch.cat([first, self.posterior[1:]]))
        self.log_beta = torch.log(betas)
        self.log_fixed = torch.log(torch.cat([first, betas[1:]]))
        self.share_of_data = betas * before.sqrt() / (1 - self.kept)
        self.share_of_sample = (1 - before) * (1 - betas).sqrt() / (1 - self.kept)

    @classmethod
    def of(cls, section: processes.IDDPM) -> "Schedule":
        """The training schedule: betas rise linearly from `beta_start` to `beta_end`."""
        betas = torch.linspace(section.beta_start, section.beta_end, section.num_timesteps, dtype=torch.float64)
        return cls(betas, torch.arange(section.num_timesteps), section.learn_sigma)

    def respaced(self, count: int) -> "Schedule":
        """`count` of these steps, evenly spaced with both ends, whose betas give the same noise at each of them.

        Raises ValueError when there are fewer steps than that.
        """
        if count > len(self.betas):
            raise ValueError(f"{count} sampling steps of a process of {len(self.betas)}: use that many at most")
        # Summed as the released code sums it, so that halves round to the same step.
        places = accumulate([(len(self.betas) - 1) / max(1, count - 1)] * (count - 1), initial=0.0)
        steps = torch.tensor([round(place) for place in places])
        kept = self.kept[steps]
        before = torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
        return Schedule(1 - kept / before, self.steps[steps], self.learned)

    def __len__(self) -> int:
        return len(self.betas)

    def noisy(self, data: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """x_i of data and noise [B,...] at indices [B]."""
        kept = self._at(self.kept, index)
        return per_sample(kept.sqrt(), data) * data + per_sample((1 - kept).sqrt(), data) * noise

    def data(self, x: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """x0 of x_i and the noise that is in it, not clipped."""
        kept = self._at(self.kept, index)
        return per_sample((1 / kept).sqrt(), x) * x - per_sample((1 / kept - 1).sqrt(), x) * noise

    def before(self, data: Tensor, x: Tensor, index: Tensor) -> Normal:
        """q(x_{i-1} | x_i, x0), its log variance taken from step 1 at step 0."""
        mean = per_sample(self._at(self.share_of_data, index), x) * data
        mean = mean + per_sample(self._at(self.share_of_sample, index), x) * x
        return Normal(mean, per_sample(self._at(self.log_posterior, index), x).expand_as(x))

    def predicted(self, output: Tensor, x: Tensor, index: Tensor) -> Normal:
        """p(x_{i-1} | x_i) of a raw output [B,2C,t,h,w] (or [B,C,t,h,w] where the variance is not learned)."""
        noise = output[:, : x.shape[1]]
        mean = self.before(self.data(x, noise, index), x, index).mean
        if not self.learned:
            return Normal(mean, per_sample(self._at(self.log_fixed, index), x).expand_as(x))
        share = (output[:, x.shape[1] :] + 1) / 2
        low, high = (per_sample(self._at(table, index), x) for table in (self.log_posterior, self.log_beta))
        return Normal(mean, share * high + (1 - share) * low)

    def step(self, output: Tensor, x: Tensor, index: int, fresh: Tensor) -> Tensor:
        """One sampling step x_i -> x_{i-1} with fresh noise, which the last step (i = 0) does not add."""
        found = self.predicted(output, x, torch.full((len(x),), index, device=x.device))
        return found.mean + torch.exp(found.log_variance / 2) * fresh if index else found.mean

    def _at(self, table: Tensor, index: Tensor) -> Tensor:
        return table.to(index.device)[index]


class IDDPM:
    """The process of a recipe's section; its own times are the integer steps 0..N-1."""

    def __init__(self, section: processes.IDDPM) -> None:
        self.section, self.schedule = section, Schedule.of(section)

    def shift(self, shape: Shape) -> float:
        """Steps are drawn evenly, whatever the shape."""
        return 1.0

    def draw(self, count: int, shape: Shape, generator: torch.Generator) -> Tensor:
        """Training steps [B], each as likely as any."""
        return torch.randint(len(self.schedule), (count,), generator=generator, device=generator.device)

    def at(self, fraction: float, count: int, device: torch.device | str = "cpu") -> Tensor:
        """The same step [B] for every sample: the one that a fraction of the way to noise falls into."""
        return torch.full((count,), min(int(fraction * len(self.schedule)), len(self.schedule) - 1), device=device)

    def network_time(self, times: Tensor) -> Tensor:
        """What the network is told, float32 [B]: the step itself."""
        return times.float()

    def noisy(self, data: Tensor, noise: Tensor, times: Tensor, active: Tensor | None = None) -> Tensor:
        """x_i of [B,C,t,h,w]; frames that are not `active` [B,t] are taken at step 0, with the same noise (1.1)."""
        moved = self.schedule.noisy(data, noise, times)
        if active is None:
            return moved
        return torch.where(per_frame(active, data), moved, self.schedule.noisy(data, noise, torch.zeros_like(times)))

    def losses(
        self, output: Tensor, data: Tensor, noise: Tensor, times: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Squared error of the noise plus, where the variance is learned, its variational bound in bits; [B].

        The bound teaches the variance only: the predicted noise enters it without a gradient.
        """
        found = output[:, : data.shape[1]]
        loss = over_frames((found.float() - noise.float()).square(), weights)
        if not self.section.learn_sigma:
            return loss
        active = None if weights is None else weights > 0
        x = self.noisy(data, noise, times, active).float()
        frozen = torch.cat([found.detach(), output[:, data.shape[1] :]], dim=1).float()
        return loss + over_frames(self._bound(frozen, x, data.float(), times), weights)

    def errors(self, output: Tensor, data: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Mean squared error [B] of the noise over all frames: what networks are compared by."""
        return over_frames((output[:, : data.shape[1]].float() - noise.float()).square())

    def _bound(self, output: Tensor, x: Tensor, data: Tensor, times: Tensor) -> Tensor:
        """Bits of each element: the divergence from the posterior; at step 0, of the data under the prediction."""
        found = self.schedule.predicted(output, x, times)
        nats = divergence(self.schedule.before(data, x, times), found)
        first = (times == 0).reshape(-1, *(1,) * (x.ndim - 1))
        return torch.where(first, -log_likelihood(data, found), nats) / math.log(2)


def divergence(p: Normal, q: Normal) -> Tensor:
    """KL(p || q) of each element in nats."""
    spread = torch.exp(p.log_variance - q.log_variance)
    distance = (p.mean - q.mean).square() * torch.exp(-q.log_variance)
    return 0.5 * (q.log_variance - p.log_variance - 1 + spread + distance)


def log_likelihood(data: Tensor, found: Normal) -> Tensor:
    """Log probability of each element's bin, 2/255 wide; the outer bins are open (below -0.999 and above 0.999)."""
    inverse = torch.exp(-found.log_variance / 2)
    upper, lower = (_cumulative(inverse * (data - found.mean + side)) for side in (HALF_BIN, -HALF_BIN))
    chance = torch.where(data < -0.999, upper, torch.where(data > 0.999, 1 - lower, upper - lower))
    return torch.log(chance.clamp(min=1e-12))


def _cumulative(x: Tensor) -> Tensor:
    """The normal distribution function, in the tanh approximation that the released loss uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
