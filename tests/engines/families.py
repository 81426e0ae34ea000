"""What the engine tests know about the families: names, and how many tokens a picture takes."""

from PIL import Image

from stic_ray.engines.base import Request
from stic_ray.toyworld.scenes import draw_scene, sample_scene

EMBEDDED = ("llava", "llava_next", "idefics3", "toyworld")
"""Families that need no torchvision."""

NEED_TORCHVISION = ("qwen2_vl", "qwen2_5_vl", "smolvlm")

WITH_BOS = ("llava", "llava_next")
"""Families whose tokenizer begins every text with a BOS token."""

IMAGE_TOKENS = {
    "llava": 16,  # 4 x 4 patches of 8 px in 32 px
    "llava_next": 88,  # as above, and 8 x 8 patches of 2 x 2 tiles with a newline behind each of the 8 rows
    "idefics3": 20,  # 4 tokens for each of 2 x 2 tiles, and 4 for the whole
    "toyworld": 9,  # 3 x 3 patches of 16 px in 48 px
}
"""Of a picture of 64 x 64 px."""


def scene(index: int, width: int = 64, height: int = 64) -> Image.Image:
    return draw_scene(sample_scene(0, index)).resize((width, height))


def mixed_requests() -> list[Request]:
    """Pictures of several shapes, prompts of several lengths, and questions without a picture among them."""
    return [
        Request("Describe this picture.", scene(1), seed=11),
        Request("What is red?", None, seed=12),
        Request("How many shapes are there, and where is each of them?", scene(2, 120, 50), seed=13),
        Request("Describe this picture.", scene(3, 40, 100), seed=14),
        Request("Hi", scene(4, 32, 32), seed=15),
        Request("Tell me a long story about a green square that was lost.", None, seed=16),
        Request("Describe this picture.", scene(1), seed=17),
    ]
