"""The multi-modal diffusion transformer of Open-Sora 2.0: a velocity for every latent, given time, text and condition.

Letters: B batch, C latent channels, t h w latent grid, p patch, L visual tokens, S text tokens, W width, D head size, P
pooled text size. Parameters carry the names of the original (om/mmdit/model.py, main), so `Open_Sora_v2.safetensors`
(`fused_qkv: false`) and Flux's weights (`fused_qkv: true`, `use_liger_rope: false`) load strictly.
"""

from typing import Any, TypedDict, Unpack, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from ml.architectures import MMDiT as MMDiTSection
from ml.architectures import hyper_of
from ml.models.inputs import Inputs
from ml.models.layers import MLPEmbedder, Modulation, timestep_embedding
from ml.models.mmdit_blocks import DoubleBlock, FinalLayer, Rope, SingleBlock
from ml.models.positional import named
from ml.models.recompute import Recompute
from ml.models.rope import positions, rope_angles
from ml.models.sequence import PlainSequence, SequenceParallel, Shared
from ml.models.weights import Card, Origin

TIME_FEATURES = 256


class Conditions(TypedDict, total=False):
    """Further arguments of the forward, under the original's names and in its order.

    `cond` [B,L,C p p + p p] is the mask and the masked latent, packed (absent or None = nothing is given, where the
    original refuses); `guidance` [B] is for a guidance-distilled network. Others are taken and ignored, as by the
    original.
    """

    cond: Tensor | None
    guidance: Tensor | None


