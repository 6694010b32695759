"""Text encoders: the packaged MiniLM as it is, and the T5 + CLIP path on tiny models built here."""

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
    context, pooled = minilm.encode(["a red boat crosses the bay", ""])
    assert context.shape == (2, TINY.max_tokens, TINY.context_dim)
    assert pooled.shape == (2, TINY.pooled_dim)
    assert context.dtype == pooled.dtype == torch.float32
    assert torch.allclose(pooled.norm(dim=-1), torch.ones(2), atol=1e-6)


def test_minilm_context_is_zero_after_the_prompt(minilm: MiniLM) -> None:
    """Eight tokens: [CLS], six words, [SEP]; the empty prompt has two."""
    context, _ = minilm.encode(["a red boat crosses the bay", ""])
    assert (context.abs().sum(-1) > 0).sum(1).tolist() == [8, 2]


def test_minilm_knows_meaning_not_words(minilm: MiniLM) -> None:
    _, pooled = minilm.encode(["a small boat on the sea", "a ship sails the ocean", "quarterly tax accounting rules"])
    assert pooled[0] @ pooled[1] > 0.5 > 0.3 > pooled[0] @ pooled[2]


def test_an_embedding_does_not_depend_on_its_batch_and_long_prompts_are_cut(minilm: MiniLM) -> None:
    alone = minilm.encode(["a red boat"])
    beside = minilm.encode(["a red boat", "word " * 200])
    assert torch.allclose(alone[0][0], beside[0][0], atol=1e-5)
    assert torch.allclose(alone[1][0], beside[1][0], atol=1e-5)
    assert (beside[0][1].abs().sum(-1) > 0).all()


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
    context, pooled = encoder.encode(["a red boat", ""])
    assert (context.shape, pooled.shape) == ((2, 16, 32), (2, 24))
    ids = torch.zeros(2, 16, dtype=torch.long)
    ids[0, :3] = torch.tensor([WORDS.index(word) for word in ("a", "red", "boat")])
    with torch.no_grad():
        assert torch.allclose(context, t5(input_ids=ids).last_hidden_state, atol=1e-6)
        wide = torch.zeros(2, 77, dtype=torch.long)
        wide[:, :16] = ids
        assert torch.allclose(pooled, clip(input_ids=wide).pooler_output, atol=1e-6)


def test_t5_clip_digest_follows_either_model(tmp_path: Path) -> None:
    text = Text(kind="t5_clip", max_tokens=16, context_dim=32, pooled_dim=24)
    _tiny_models(tmp_path)
    before = build_text_encoder(text, tmp_path).digest
    _tiny_models(tmp_path, seed=1)
    assert build_text_encoder(text, tmp_path).digest != before


def test_missing_weights_say_what_is_missing(tmp_path: Path) -> None:
    text = Text(kind="t5_clip", max_tokens=16, context_dim=32, pooled_dim=24)
    with pytest.raises(TextEncoderError, match="weights folder"):
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
