"""Make the toy world's model from nothing: about 25 minutes on a CPU core.

python -m experiments.pretrain_toyworld

First its eyes, then projector and language with the eyes held still: to describe, to find one thing, and habits.
Without the first step the loss stays for long where the language model ignores the picture. Were the eyes trained on
in the second, colours would be learned at once and the ability to tell shapes be lost before it is asked for.

The weights in stic_ray/toyworld/weights are what this command leaves without options. The same options on the same
kind of machine give the same weights; then docs/results/ has to be made again.
"""

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from experiments.toyworld_lessons import COURSES, Course, Lesson, lesson_of, sample_sentences
from experiments.toyworld_model import (
    HIDDEN_SIZE,
    IMAGE,
    NUM_IMAGE_TOKENS,
    make_model,
    make_processor,
    make_tokenizer,
)
from stic_ray.engines.weight_names import use_hub_names
from stic_ray.toyworld import WEIGHTS
from stic_ray.toyworld.language import PROMPTS
from stic_ray.toyworld.scenes import COLOURS, NUM_CELLS, SHAPES, Scene, draw_scene, sample_scene

logger = logging.getLogger(__name__)

FIRST_INDEX = 0
"""Pretraining scenes begin here; assets.py keeps the ranges of the other uses apart from them."""

NUM_STEPS = {"language": 900, "looking": 1200, "habits": 2100, "practice": 1500}
"""Of each course."""

_NUM_SENTENCE_SCENES = 500
_LEARNING_RATE = 1e-3
_WARMUP_STEPS = 50
_IGNORED = -100
_EMPTY = 0  # class of an empty cell, for colour and shape


def pretrain(
    directory: Path,
    *,
    seed: int,
    num_vision_steps: int,
    num_steps: Mapping[str, int],
    batch_size: int,
) -> float:
    """Make the model from nothing, write it into `directory` and return the last loss.

    `num_steps` are those of each of `toyworld_lessons.COURSES`.

    The same arguments on the same number of threads of the same kind of machine give the same weights.
    """
    scenes = [sample_scene(seed, FIRST_INDEX + number) for number in range(_NUM_SENTENCE_SCENES)]
    processor = make_processor(make_tokenizer([*_prompt_texts(), *sample_sentences(scenes)]))
    model = make_model(processor.tokenizer, seed)
    torch.manual_seed(seed)
    _teach_eyes(model, processor, seed, num_vision_steps, batch_size)
    num_before, loss = num_vision_steps, math.nan
    for name, course in COURSES.items():
        steps = range(num_before, num_before + num_steps[name])
        loss = _teach_answers(model, processor, seed, steps, batch_size, course)
        num_before = steps.stop
    model.save_pretrained(directory)
    use_hub_names(directory)
    processor.save_pretrained(directory)
    return loss


def _prompt_texts() -> list[str]:
    """Every prompt, often enough for its words to become tokens."""
    texts = [text for entry in PROMPTS.values() for text in ([entry] if isinstance(entry, str) else entry)]
    return texts * 50


def _teach_eyes(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int, num_steps: int, batch_size: int
) -> None:
    """Train the vision tower to tell colour and shape of every cell, with two heads that are thrown away."""
    tower = model.model.vision_tower
    colour_head = nn.Linear(HIDDEN_SIZE, len(COLOURS) + 1)
    shape_head = nn.Linear(HIDDEN_SIZE, len(SHAPES) + 1)
    parameters = [*tower.parameters(), *colour_head.parameters(), *shape_head.parameters()]
    optimiser, schedule = _optimiser(parameters, num_steps)
    for step in range(num_steps):
        scenes = _scenes(seed, step, batch_size)
        cells = tower(_pixels(scenes, processor)).last_hidden_state[:, 1:]
        colours, shapes = _cell_classes(scenes)
        loss = F.cross_entropy(colour_head(cells).flatten(0, 1), colours)
        loss = loss + F.cross_entropy(shape_head(cells).flatten(0, 1), shapes)
        _step(loss, parameters, optimiser, schedule)
        if step % 50 == 0 or step == num_steps - 1:
            logger.info("vision: step %d/%d, loss %.4f", step, num_steps, loss.item())


