"""OpenSora-VAE 1.2: Stable Diffusion's autoencoder on every frame, then a causal temporal one on those latents.

Letters: B batch, C latent channels, T frames, H W pixels, t h w latent grid; h = H/8, w = W/8, and 17 frames (a micro
frame) at a time become 5 latent frames: t = 5 floor(T/17) + ceil((T mod 17)/4) (om/vae/vae.py, 1.2). Per-frame latents
y are 0.18215 x those of the 2-D part, which came from the SDXL autoencoder of PixArt-Sigma. Videos are in [-1, 1].
"""

from typing import Any

import torch
from torch import Tensor, nn

from ml.architectures import Latent, OpenSoraV12Net
from ml.models.autoencoders import carry
from ml.models.autoencoders import stable_diffusion as frames2d
from ml.models.autoencoders.autoencoder import Part, Passed, VideoAutoencoder, draw
from ml.models.autoencoders.opensora_v1_2_layers import CausalConv3d, Decoder, Encoder, ResBlock, TemporalAutoencoder
from ml.models.autoencoders.original_names import read

# How raw z becomes what STDiT-3 sees, (z - mean) / std (om/vae/vae.py, 1.2, `shift` and `scale`).
RELEASED = Latent(mean=(-0.10, 0.34, 0.27, 0.98), std=(3.85, 2.32, 2.33, 3.06))


