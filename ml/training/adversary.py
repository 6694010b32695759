"""The discriminator of an adversarial term with its own optimizer: judges, learns, and resumes exactly."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW

from ml.engines.protocol import Engine
from ml.models.discriminator import PatchDiscriminator, discriminator_hinge
from ml.reconstruction import Adversarial

WEIGHTS, OPTIMIZER = "adversary.safetensors", "adversary.pt"


class AdversaryError(ValueError):
    """A saved adversary that is missing or another one, with what to do."""


class Adversary:
    """A discriminator in fp32 and its AdamW; its batch norms always take the statistics of the batch.

    The weights are drawn from `seed` alone, so that every rank starts with the same.
    """

    def __init__(self, section: Adversarial, seed: int) -> None:
        self.section = section
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.network = PatchDiscriminator(section.layers, section.channels, section.dropout)
        self.optimizer = AdamW(
            self.network.parameters(),
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
        )

    def judge(self, video: Tensor) -> Tensor:
        """Logits of a video [B,3,T,H,W] in fp32, for the generator: gradients flow to the video, not to the weights."""
        self._place(video.device)
        self.network.requires_grad_(False)
        logits: Tensor = self.network(video)
        self.network.requires_grad_(True)
        return logits

    def learn(self, real: Tensor, fake: Tensor, engine: Engine) -> float:
        """One update to tell the two apart, with the mean gradient of all ranks; returns the loss before it.

        Where the loss or the gradient is not finite on any rank, nothing is learned on all of them. Together.
        """
        self._place(real.device)
        loss = discriminator_hinge(self.network(real), self.network(fake))
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = list(self.network.parameters())
        engine.average([_present(parameter) for parameter in parameters])
        norm = nn.utils.clip_grad_norm_(parameters, self.section.grad_clip)
        if all(map(math.isfinite, engine.total([float(loss.detach()), float(norm)]))):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Network and optimizer."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both back; raises AdversaryError when the network has other names or shapes."""
        try:
            self.network.load_state_dict(state["network"])
        except RuntimeError as error:
            raise AdversaryError(
                f"the saved discriminator is another one than the recipe's: train into another folder, or restore "
                f"loss.adversarial ({error})"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self, folder: Path) -> None:
        """Write `adversary.safetensors` and `adversary.pt`."""
        state = self.state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state["network"].items()}, folder / WEIGHTS)
        torch.save(state["optimizer"], folder / OPTIMIZER)

    def load(self, folder: Path) -> None:
        """Take them back; raises AdversaryError when a file is missing, or holds another network."""
        for name in (WEIGHTS, OPTIMIZER):
            if not (folder / name).is_file():
                raise AdversaryError(f"{folder} lacks {name}: the run it belongs to had no adversary; start afresh")
        optimizer = torch.load(folder / OPTIMIZER, "cpu", weights_only=True)
        self.load_state_dict({"network": load_file(folder / WEIGHTS), "optimizer": optimizer})

    def _place(self, device: torch.device) -> None:
        if next(self.network.parameters()).device != device:
            self.network.to(device)
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # moments go where their weights are


def _present(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # every weight of the discriminator has a part in its loss
    return parameter.grad
