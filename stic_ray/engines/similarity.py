"""Models that compare: a picture with texts (CLIP, SigLIP and the like), and texts with one another."""

import inspect
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoTokenizer,
)

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import ModelError
from stic_ray.engines.batching import BatchLimits, FittingBatches
from stic_ray.engines.hub import explained
from stic_ray.engines.transformers_engine import OUT_OF_MEMORY

_PICTURES_AT_A_TIME = 16
_TEXTS_AT_A_TIME = 64
_MOST_TOKENS = 512
"""Where neither tokenizer nor model has a limit of its own."""


class ImageTextModel:
    """Says how well texts fit a picture. Threads may share it."""

    def __init__(self, path: str, setting: str, *, on_gpu: bool) -> None:
        """Load the weights (safetensors only). Raises ModelError, which names the model by `setting`."""
        config = check_image_text(path, setting)
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.model = _load(AutoModelForZeroShotImageClassification, path, setting).to(self.device)
        with _explained(path, setting):
            self.images = AutoImageProcessor.from_pretrained(path)
            self.texts = _Texts(path, self.model, config.get_text_config())
        self.batches = _batches(_PICTURES_AT_A_TIME)
        self._busy = threading.Lock()

    def compare(
        self,
        pictures: Sequence[Image.Image],
        texts: Sequence[Sequence[str]],
        value: Literal["cosine", "logit"] = "cosine",
    ) -> list[list[float]]:
        """Return for each picture how well each of its texts fits, each cut at the text tower's limit.

        The cosine of both embeddings, -1 to 1, or the model's own logit of the two.
        """

        def work(rows: list[int]) -> list[list[float]]:
            return self._compare([pictures[row] for row in rows], [texts[row] for row in rows], value)

        asked = [row for row, own in enumerate(texts) if own]
        with self._busy:
            found = self.batches.run(asked, [1] * len(texts), [""] * len(texts), work)
        return [found.get(row, []) for row in range(len(texts))]

    @torch.inference_mode()
    def _compare(
        self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]], value: Literal["cosine", "logit"]
    ) -> list[list[float]]:
        inputs = self.images(images=list(pictures), return_tensors="pt") | self.texts([t for own in texts for t in own])
        found = self.model(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        owners = torch.tensor([row for row, own in enumerate(texts) for _ in own], device=self.device)
        if value == "logit":
            fits = found.logits_per_text.gather(1, owners[:, None])[:, 0]
        else:
            fits = torch.cosine_similarity(found.text_embeds, found.image_embeds[owners])
        return [part.tolist() for part in fits.split([len(own) for own in texts])]


class TextEmbedder:
    """Gives texts vectors: the mean over the tokens of the last layer, of length 1. Threads may share it."""

    def __init__(self, path: str, setting: str, *, on_gpu: bool) -> None:
        """Load the weights (safetensors only). Raises ModelError, which names the model by `setting`."""
        config = check_embedder(path, setting)
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.model = _load(AutoModel, path, setting, unused=("pooler.",)).to(self.device)
        with _explained(path, setting):
            self.texts = _Texts(path, self.model, config.get_text_config())
        self.batches = _batches(_TEXTS_AT_A_TIME)
        self._busy = threading.Lock()

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return a vector for each text, cut at the model's limit; (N, D)."""

        def work(rows: list[int]) -> list[Tensor]:
            return list(self._embed([texts[row] for row in rows]))

        with self._busy:
            found = self.batches.run(range(len(texts)), [1] * len(texts), [""] * len(texts), work)
        return torch.stack([found[row] for row in range(len(texts))])

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        inputs = {name: tensor.to(self.device) for name, tensor in self.texts(texts).items()}
        layers = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][:, :, None].to(layers.dtype)
        means = (layers * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(means, dim=-1).cpu()


class _Texts:
    """Tokenises texts for a model, each cut at its limit."""

    def __init__(self, path: str, model: Any, config: Any) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        limits = (getattr(config, "max_position_embeddings", _MOST_TOKENS), self._tokenizer.model_max_length)
        self._limit = min(limits)
        # SigLIP was trained on texts of one length, and reads their padding.
        self._padding = "max_length" if config.model_type.startswith("siglip") else True
        self._taken = inspect.signature(model.forward).parameters
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        how = {"padding": self._padding, "truncation": True, "max_length": self._limit, "return_tensors": "pt"}
        found = self._tokenizer(list(texts), **how)
        return {name: tensor for name, tensor in found.items() if name in self._taken}


def check_image_text(path: str, setting: str) -> Any:
    """Return the configuration of a model that compares pictures with texts; loads no weights. Raises ModelError."""
    with _explained(path, setting):
        config = AutoConfig.from_pretrained(path)
    if type(config) not in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING:
        kinds = ", ".join(sorted(kind.model_type for kind in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING))
        raise ModelError(f"{setting}='{path}' is {config.model_type}, which compares no texts with images; {kinds} do.")
    return config


def check_embedder(path: str, setting: str) -> Any:
    """Return the configuration of a model of texts; loads no weights. Raises ModelError."""
    with _explained(path, setting):
        config = AutoConfig.from_pretrained(path)
        AutoTokenizer.from_pretrained(path)
    return config


def _load(kind: Any, path: str, setting: str, unused: tuple[str, ...] = ()) -> Any:
    """Load weights in float32, of which none may be missing but those that are `unused`."""
    with _explained(path, setting):
        model, report = kind.from_pretrained(path, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith(unused)):
        raise ModelError(f"{setting}='{path}' lacks {len(missing)} of its weights, '{missing[0]}' for one.")
    return model.eval()


def _explained(path: str, setting: str) -> Any:
    where = "" if Path(path).is_dir() else " is no directory here, and as a hub id"
    return explained(ModelConfig(path=path), f"{setting}='{path}'{where}")


def _batches(num_rows: int) -> FittingBatches:
    return FittingBatches(BatchLimits(num_rows, None), OUT_OF_MEMORY, torch.cuda.empty_cache)