class SpatialAutoencoder(nn.Module):
    """The 2-D part (`spatial_vae.module.*`): y [B,C,T,h,w] of a video and back, `micro_batch_size` frames at a time."""

    def __init__(self, config: OpenSoraV12Net) -> None:
        super().__init__()
        self.module = frames2d.kl_network(config)
        self.micro_batch_size = config.micro_batch_size

    def encode(self, video: Tensor) -> Tensor:
        """Posterior means y of a video [B,3,T,H,W]."""
        return frames2d.SCALE * frames2d.encode_frames(self.module, video, self.micro_batch_size)[0]

    def sample(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Posterior samples y of a video [B,3,T,H,W]."""
        return frames2d.SCALE * frames2d.sample_frames(self.module, video, self.micro_batch_size, generator)

    def decode(self, y: Tensor) -> Tensor:
        """Video [B,3,T,H,W] of y."""
        return frames2d.decode_frames(self.module, y / frames2d.SCALE, self.micro_batch_size)


class OpenSoraV12Network(nn.Module):
    """The released `VideoAutoencoderPipeline`: both parts, and the buffers `shift` and `scale` [1,C,1,1,1].

    `encode` and `decode` are the released ones: both posteriors are sampled, and the buffers normalise.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: OpenSoraV12Net) -> None:
        super().__init__()
        self.spatial_vae = SpatialAutoencoder(config)
        self.temporal_vae = TemporalAutoencoder(config)
        self.micro_frame_size = config.micro_frame_size
        self.register_buffer("scale", torch.ones(1, config.latent_channels, 1, 1, 1))
        self.register_buffer("shift", torch.zeros(1, config.latent_channels, 1, 1, 1))

    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalised posterior sample [B,C,t,h,w] of a video [B,3,T,H,W], its noise in the order of the original."""
        chunks = self._micro_frames(self.spatial_vae.sample(video, generator))
        samples = [draw(*self.temporal_vae.encode(chunk), generator) for chunk in chunks]
        return (torch.cat(samples, dim=2) - self.shift) / self.scale

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Video [B,3,T,H,W] of a normalised z, T = `num_frames`."""
        z = z * self.scale.to(z.dtype) + self.shift.to(z.dtype)
        return self.spatial_vae.decode(self.inflate(z, num_frames))

    def moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of raw z [B,C,t,h,w], micro frame by micro frame."""
        parts = [self.temporal_vae.encode(chunk) for chunk in self._micro_frames(y)]
        mean, logvar = zip(*parts, strict=True)
        return torch.cat(mean, dim=2), torch.cat(logvar, dim=2)

    def inflate(self, z: Tensor, num_frames: int) -> Tensor:
        """Per-frame latents y [B,C,T,h,w] of raw z, micro frame by micro frame."""
        size = self.micro_frame_size or num_frames
        chunks = torch.split(z, -(-size // self.temporal_vae.stride), dim=2)
        counts = [min(size, num_frames - start) for start in range(0, num_frames, size)]
        parts = [self.temporal_vae.decode(chunk, count) for chunk, count in zip(chunks, counts, strict=True)]
        return torch.cat(parts, dim=2)

    def _micro_frames(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.split(y, self.micro_frame_size or y.shape[2], dim=2)


class OpenSoraV12Autoencoder(VideoAutoencoder):
    """OpenSora-VAE 1.2; `net` has the released names, and `latent` is `RELEASED` unless it is given.

    393.3M parameters by the released code, 83.7M of them in the 2-D part; docs/report_03.md (1.2) says 384M.

    `latent` alone normalises in the house's `encode` and `decode`, which work on raw z and never touch the buffers.
    Setting `latent` writes the buffers (shift = mean, scale = std / latent.scale), so that exported weights say the
    same to the original code, and `net.encode` to a reader; loading weights changes the buffers only.

    Fields may have the original's names (original_names.py); `freeze_vae_2d` is `train_only("temporal")`.
    """

    net: OpenSoraV12Network
    least_side_px = frames2d.SPATIAL_STRIDE

    def __init__(self, net: OpenSoraV12Net | None = None, latent: Latent | None = None, **hyper: Any) -> None:
        super().__init__()
        given = read(OpenSoraV12Net, net, hyper)
        self.config = given.net
        self.latent_channels = self.config.latent_channels
        self.net = OpenSoraV12Network(self.config)
        self.temporal_stride, self.spatial_stride = self.net.temporal_vae.stride, frames2d.SPATIAL_STRIDE
        self.latent = latent or given.latent or RELEASED
        self._part: Part = "all"
        self.tile(False)
        if given.frozen_2d:
            self.train_only("temporal")

    @property
    def latent(self) -> Latent:
        """How raw z is normalised."""
        return self._latent

    @latent.setter
    def latent(self, latent: Latent) -> None:
        channels = self.latent_channels
        if any(len(values) not in (0, channels) for values in (latent.mean, latent.std)):
            raise ValueError(f"latent has {len(latent.mean)} means and {len(latent.std)} stds for {channels} channels")
        self._latent = latent
        for buffer, values in (
            (self.net.shift, latent.mean or (0.0,) * channels),
            (self.net.scale, tuple(std / latent.scale for std in latent.std or (1.0,) * channels)),
        ):
            buffer.copy_(torch.tensor(values)[None, :, None, None, None])

    def forward(self, video: Tensor, generator: torch.Generator | None = None) -> Passed:
        """Training form: both posteriors are sampled; `inner` is (y, its reconstruction), to compare in y space.

        The moments cover every micro frame (the original keeps those of the last one, and trains on one or two). While
        only the spatial part trains, the temporal one is left out.
        """
        if self._part == "spatial":
            return self.forward_spatial(video, generator)
        self.admit(video)
        inner = self.net.spatial_vae.sample(video, generator)
        mean, logvar = self.net.moments(inner)
        sample = draw(mean, logvar, generator)
        rebuilt = self.net.inflate(sample, video.shape[2])
        return Passed(self.net.spatial_vae.decode(rebuilt), mean, logvar, sample, (inner, rebuilt))

    def forward_spatial(self, video: Tensor, generator: torch.Generator | None = None) -> Passed:
        """Training form of the 2-D part alone, on every frame; its moments and sample [B,C,T,h,w] are not scaled."""
        self.admit(video)
        part = self.net.spatial_vae
        mean, logvar = frames2d.encode_frames(part.module, video, part.micro_batch_size)
        sample = draw(mean, logvar, generator)
        return Passed(frames2d.decode_frames(part.module, sample, part.micro_batch_size), mean, logvar, sample)

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of raw z, both [B,C,t,h,w], of the mean y; ValueError below 8 pixels."""
        self.admit(video)
        return self.net.moments(self.net.spatial_vae.encode(video))

    def rebuild(self, z: Tensor, frames: int) -> Tensor:
        """Video [B,3,T,H,W] of raw z [B,C,t,h,w]; ValueError when so many frames have other than t latents."""
        if self.latent_frames(frames) != z.shape[2]:
            raise ValueError(f"{frames} frames have {self.latent_frames(frames)} latent frames, not {z.shape[2]}")
        return self.net.spatial_vae.decode(self.net.inflate(z, frames))

    def latent_frames(self, frames: int) -> int:
        """Latent frames of T frames, 5 for each 17 and a quarter of the rest, rounded up; ValueError below one.

        Without micro frames a quarter of them all.
        """
        if frames < 1:
            raise ValueError(f"cannot encode {frames} frames: a clip has at least one")
        size, stride = self.config.micro_frame_size or frames, self.temporal_stride
        whole, rest = divmod(frames, size)
        return whole * -(-size // stride) + -(-rest // stride)

    def tile(self, enabled: bool) -> None:
        """Switch tiling of frames above 512 px in the 2-D part; time always goes by micro frames."""
        frames2d.tile_frames(self.net.spatial_vae.module, enabled)

    def initialise(self) -> None:
        """Weights to train a small network from: the mean colours of 8x8 pixels of every fourth frame, and lines."""
        initialise(self.net)

    def train_only(self, part: Part) -> None:
        """Choose what trains, by `requires_grad`: both parts, the temporal or the spatial one."""
        self._part = part
        self.net.spatial_vae.requires_grad_(part in ("all", "spatial"))
        self.net.temporal_vae.requires_grad_(part in ("all", "temporal"))


@torch.no_grad()
def initialise(net: OpenSoraV12Network) -> None:
    """Weights to train both parts from nothing; nothing is drawn on the meta device.

    The 2-D part starts as in stable_diffusion.py. The temporal one starts (see carry.py) by keeping every fourth frame,
    the last of its latent's four, and drawing straight lines between them, in every latent channel; its raw z are those
    of the 2-D part, before 0.18215. Where zeros pad T in front, the frames they touch are the ones that are cut off,
    for T = 4k + 1, and fade in otherwise.
    """
    channels = net.shift.shape[1]
    frames2d.initialise(net.spatial_vae.module, channels)
    temporal = net.temporal_vae
    carry.soften(temporal)
    for module in temporal.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.conv.weight)
    carry.quiet(temporal.quant_conv.conv, channels)
    for channel in range(channels):
        carry.connect(temporal.quant_conv.conv, channel, channel, 1.0)
        carry.connect(temporal.post_quant_conv.conv, channel, channel, 1.0)
    _carry_down(temporal.encoder, channels)
    _carry_up(temporal.decoder, channels)


