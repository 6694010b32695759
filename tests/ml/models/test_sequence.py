"""The default of the seam: one rank that holds every token."""

import torch

from ml.models.attention import attention
from ml.models.sequence import PlainSequence


def test_one_rank_keeps_every_token_and_attends_as_ever() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 8, generator=generator) for _ in range(3))
    plain = PlainSequence()
    assert plain.split(query, 2) is query
    assert plain.gather(query, 2) is query
    assert torch.equal(plain.attention(query, key, value), attention(query, key, value))
