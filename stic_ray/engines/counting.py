"""How long conversations are, by a model's processor alone."""

import threading
from collections.abc import Sequence

from PIL import Image

from stic_ray.core.config import ModelConfig
from stic_ray.engines.loading import load_processor
from stic_ray.engines.rendering import Message
from stic_ray.engines.sequences import SequenceBuilder


class ProcessorCounter:
    """Counts what training will see. Threads may share it."""

    def __init__(self, model: ModelConfig) -> None:
        """Load the processor. Raises ModelError."""
        self.builder = SequenceBuilder(load_processor(model))
        self.processor = self.builder.processor
        self.tokenizing = threading.RLock()
        """Held by whoever uses the builder: a tokenizer refuses to have its padding changed meanwhile."""
        self._added_by_size: dict[tuple[int, int], int] = {}

    def count_text_tokens(self, messages: Sequence[Message], *, with_image: bool) -> int:
        """Return the tokens of a conversation, its image counted as one placeholder. Raises ModelError."""
        with self.tokenizing:
            return len(self.builder.build(messages, with_image=with_image).ids)

    def count_added_tokens(self, images: Sequence[Image.Image]) -> list[int]:
        """Return how many tokens each image adds; the text around it makes no difference."""
        with self.tokenizing:
            return self.builder.count_added_tokens(images)

    def guess_added_tokens(self, image: Image.Image | None) -> int:
        """Return what an image will add, by its size; made from a blank one where the processor does not know."""
        if image is None:
            return 0
        if image.size not in self._added_by_size:
            if hasattr(self.builder.processor, "_get_num_multimodal_tokens"):
                known = self.builder.processor._get_num_multimodal_tokens(image_sizes=[image.size[::-1]])
                self._added_by_size[image.size] = known["num_image_tokens"][0]
            else:
                self._added_by_size[image.size] = self.count_added_tokens([Image.new("RGB", image.size)])[0]
        return self._added_by_size[image.size]