def _teach_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    seed: int,
    steps: range,
    batch_size: int,
    course: Course,
) -> float:
    """Train projector and language model on the lessons of a course and return the last loss."""
    model.model.vision_tower.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser, schedule = _optimiser(parameters, len(steps))
    loss = torch.tensor(math.nan)
    for number, step in enumerate(steps):
        scenes = _scenes(seed, step, batch_size)
        mix = course.mixes[number % len(course.mixes)]
        lessons = [lesson_of(scene, mix, course.rates) for scene in scenes]
        loss = model(pixel_values=_pixels(scenes, processor), **_texts(lessons, processor)).loss
        _step(loss, parameters, optimiser, schedule)
        if number % 50 == 0 or step == steps[-1]:
            logger.info("%s: step %d/%d, loss %.4f", course.name, number, len(steps), loss.item())
    return loss.item()


def _scenes(seed: int, step: int, batch_size: int) -> list[Scene]:
    """Every scene is seen once."""
    first = FIRST_INDEX + _NUM_SENTENCE_SCENES + step * batch_size
    return [sample_scene(seed, first + number) for number in range(batch_size)]


def _pixels(scenes: Sequence[Scene], processor: LlavaProcessor) -> Tensor:
    """Return what the processor makes of the pictures, of shape (B, 3, side, side), without its cost per picture."""
    pictures = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    settings = processor.image_processor
    scaled = torch.from_numpy(pictures).float() / 255 - torch.tensor(settings.image_mean)
    return (scaled / torch.tensor(settings.image_std)).permute(0, 3, 1, 2).contiguous()


def _cell_classes(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Return classes of colour and shape for every cell, each of shape (B * cells,)."""
    classes = torch.full((2, len(scenes), NUM_CELLS), _EMPTY)
    for number, scene in enumerate(scenes):
        for item in scene.objects:
            classes[0, number, item.cell] = 1 + list(COLOURS).index(item.colour)
            classes[1, number, item.cell] = 1 + SHAPES.index(item.shape)
    return classes[0].flatten(), classes[1].flatten()


def _texts(lessons: Sequence[Lesson], processor: LlavaProcessor) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels (on the answers only), each of shape (B, T), padded behind."""
    tokenizer = processor.tokenizer
    rows, labels = [], []
    for lesson in lessons:
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": lesson.request}]}]
        opening = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        opening_ids = tokenizer.encode(opening.replace(IMAGE, IMAGE * NUM_IMAGE_TOKENS))
        answer_ids = tokenizer.encode(lesson.answer + tokenizer.eos_token)
        rows.append(torch.tensor(opening_ids + answer_ids))
        labels.append(torch.tensor([_IGNORED] * len(opening_ids) + answer_ids))
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
    }


def _optimiser(
    parameters: Sequence[nn.Parameter], num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW with a warm-up and a cosine to zero."""
    optimiser = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def factor(step: int) -> float:
        return min((step + 1) / _WARMUP_STEPS, (1 + math.cos(math.pi * step / num_steps)) / 2)

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def _step(
    loss: Tensor,
    parameters: Sequence[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    schedule.step()
    optimiser.zero_grad()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="directory of the model")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes")
    parser.add_argument("--vision-steps", type=int, default=400, help="for the vision tower alone")
    for name, num_steps in NUM_STEPS.items():
        parser.add_argument(f"--{name}-steps", type=int, default=num_steps, help=f"of the course {name}")
    parser.add_argument("--batch-size", type=int, default=64, help="scenes per step, each seen once")
    parser.add_argument("--threads", type=int, default=1, help="of torch; part of what decides the weights")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    pretrain(
        options.out,
        seed=options.seed,
        num_vision_steps=options.vision_steps,
        num_steps={name: getattr(options, f"{name}_steps") for name in NUM_STEPS},
        batch_size=options.batch_size,
    )
