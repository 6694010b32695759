"""Text encoders: the packaged MiniLM as it is, and the T5 + CLIP path on tiny models built here."""

import os
import warnings
from pathlib import Path

import pytest
import torch

from ml.models.text import CLIP_FOLDER, T5_FOLDER, MiniLM, TextEncoderError, build_text_encoder, packaged_minilm
from ml.recipe import Recipe
from ml.sections import Text

TINY = Recipe.load("v2_0", "tiny").text
WORDS = ["<pad>", "</s>", "<unk>", "<|startoftext|>", "<|endoftext|>", "a", "red", "boat", "crosses", "the", "bay"]


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    encoder = build_text_encoder(TINY)
    assert isinstance(encoder, MiniLM)
    return encoder


def test_minilm_has_the_sizes_of_the_recipe(minilm: MiniLM) -> None:
    text = minilm.encode(["a red boat crosses the bay", ""])
    assert text.context.shape == (2, TINY.max_tokens, TINY.context_dim)
    assert text.pooled.shape == (2, TINY.pooled_dim)
    assert text.context.dtype == text.pooled.dtype == torch.float32
    assert (text.mask.shape, text.mask.dtype) == ((2, TINY.max_tokens), torch.bool)
    assert torch.allclose(text.pooled.norm(dim=-1), torch.ones(2), atol=1e-6)


def test_minilm_gives_nothing_pooled_to_a_generation_without_it() -> None:
    """1.x has no pooled vector: its context and mask are the same, its pooled vector is empty."""
    plain = build_text_encoder(TINY.model_copy(update={"pooled_dim": 0}))
    with_one, without = build_text_encoder(TINY).encode(["a red boat"]), plain.encode(["a red boat"])
    assert without.pooled.shape == (1, 0)
    assert torch.equal(with_one.context, without.context)
    assert torch.equal(with_one.mask, without.mask)


def test_minilm_context_is_zero_after_the_prompt(minilm: MiniLM) -> None:
    """Eight tokens: [CLS], six words, [SEP]; the empty prompt has two."""
    text = minilm.encode(["a red boat crosses the bay", ""])
    assert (text.context.abs().sum(-1) > 0).sum(1).tolist() == [8, 2]
    assert torch.equal(text.mask, text.context.abs().sum(-1) > 0)


def test_minilm_knows_meaning_not_words(minilm: MiniLM) -> None:
    pooled = minilm.encode(
        ["a small boat on the sea", "a ship sails the ocean", "quarterly tax accounting rules"]
    ).pooled
    assert pooled[0] @ pooled[1] > 0.5 > 0.3 > pooled[0] @ pooled[2]


def test_an_embedding_does_not_depend_on_its_batch_and_long_prompts_are_cut(minilm: MiniLM) -> None:
    alone = minilm.encode(["a red boat"])
    beside = minilm.encode(["a red boat", "word " * 200])
    assert torch.allclose(alone.context[0], beside.context[0], atol=1e-5)
    assert torch.allclose(alone.pooled[0], beside.pooled[0], atol=1e-5)
    assert torch.equal(alone.mask[0], beside.mask[0])
    assert (beside.context[1].abs().sum(-1) > 0).all()
    assert beside.mask[1].all()


def test_digest_follows_weights_and_settings(minilm: MiniLM) -> None:
    assert minilm.digest == build_text_encoder(TINY).digest
    assert len(minilm.digest) == 16
    assert build_text_encoder(TINY.model_copy(update={"max_tokens": 32})).digest != minilm.digest


def test_sizes_that_differ_from_the_recipe_are_refused() -> None:
    with pytest.raises(TextEncoderError, match="context 384"):
        MiniLM(TINY.model_copy(update={"context_dim": 512}), packaged_minilm())


def test_t5_clip_pads_and_takes_the_pooler(tmp_path: Path) -> None:
    """Against transformers called by hand: T5 over 16 padded tokens without a mask, CLIP's pooler over 77."""
    text = Text(kind="t5_clip", max_tokens=16, context_dim=32, pooled_dim=24)
    t5, clip = _tiny_models(tmp_path)
    encoder = build_text_encoder(text, tmp_path)
    found = encoder.encode(["a red boat", ""])
    context, pooled = found.context, found.pooled
    assert (context.shape, pooled.shape) == ((2, 16, 32), (2, 24))
    assert found.mask.all(), "beside CLIP the transformer sees padding, as Flux does"
    ids = torch.zeros(2, 16, dtype=torch.long)
    ids[0, :3] = torch.tensor([WORDS.index(word) for word in ("a", "red", "boat")])
    with torch.no_grad():
        assert torch.allclose(context, t5(input_ids=ids).last_hidden_state, atol=1e-6)
        wide = torch.zeros(2, 77, dtype=torch.long)
        wide[:, :16] = ids
        assert torch.allclose(pooled, clip(input_ids=wide).pooler_output, atol=1e-6)