class MMDiT(nn.Module):
    """The network: `MMDiT(section)`, or `MMDiT(depth=19, ...)` under the original's names; random until loaded.

    `checkpoint_blocks` = how many double and single blocks recompute their activations in backward; it starts as
    `grad_ckpt_settings` (none where that is None), and `recompute` says how. `sp` is the seam of sequence-parallel
    engines: it cuts the text and the picture, each by itself, and a rank's blocks see its shares of both.
    """

    def __init__(self, config: MMDiTSection | None = None, **hyper: Any) -> None:
        super().__init__()
        self.config = config = config or hyper_of(MMDiTSection, hyper)
        self.checkpoint_blocks = config.grad_ckpt_settings or (0, 0)
        self.recompute = Recompute()
        self.sp: SequenceParallel = PlainSequence()
        width, token = config.hidden_size, config.in_channels
        self.img_in = nn.Linear(token, width)
        self.time_in = MLPEmbedder(TIME_FEATURES, width)
        self.vector_in = MLPEmbedder(config.vec_in_dim, width)
        self.guidance_in = MLPEmbedder(TIME_FEATURES, width) if config.guidance_embed else None
        self.cond_in = nn.Linear(token + config.patch_size**2, width) if config.cond_embed else None
        self.txt_in = nn.Linear(config.context_in_dim, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = FinalLayer(width, token)
        initialise(self)

    def card(self, origin: Origin) -> Card:
        """What `model.json` says about this network."""
        return Card("mmdit", {**self.config.model_dump(mode="json")}, origin)

    @property
    def null_context(self) -> Tensor | None:
        """None: no text is the empty text, encoded like any other."""
        return None

    def arguments(self, x: Tensor, t: Tensor, inputs: Inputs) -> dict[str, Any]:
        """Keywords of `forward` for latents x [B,C,t,h,w] at t [B]; h and w are multiples of the patch.

        Text sits at position (0,0,0) and all of its tokens are attended, padding too, as in training (the original
        never masks). A network with a condition is told zeros where nothing is given.
        """
        patch, text = self.config.patch_size, inputs.text
        context = text.context.to(x.dtype)
        frames, height, width = x.shape[2:]
        grid = positions((frames, height // patch, width // patch), x.device)
        condition, guidance = None, None
        if self.cond_in is not None:
            empty = x.new_zeros(x.shape[0], x.shape[1] + 1, *x.shape[2:])
            condition = pack(empty if inputs.condition is None else inputs.condition.to(x.dtype), patch)
        if self.guidance_in is not None and inputs.guidance is not None:
            guidance = torch.full_like(t, inputs.guidance)
        return {
            "img": pack(x, patch),
            "img_ids": grid.expand(x.shape[0], -1, -1),
            "txt": context,
            "txt_ids": grid.new_zeros(1, 1, 3).expand(*context.shape[:2], -1),
            "timesteps": t,
            "y_vec": text.pooled.to(x.dtype),
            "cond": condition,
            "guidance": guidance,
        }

    def result(self, output: Tensor, x: Tensor) -> Tensor:
        """What `forward` gave, as a velocity [B,C,t,h,w] of the latents x."""
        return unpack(output, tuple(x.shape[2:]), self.config.patch_size)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        *more: Tensor | None,
        **others: Unpack[Conditions],
    ) -> Tensor:
        """Velocity of the flow for every visual token: [B,L,C p p].

        img [B,L,C p p] at positions img_ids [B,L,3], txt [B,S,context] at txt_ids [B,S,3], timesteps [B] in 0..1 (1 is
        noise), y_vec [B,P] the pooled text, and `Conditions`. Raises ValueError when a distilled network gets no
        guidance.
        """
        conditions = cast(Conditions, named(tuple(Conditions.__annotations__), more, others))
        vec = self._vec(timesteps, y_vec, conditions.get("guidance"), img.dtype)
        shared, cond = Shared(self.sp, (txt.shape[1], img.shape[1])), conditions.get("cond")
        # Cut before they are embedded: no rank ever holds all tokens at the network's width.
        img = self._embed(self.sp.split(img, dim=1), None if cond is None else self.sp.split(cond, dim=1))
        txt = self.txt_in(self.sp.split(txt, dim=1))
        rope = self._rope(torch.cat([self.sp.split(txt_ids, dim=1), self.sp.split(img_ids, dim=1)], dim=1), img.dtype)
        for index, block in enumerate(self.double_blocks):
            img, txt = self.recompute.run(block, index < self.checkpoint_blocks[0], img, txt, vec, rope, shared)
        joint, num_text = torch.cat([txt, img], dim=1), txt.shape[1]
        for index, block in enumerate(self.single_blocks):
            joint = self.recompute.run(block, index < self.checkpoint_blocks[1], joint, vec, rope, shared)
        return self.sp.gather(self.final_layer(joint[:, num_text:], vec), 1, shared.tokens[1])

    def _vec(self, t: Tensor, pooled: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        vec: Tensor = self.time_in(timestep_embedding(t, TIME_FEATURES).to(dtype))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this network is guidance-distilled (guidance_embed: true): pass guidance [B]")
            vec = vec + self.guidance_in(timestep_embedding(guidance, TIME_FEATURES).to(dtype))
        pooled_vec: Tensor = self.vector_in(pooled)
        return vec + pooled_vec

    def _embed(self, img: Tensor, cond: Tensor | None) -> Tensor:
        embedded: Tensor = self.img_in(img)
        if self.cond_in is None:
            return embedded
        if cond is None:
            cond = img.new_zeros(*img.shape[:2], self.cond_in.in_features)
        conditioned: Tensor = embedded + self.cond_in(cond)
        return conditioned

    def _rope(self, ids: Tensor, dtype: torch.dtype) -> Rope:
        angles = rope_angles(ids, self.config.axes_dim, self.config.theta)[:, None]
        wide = torch.promote_types(dtype, torch.float32)
        return Rope(angles.cos().to(wide), angles.sin().to(wide), self.config.use_liger_rope)


def initialise(network: MMDiT) -> None:
    """Xavier-uniform weights and zero biases; modulations, condition and last projection start at zero.

    A fresh network therefore says velocity 0, ignores its condition, and learns both from the first steps (adaLN-Zero,
    arXiv 2212.09748; the zero `cond_in` is Open-Sora 2.0's, om/mmdit/model.py, main). Fused projections are drawn part
    by part, so both layouts start alike.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            width, fused = module.in_features, name.rpartition(".")[2] in ("qkv", "linear1")
            for part in module.weight.data.tensor_split([width, 2 * width] if fused else []):
                nn.init.xavier_uniform_(part)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    silent = [m.lin for m in network.modules() if isinstance(m, Modulation)]
    silent.append(network.final_layer.linear)
    silent += [m for m in network.final_layer.adaLN_modulation if isinstance(m, nn.Linear)]
    silent += [network.cond_in] if network.cond_in is not None else []
    for layer in silent:
        nn.init.zeros_(layer.weight)


def pack(x: Tensor, patch: int) -> Tensor:
    """Latents to tokens: [B,C,t,h,w] -> [B, t h/p w/p, C p p], channel slowest."""
    return rearrange(x, "b c t (h ph) (w pw) -> b (t h w) (c ph pw)", ph=patch, pw=patch)


def unpack(tokens: Tensor, grid: tuple[int, ...], patch: int) -> Tensor:
    """Tokens back to latents of grid (t, h, w): the inverse of `pack`."""
    frames, height, width = grid
    sizes = {"t": frames, "h": height // patch, "w": width // patch, "ph": patch, "pw": patch}
    return rearrange(tokens, "b (t h w) (c ph pw) -> b c t (h ph) (w pw)", **sizes)
