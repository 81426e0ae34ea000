"""Batches of rows: conversations, and pairs with each answer in a sequence of its own or all behind one prompt.

Where the loss has terms about images, the batch of the pairs holds further ones under the names of the views: the same
answers to the same prompt with the rejected image (REJECTED_IMAGE), and without any (NO_IMAGE).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
import torch

from stic_ray.core.errors import SourceError
from stic_ray.engines.sequences import Batch, SequenceBuilder, TokenSequence, labels_of
from stic_ray.engines.shared_prefix import make_batch
from stic_ray.method.images import GREY
from stic_ray.method.objectives import image_token_weights
from stic_ray.stages.training.data import WEIGHT, Example
from stic_ray.stages.training.index import REFERENCE_LOGPS, TEXT_LOGPS, without_text_logps

IGNORED = -100
"""Label of a position that the loss leaves out."""
PLACES = "places"
"""Of N sequences of their own: row, and number of the answer in it, shape (N, 2)."""
REJECTED_IMAGE, NO_IMAGE = "rejected_image", "no_image"
"""Views of pairs beside that with their own image: a batch of each."""
Views = Mapping[str, tuple[str, ...]]
"""Which answers each view has, of `chosen` and `rejected`."""
TOKEN_WEIGHTS = "token_weights"
"""By how much each token counts in the likelihood, shape (B, T); 1 where nothing says otherwise."""
_SMALL_TALK = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "Yes."}]
_BLANK = {"image": PIL.Image.new("RGB", (64, 64), GREY), "messages": _SMALL_TALK, WEIGHT: 0.0}
"""A row of which nothing is learned."""


def check_image_tokens(input_ids: torch.Tensor, token_id: int, has_image: list[bool]) -> None:
    """Raise AssertionError unless exactly the rows with an image hold image tokens.

    A row that lost them would train the language model alone and nothing else would show it (STIC's released
    code trains so: docs/method.md).
    """
    found = (input_ids == token_id).any(dim=1).tolist()
    assert found == has_image, f"rows with an image {has_image}, rows with image tokens {found}"


class Collator:
    """What makes a batch of rows."""

    def __init__(self, processor: Any) -> None:
        self.builder = SequenceBuilder(processor)

    def sequence(self, example: Example) -> TokenSequence:
        """Return the sequence of a conversation, or of a pair's preferred answer."""
        if "messages" in example:
            return self.builder.build(example["messages"], with_image=example["image"] is not None)
        return self.answers(example, example["image"], ("chosen",))[0]

    def answers(
        self, example: Example, image: PIL.Image.Image | None, sides: Sequence[str] = ()
    ) -> list[TokenSequence]:
        """Return the sequences of a pair's answers, of `sides` or of all, to its prompt with this image.

        An answer that was cut off at a limit has no end.
        """
        found = [(example[side], example.get(f"{side}_finish_reason")) for side in sides or ("chosen", "rejected")]
        if not sides:
            found += [(answer, None) for answer in example.get("more_rejected") or ()]
        return [
            self.builder.build([*example["prompt"], *answer], with_image=image is not None, cut_off=reason == "length")
            for answer, reason in found
        ]


