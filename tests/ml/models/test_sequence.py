"""The default of the seam: one rank that holds every token."""

import torch

from ml.models.attention import attention
from ml.models.sequence import HERE, PlainSequence, Shared


def test_one_rank_keeps_every_token_and_attends_as_ever() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 8, generator=generator) for _ in range(3))
    plain = PlainSequence()
    assert plain.split(query, 2) is query
    assert plain.gather(query, 2, 5) is query
    assert plain.to_heads(query, (5,)) is query
    assert plain.to_tokens(query, (5,)) is query
    wanted = attention(query, key, value)
    assert torch.equal(plain.attention(query, key, value, (5,)), wanted)
    assert torch.equal(HERE.attention(query, key, value), wanted)


def test_shared_tokens_tell_their_lengths() -> None:
    """Each call reaches the seam with the lengths of the joined streams."""
    told: list[tuple[int, ...]] = []

    class Spy(PlainSequence):
        def attention(self, query: torch.Tensor, *more: object) -> torch.Tensor:
            told.append(more[-1])
            return query

        def to_heads(self, x: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
            told.append(tokens)
            return x

        to_tokens = to_heads

    x, shared = torch.zeros(1), Shared(Spy(), (2, 3))
    assert shared.attention(x, x, x) is shared.to_heads(x) is shared.to_tokens(x) is x
    assert told == [(2, 3)] * 3
