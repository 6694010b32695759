"""What weights look like: told from names and shapes that the released files have."""

import pytest
import torch

from ml.models.official.files import Header
from ml.models.official.looks import looks_like, starts

BLOCK = {"blocks.0.attn.qkv.weight": (12, 4), "blocks.0.cross_attn.kv_linear.weight": (8, 4)}
THIRD = {"spatial_blocks.0.attn.qkv.weight": (12, 4), "temporal_blocks.0.attn.qkv.weight": (12, 4)}
Y, X, IN = "y_embedder.y_embedding", "x_embedder.proj.weight", "img_in.weight"

CASES = [
    (BLOCK | {"blocks.0.attn_temp.qkv.weight": (12, 4)}, "v1_0", "stdit"),
    (BLOCK | {"blocks.0.attn_temp.qkv.weight": (12, 4), "t_block_temp.1.weight": (12, 4)}, "v1_1", "stdit2"),
    (THIRD | {X: (4, 4, 1, 2, 2)}, "v1_2", "stdit3"),
    (THIRD | {X: (4, 16, 1, 2, 2)}, "v1_3", "stdit3"),
    (THIRD | {X: (4, 4, 1, 2, 2), "x_embedder_cond.proj.weight": (4, 4, 1, 2, 2)}, "v1_3", "stdit3"),
    ({"double_blocks.0.img_attn.q_proj.weight": (4, 4), IN: (4, 64)}, "v2_0", "mmdit"),
    ({"double_blocks.0.img_attn.q_proj.weight": (4, 4), IN: (4, 128)}, "v2_0_hc", "mmdit"),
    ({"single_blocks.0.linear1.weight": (28, 4), IN: (4, 64)}, "v2_0", "mmdit"),
    (BLOCK | {Y: (120, 4096)}, "v1_0", "pixart"),
    (BLOCK | {Y: (300, 4096)}, "v1_2", "pixart"),
    ({"encoder.down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)}, "v1_0", "sd"),
    ({"spatial_vae.module.encoder.conv_in.weight": (1,), "temporal_vae.x": (1,)}, "v1_2", "opensora_v1_2"),
    ({"encoder.down.0.block.0.conv1.conv.weight": (1,)}, "v1_3", "opensora_v1_3"),
    ({"encoder.down_blocks.0.resnets.0.conv1.conv.weight": (1,)}, "v2_0", "hunyuan"),
    ({"encoder.stages.0.op_list.0.main.conv1.conv.weight": (1,)}, "v2_0_hc", "dc_ae"),
    ({"encoder.down.0.block.0.conv1.weight": (1,)}, "", ""),
    (BLOCK | {"y_embedder.embedding_table.weight": (1001, 4)}, "", ""),
    ({"single_transformer_blocks.0.attn.to_q.weight": (4, 4)}, "", ""),
]


def announced(shapes: dict[str, tuple[int, ...]]) -> dict[str, Header]:
    return {name: Header(torch.float32, shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("shapes", "recipe", "kind"), CASES)
def test_every_generation_is_known_by_its_names(shapes: dict[str, tuple[int, ...]], recipe: str, kind: str) -> None:
    found = looks_like(announced(shapes))
    assert found is not None
    assert (found.recipe, found.kind) == (recipe, kind)


def test_what_is_unfamiliar_looks_like_nothing() -> None:
    assert looks_like(announced({"fc.weight": (1,)})) is None
    assert looks_like({}) is None


@pytest.mark.parametrize(
    ("shapes", "kind", "expected"),
    [
        (BLOCK | {Y: (120, 4096)}, "stdit", True),
        (BLOCK | {Y: (120, 4096)}, "mmdit", False),
        ({"single_blocks.0.linear1.weight": (28, 4)}, "mmdit", True),
        ({"single_blocks.0.linear1.weight": (28, 4)}, "stdit3", False),
        (THIRD | {X: (4, 4, 1, 2, 2)}, "stdit3", False),
    ],
)
def test_other_projects_start_some_kinds_of_networks(
    shapes: dict[str, tuple[int, ...]], kind: str, expected: bool
) -> None:
    found = looks_like(announced(shapes))
    assert found is not None
    assert starts(found, kind) is expected