def _carry_down(encoder: Encoder, channels: int) -> None:
    norm = encoder.norm1
    lanes = carry.lanes(channels, norm.num_channels // norm.num_groups, encoder.conv_in.conv.out_channels)
    if lanes is None:
        return
    carry.scatter(encoder.conv_in.conv, lanes, 1 / frames2d.SCALE)
    for convolution in (*_shortcuts(encoder), *_resamplers(encoder)):
        carry.keep(convolution, lanes)
    carry.gather(encoder.conv2.conv, lanes)


def _carry_up(decoder: Decoder, channels: int) -> None:
    norm = decoder.norm1
    lanes = carry.lanes(channels, norm.num_channels // norm.num_groups, norm.num_channels)
    if lanes is None:
        return
    carry.scatter(decoder.conv1.conv, lanes)
    for convolution in _shortcuts(decoder):
        carry.keep(convolution, lanes)
    for convolution in _resamplers(decoder):
        carry.keep_doubled(convolution, lanes)
    carry.gather(decoder.conv_out.conv, lanes, frames2d.SCALE)


def _shortcuts(side: nn.Module) -> list[nn.Conv3d]:
    return [m.conv3.conv for m in side.modules() if isinstance(m, ResBlock) and hasattr(m, "conv3")]


def _resamplers(side: Encoder | Decoder) -> list[nn.Conv3d]:
    return [m.conv for m in side.conv_blocks if isinstance(m, CausalConv3d)]