class PairCollator(Collator, ABC):
    """What batches of pairs have in common."""

    def __init__(self, processor: Any, views: Views | None = None) -> None:
        """Take the views that the loss needs beside that of the pair's own image."""
        super().__init__(processor)
        self.views = views or {}

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return the batch of the pairs, one of each further view, and WEIGHT and REFERENCE_LOGPS where rows have them.

        The latter have shape (B,).
        """
        batch: dict[str, Any] = self._view(examples, [example["image"] for example in examples])
        for name, sides in self.views.items():
            batch[name] = self._view(examples, [example.get(name) for example in examples], sides)
        return batch | _columns(examples, WEIGHT, *REFERENCE_LOGPS)

    def _view(
        self, examples: list[Example], images: Sequence[PIL.Image.Image | None], sides: Sequence[str] = ()
    ) -> Batch:
        answers = [self.answers(example, image, sides) for example, image in zip(examples, images, strict=True)]
        batch, shown = self.batch(answers, images)
        has_image = [image is not None for image in shown]
        check_image_tokens(batch["input_ids"], self.builder.image_token_id, has_image)
        return batch

    @abstractmethod
    def batch(
        self, answers: Sequence[Sequence[TokenSequence]], images: Sequence[PIL.Image.Image | None]
    ) -> tuple[Batch, Sequence[PIL.Image.Image | None]]:
        """Return what the model takes for B rows of answers with their images, and the image of each of its rows."""


class PreferenceCollator(PairCollator):
    """Each answer in a sequence of its own: the B chosen ones first, the B rejected ones behind them, then others."""

    def batch(
        self, answers: Sequence[Sequence[TokenSequence]], images: Sequence[PIL.Image.Image | None]
    ) -> tuple[Batch, Sequence[PIL.Image.Image | None]]:
        """Return input_ids, masks (`completion_mask`: the answers), image inputs, and PLACES of the N sequences."""
        num_rows, most = len(answers), max(map(len, answers))
        places = [(k, row) for k in range(most) for row in range(num_rows) if k < len(answers[row])]
        shown = [images[row] for _, row in places]
        batch = self.builder.batch([answers[row][k] for k, row in places], shown)
        batch["completion_mask"] = batch.pop("is_answer").long()
        batch[PLACES] = torch.tensor([(row, k) for k, row in places])
        return batch, shown


class SharedPrefixCollator(PairCollator):
    """All answers of a row behind its image and prompt, which are there once."""

    def batch(
        self, answers: Sequence[Sequence[TokenSequence]], images: Sequence[PIL.Image.Image | None]
    ) -> tuple[Batch, Sequence[PIL.Image.Image | None]]:
        """Return what `shared_prefix.make_batch` does."""
        return make_batch(self.builder, images, answers), images


class AnswersOnlyCollator(Collator):
    """Conversations with the loss on what the assistant says, its end-of-turn token included, and nowhere else.

    Of a pair, that is the preferred answer. TRL's own mask needs generation markers in the chat template, which many
    checkpoints lack.
    """

    prior_alpha = 0.0
    """Exponent of the weights that tokens of rows with an image get from their TEXT_LOGPS; 0 for none."""
    needs_image = False
    """Whether a blank picture is put beside rows which all lack one; it weighs nothing in the loss.

    The vision tower and the projector thus take part in every micro-batch. Otherwise a worker whose rows are all
    text has no gradients for them, or never asks for the weights that ZeRO-3 keeps elsewhere, and the others wait.
    LLaVA does the same (`prepare_inputs_labels_for_multimodal` and the trainer's dummy image of its data collator).
    """

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return input_ids, attention_mask, labels and, where a row has an image, pixel values.

        A row of weight 0 has no label: the loss is a mean over labels.
        """
        if self.needs_image and all(example["image"] is None for example in examples):
            examples = [*examples, _BLANK]
        images = [example["image"] for example in examples]
        batch = self.builder.batch([self.sequence(example) for example in examples], images)
        batch["labels"] = labels_of(batch, IGNORED)
        is_answer = batch.pop("is_answer")
        if self.prior_alpha and any(TEXT_LOGPS in example for example in examples):
            batch[TOKEN_WEIGHTS] = self._token_weights(examples, is_answer)
        batch["labels"][torch.tensor([example.get(WEIGHT) == 0 for example in examples])] = IGNORED
        check_image_tokens(batch["input_ids"], self.builder.image_token_id, [image is not None for image in images])
        return batch

    def _token_weights(self, examples: list[Example], is_answer: torch.Tensor) -> torch.Tensor:
        weights = torch.ones(is_answer.shape)
        for row, example in enumerate(examples):
            if example["image"] is None or example is _BLANK:
                continue
            logps, num_tokens = example.get(TEXT_LOGPS), int(is_answer[row].sum())
            if logps is None or len(logps) != num_tokens:
                raise SourceError(without_text_logps(f"a row has {num_tokens} of {len(logps or ())}"))
            weights[row, is_answer[row]] = image_token_weights(torch.tensor(logps), self.prior_alpha)
        return weights


def _columns(examples: list[Example], *names: str) -> dict[str, torch.Tensor]:
    """Return the columns that all rows have."""
    known = [name for name in names if all(example.get(name) is not None for example in examples)]
    return {name: torch.tensor([example[name] for example in examples]) for name in known}
