"""Tensor parallelism: the wide layers of a network cut over neighbouring ranks, each of which computes its share.

Attention is cut by heads and an MLP by its hidden lanes: the layers into them are cut by columns (outputs), the layers
out of them by rows (inputs), whose partial products are added up (arXiv 1909.08053). Autoencoders are cut by the output
channels of their convolutions, which are joined again at once: weights and work are shared, activations are not.

`shard_` replaces weights in place, under their names; a `Cut` says how a full weight and its shards belong together.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.func import functional_call

from ml.engines.protocol import EngineError
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.models.layers import QKNorm
from ml.models.mmdit_blocks import DoubleBlock, SingleBlock, StreamAttention
from ml.models.stdit_layers import Mlp, MultiHeadCrossAttention, Projections, WeightedRMSNorm

T5 = "transformers.models.t5.modeling_t5"


@dataclass(frozen=True)
class Cut:
    """How a weight is laid over ranks: along `dim`, where it is `parts` side by side, each of them cut by itself."""

    dim: int
    parts: tuple[int, ...]

    def take(self, full: Tensor, rank: int, size: int) -> Tensor:
        """One rank's shard of a full weight."""
        return torch.cat(
            [part.chunk(size, self.dim)[rank] for part in torch.split(full, list(self.parts), self.dim)], self.dim
        )

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The full weight of every rank's shard, in the order of ranks."""
        sizes = [part // len(shards) for part in self.parts]
        rows = zip(*(torch.split(shard, sizes, self.dim) for shard in shards), strict=True)
        return torch.cat([shard for row in rows for shard in row], self.dim)


def shard_(network: nn.Module, group: ProcessGroup) -> Mapping[str, Cut]:
    """Cut a network over a group, in place; how each weight was cut, by its name. Weights without an entry are whole.

    Takes the transformers, the T5 text encoder and the autoencoders. Raises EngineError when heads, lanes or channels
    do not divide, or when there is nothing to cut.
    """
    cutter = _Cutter(group)
    for name, module in list(network.named_modules()):
        cutter.visit(name, module, convolutions=isinstance(network, VideoAutoencoder))
    if not cutter.cuts:
        raise EngineError(f"tensor_parallel: nothing in {type(network).__name__} can be cut; set it to 1")
    return cutter.cuts


def t5_layers() -> tuple[type[nn.Module], ...]:
    """The layers of transformers' T5 that are cut; none where nothing has loaded it, as then there is no T5."""
    if T5 not in sys.modules:
        return ()
    module = sys.modules[T5]
    return module.T5Attention, module.T5DenseGatedActDense


class RowLinear(nn.Module):
    """A linear layer cut by its inputs; products are added up over ranks and then the whole bias joins them once."""

    def __init__(self, layer: nn.Linear, cut: Cut, group: ProcessGroup) -> None:
        super().__init__()
        self.group, self.in_features, self.out_features = group, layer.in_features, layer.out_features
        self.weight = _shard(layer.weight, cut, group)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in / ranks] -> [..., out], whole on every rank."""
        summed = _sum(nn.functional.linear(x, self.weight), self.group)
        return summed if self.bias is None else summed + self.bias


class Partial(nn.Module):
    """A module with whole weights that sees only this rank's share: its weights' gradients are added up over ranks."""

    def __init__(self, inner: nn.Module, group: ProcessGroup) -> None:
        super().__init__()
        for name, parameter in inner.named_parameters():
            self.register_parameter(name, parameter)
        # In a tuple, so that its weights are not registered twice.
        self._inner, self._group = (inner,), group

    def forward(self, *given: Any) -> Any:
        """What the module makes of its inputs."""
        weights = {name: _copy(weight, self._group) for name, weight in self.named_parameters()}
        return functional_call(self._inner[0], weights, given)


class _Cutter:
    """Cuts modules by their kind and remembers how."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.size = group, group.size()
        self.cuts: dict[str, Cut] = {}

    def visit(self, name: str, module: nn.Module, convolutions: bool) -> None:
        """Cut one module, if it is of a kind that is cut."""
        kinds: dict[Any, Callable[[str, Any], None]] = {
            StreamAttention: self._stream,
            DoubleBlock: self._double,
            SingleBlock: self._single,
            Projections: self._attention,
            MultiHeadCrossAttention: self._cross,
            Mlp: self._mlp,
        }
        for kind, cut in kinds.items():
            if isinstance(module, kind):
                cut(name, module)
        if isinstance(module, t5_layers()):
            self._t5(name, module)
        if convolutions and isinstance(module, nn.Conv2d | nn.Conv3d):
            self._convolution(name, module)

    def _stream(self, name: str, attention: StreamAttention) -> None:
        self._columns(name, attention, ("qkv",), thirds=3)
        self._columns(name, attention, ("q_proj", "k_proj", "v_proj"))
        self._rows(name, attention, "proj")
        attention.norm = self._shared(attention.norm)
        attention.heads = self._heads(name, attention.heads)

    def _double(self, name: str, block: DoubleBlock) -> None:
        for mlp in ("img_mlp", "txt_mlp"):
            self._columns(f"{name}.{mlp}", block.get_submodule(mlp), ("0",))
            self._rows(f"{name}.{mlp}", block.get_submodule(mlp), "2")

    def _single(self, name: str, block: SingleBlock) -> None:
        width, hidden = block.width, block.linear2.in_features - block.width
        if block.fused:
            self._column(name, block, "linear1", (width, width, width, hidden))
        else:
            self._columns(name, block, ("q_proj", "k_proj"))
            self._column(name, block, "v_mlp", (width, hidden))
        self._rows(name, block, "linear2", (width, hidden))
        block.norm = self._shared(block.norm)
        block.heads = self._heads(name, block.heads)
        block.width = width // self.size

    def _attention(self, name: str, attention: Projections) -> None:
        self._columns(name, attention, ("qkv",), thirds=3)
        self._rows(name, attention, "proj")
        for norm in ("q_norm", "k_norm"):
            if isinstance(getattr(attention, norm), WeightedRMSNorm):
                setattr(attention, norm, self._shared(getattr(attention, norm)))
        attention.heads = self._heads(name, attention.heads)

    def _cross(self, name: str, attention: MultiHeadCrossAttention) -> None:
        self._columns(name, attention, ("q_linear",))
        self._columns(name, attention, ("kv_linear",), thirds=2)
        self._rows(name, attention, "proj")
        attention.heads = self._heads(name, attention.heads)

    def _mlp(self, name: str, mlp: Mlp) -> None:
        self._columns(name, mlp, ("fc1",))
        self._rows(name, mlp, "fc2")

    def _t5(self, name: str, module: Any) -> None:
        """A layer of transformers' T5, whose relative positions have a column for every head."""
        if "wo" in module._modules:
            self._columns(name, module, ("wi_0", "wi_1"))
            self._rows(name, module, "wo")
            return
        self._columns(name, module, ("q", "k", "v"))
        self._rows(name, module, "o")
        if module.has_relative_attention_bias:
            table = module.relative_attention_bias
            self._cut(f"{name}.relative_attention_bias", table, "weight", Cut(1, (table.weight.shape[1],)))
        module.n_heads = self._heads(name, module.n_heads)
        module.inner_dim = module.n_heads * module.key_value_proj_dim

    def _convolution(self, name: str, layer: nn.Conv2d | nn.Conv3d) -> None:
        """By output channels, which are joined again; layers of few channels or of groups stay whole."""
        if layer.groups > 1 or layer.out_channels % self.size:
            return
        self._column(name, layer, "", (layer.out_channels,))
        layer.out_channels //= self.size
        layer.register_forward_hook(lambda _, given, made: _join(made, 1, self.group))

    def _columns(self, name: str, parent: nn.Module, layers: Sequence[str], thirds: int = 1) -> None:
        """Linear layers cut by outputs, each of them `thirds` equal parts; those that are not there are passed over."""
        for layer in layers:
            if layer in parent._modules:
                width = parent.get_submodule(layer).get_parameter("weight").shape[0]
                self._column(name, parent, layer, (width // thirds,) * thirds)

    def _column(self, name: str, parent: nn.Module, child: str, parts: tuple[int, ...]) -> None:
        layer = parent.get_submodule(child)
        for kind, parameter in list(layer.named_parameters(recurse=False)):
            assert parameter is not None
            self._cut(".".join(filter(None, (name, child))), layer, kind, Cut(0, parts))
        layer.register_forward_pre_hook(lambda _, given: (_copy(given[0], self.group), *given[1:]))

    def _rows(self, name: str, parent: nn.Module, child: str, parts: tuple[int, ...] | None = None) -> None:
        layer = parent.get_submodule(child)
        assert isinstance(layer, nn.Linear)
        cut = Cut(1, parts or (layer.in_features,))
        self._check(f"{name}.{child}.weight", cut)
        setattr(parent, child, RowLinear(layer, cut, self.group))
        self.cuts[f"{name}.{child}.weight"] = cut

    def _cut(self, name: str, layer: nn.Module, kind: str, cut: Cut) -> None:
        self._check(f"{name}.{kind}", cut)
        setattr(layer, kind, _shard(layer.get_parameter(kind), cut, self.group))
        self.cuts[f"{name}.{kind}"] = cut

    def _check(self, name: str, cut: Cut) -> None:
        if any(part % self.size for part in cut.parts):
            raise EngineError(f"tensor_parallel {self.size} does not divide {name}, which is {cut.parts} wide")

    def _heads(self, name: str, heads: int) -> int:
        if heads % self.size:
            raise EngineError(f"tensor_parallel {self.size} does not divide the {heads} heads of {name}")
        return heads // self.size

    def _shared(self, norm: nn.Module) -> Any:
        """Norms of queries and keys: one scale for all heads, of which every rank has some."""
        if isinstance(norm, QKNorm):
            norm.query_norm, norm.key_norm = self._shared(norm.query_norm), self._shared(norm.key_norm)
            return norm
        return Partial(norm, self.group)


class _Copy(torch.autograd.Function):
    """What is whole goes into what is cut: the gradients of all ranks are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


class _Sum(torch.autograd.Function):
    """What is cut becomes whole: products are added up, and every rank has the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Join(torch.autograd.Function):
    """Shares are laid side by side along `dim`; backward, each rank takes the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        shares = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(shares, x.contiguous(), group=group)
        return torch.cat(shares, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()].contiguous(), None, None


def _copy(x: Tensor, group: ProcessGroup) -> Tensor:
    copied: Tensor = _Copy.apply(x, group)  # type: ignore[no-untyped-call]
    return copied


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    summed: Tensor = _Sum.apply(x, group)  # type: ignore[no-untyped-call]
    return summed


def _join(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    joined: Tensor = _Join.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return joined


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _shard(weight: Tensor, cut: Cut, group: ProcessGroup) -> nn.Parameter:
    taken = cut.take(weight.detach(), group.rank(), group.size()).clone()
    return nn.Parameter(taken, requires_grad=weight.requires_grad)
