"""Models that compare pictures with texts, and texts with one another, against plain forward passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from stic_ray.core.errors import ModelError
from stic_ray.engines.similarity import ImageTextModel, TextEmbedder, check_image_text
from tests.tiny_scorers import MAX_TEXT_TOKENS, build_scorer

PICTURES = [Image.new("RGB", (50, 40), "red"), Image.effect_noise((30, 60), 90).convert("RGB")]
TEXTS = [["A red picture.", "Noise", "What is in it? " * 40], ["Describe the image."]]
LONG = TEXTS[0][2]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_scorer(request.param, tmp_path_factory.mktemp(request.param) / request.param)


@torch.no_grad()
def plain(checkpoint: Path, picture: Image.Image, text: str) -> Any:
    """One picture and one text through the model as it is."""
    tokenizer, images = AutoTokenizer.from_pretrained(checkpoint), AutoImageProcessor.from_pretrained(checkpoint)
    padding = "max_length" if checkpoint.name == "siglip" else False
    how = {"padding": padding, "truncation": True, "max_length": MAX_TEXT_TOKENS, "return_tensors": "pt"}
    inputs = {**images(images=[picture], return_tensors="pt"), **tokenizer([text], **how)}
    inputs.pop("token_type_ids", None)
    return AutoModel.from_pretrained(checkpoint).eval()(**inputs)


def test_cosine_and_logit_are_those_of_plain_forward_passes(checkpoint: Path) -> None:
    model = ImageTextModel(str(checkpoint), "scores.image_text_model", on_gpu=False)
    alone = [[plain(checkpoint, picture, text) for text in own] for picture, own in zip(PICTURES, TEXTS, strict=True)]
    for row, own in enumerate(alone):
        cosines = [float((found.image_embeds * found.text_embeds).sum()) for found in own]
        assert model.compare(PICTURES, TEXTS)[row] == pytest.approx(cosines, abs=1e-5)
        logits = [float(found.logits_per_image) for found in own]
        assert model.compare(PICTURES, TEXTS, "logit")[row] == pytest.approx(logits, abs=1e-4)


def test_a_long_text_is_cut_at_the_limit_of_the_text_tower(checkpoint: Path) -> None:
    model = ImageTextModel(str(checkpoint), "scores.image_text_model", on_gpu=False)
    [[long, longer]] = model.compare(PICTURES[:1], [[LONG, LONG + "And more."]])
    assert long == pytest.approx(longer, abs=1e-6)


def test_a_picture_without_texts_has_no_values(checkpoint: Path) -> None:
    model = ImageTextModel(str(checkpoint), "scores.image_text_model", on_gpu=False)
    assert model.compare(PICTURES, [[], ["Noise"]])[0] == []
    assert model.compare(PICTURES, [[], []]) == [[], []]


def test_vectors_are_means_over_tokens_of_length_one(tmp_path: Path) -> None:
    checkpoint = build_scorer("bert", tmp_path)
    embedder = TextEmbedder(str(checkpoint), "scores.similarity_model", on_gpu=False)
    texts = ["A red picture.", "Noise", LONG]
    vectors = embedder.embed(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModel.from_pretrained(checkpoint).eval()
    for text, vector in zip(texts, vectors, strict=True):
        inputs = tokenizer([text], truncation=True, max_length=MAX_TEXT_TOKENS, return_tensors="pt")
        with torch.no_grad():
            mean = model(input_ids=inputs["input_ids"]).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=0)


def test_models_that_compare_nothing_are_refused(tmp_path: Path, tiny_llava: Path) -> None:
    with pytest.raises(ModelError, match=r"scores\.image_text_model='.*' is llava, which compares no texts .* clip,"):
        check_image_text(str(tiny_llava), "scores.image_text_model")
    with pytest.raises(ModelError, match=r"scores\.similarity_model='.*none' is no directory here"):
        TextEmbedder(str(tmp_path / "none"), "scores.similarity_model", on_gpu=False)


def test_missing_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(checkpoint)
    kept = {name: weight for name, weight in model.state_dict().items() if "patch_embedding" not in name}
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ModelError, match=r"scores\.image_text_model='.*' lacks \d of its weights, '.*patch_embedding"):
        ImageTextModel(str(tmp_path), "scores.image_text_model", on_gpu=False)