def test_t5_alone_attends_to_the_prompt_and_says_which_tokens_are_real(tmp_path: Path) -> None:
    """Against transformers called by hand with the mask (1.0 to 1.3); nothing is pooled."""
    t5, _ = _tiny_models(tmp_path)
    found = build_text_encoder(Text(kind="t5", max_tokens=6, context_dim=32, pooled_dim=0), tmp_path).encode(
        ["a red boat", "the bay"]
    )
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for row, words in enumerate((("a", "red", "boat"), ("the", "bay"))):
        ids[row, : len(words)] = torch.tensor([WORDS.index(word) for word in words])
        mask[row, : len(words)] = 1
    with torch.no_grad():
        wanted = t5(input_ids=ids, attention_mask=mask).last_hidden_state
        unmasked = t5(input_ids=ids).last_hidden_state
    assert torch.allclose(found.context, wanted, atol=1e-6)
    assert not torch.allclose(found.context, unmasked, atol=1e-3)
    assert found.mask.sum(1).tolist() == [3, 2]
    assert found.pooled.shape == (2, 0)


def test_t5_clip_digest_follows_either_model(tmp_path: Path) -> None:
    text = Text(kind="t5_clip", max_tokens=16, context_dim=32, pooled_dim=24)
    _tiny_models(tmp_path)
    before = build_text_encoder(text, tmp_path).digest
    _tiny_models(tmp_path, seed=1)
    assert build_text_encoder(text, tmp_path).digest != before


def test_a_digest_follows_pickled_weights_and_their_shards(tmp_path: Path) -> None:
    """Google publishes T5 v1.1 XXL as `pytorch_model.bin` alone."""
    text = Text(kind="t5", max_tokens=6, context_dim=32, pooled_dim=0)
    t5, _ = _tiny_models(tmp_path)
    folder, wanted = tmp_path / T5_FOLDER, build_text_encoder(text, tmp_path).encode(["a red boat"]).context
    (folder / "model.safetensors").unlink()
    torch.save(t5.state_dict(), folder / "pytorch_model.bin")
    encoder = build_text_encoder(text, tmp_path)
    assert torch.equal(encoder.encode(["a red boat"]).context, wanted)
    before = encoder.digest
    other, _ = _tiny_models(tmp_path / "other", seed=1)
    torch.save(other.state_dict(), folder / "pytorch_model.bin")
    after = build_text_encoder(text, tmp_path).digest
    assert before != after
    for number in (1, 2):
        (folder / "pytorch_model.bin").unlink(missing_ok=True)
        torch.save({"a": number}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    sharded = encoder.digest
    torch.save({"a": 3}, folder / "pytorch_model-00002-of-00002.bin")
    assert len({before, after, sharded, encoder.digest}) == 4


def test_a_pickle_beside_safetensors_is_not_loaded_and_not_counted(tmp_path: Path) -> None:
    text = Text(kind="t5", max_tokens=6, context_dim=32, pooled_dim=0)
    _tiny_models(tmp_path)
    before = build_text_encoder(text, tmp_path).digest
    (tmp_path / T5_FOLDER / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert build_text_encoder(text, tmp_path).digest == before


def test_pickled_weights_that_carry_code_do_not_run(tmp_path: Path) -> None:
    _tiny_models(tmp_path)
    (tmp_path / T5_FOLDER / "model.safetensors").unlink()
    torch.save({"a": _Trap(tmp_path / "sprung")}, tmp_path / T5_FOLDER / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):  # transformers and torch each have their own class
        build_text_encoder(Text(kind="t5", max_tokens=6, context_dim=32, pooled_dim=0), tmp_path)
    assert not (tmp_path / "sprung").exists()


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_missing_weights_say_what_is_missing(tmp_path: Path) -> None:
    text = Text(kind="t5_clip", max_tokens=16, context_dim=32, pooled_dim=24)
    with pytest.raises(TextEncoderError, match=f"t5_clip needs a folder that holds {T5_FOLDER}"):
        build_text_encoder(text)
    with pytest.raises(TextEncoderError, match=T5_FOLDER):
        build_text_encoder(text, tmp_path)


def _tiny_models(folder: Path, seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module]:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    size = len(WORDS)
    t5 = T5EncoderModel(T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    clip_config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=1,
    )
    clip = CLIPTextModel(clip_config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, model in ((T5_FOLDER, t5), (CLIP_FOLDER, clip)):
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    return t5.eval(), clip.eval()
