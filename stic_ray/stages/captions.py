"""Stage `captions`: what a model writes about the pool's images, as a caption of its own or as answers to a task.

A step adds a folder of captions; those of earlier rounds stay as they are, and stage `corpus` reads them all.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from PIL import Image

from stic_ray.core.config import ANSWER_SETTINGS, DRAWN, RunConfig
from stic_ray.core.errors import Rejected
from stic_ray.core.placement import actors_need
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import REJECTED_FAMILY
from stic_ray.core.schemas import CAPTIONS, Reason
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import BYTES_PER_TEXT_TOKEN, NUM_UNITS, Sizes, Work, images_used
from stic_ray.engines.base import Answer, Request, Sampling
from stic_ray.engines.opening import open_trained
from stic_ray.method.captions import caption_prompts
from stic_ray.method.images import decode_for_storage
from stic_ray.method.prompts import PromptSet, load_prompts
from stic_ray.method.questions import check_majority, majority_of
from stic_ray.stages.fetch import fetched, indexed_tasks, load_drawn, num_drawn
from stic_ray.stages.shards import ShardJob, check_written, run_shards
from stic_ray.stages.windows import Rows


def build_captions(step: StepRun) -> dict[str, Any]:
    """Write captions and rejected shards into the step's folder and return the manifest's row accounts.

    A row is what is asked about an image that is drawn: a prompt, or each question of a task. Raises SourceError when
    no image has a caption.
    """
    config, output = step.config, step.output
    tasks = indexed_tasks(step.inputs["index"], config.pool.shard_size, config.captions.num_images)
    job = ShardJob(
        stage=step.name,
        output=output,
        families={"captions": CAPTIONS},
        load=partial(load_drawn, config=config),
        make_worker=partial(Captioner, config, load_prompts(config.prompts), step.model()),
        max_failed_share=config.cluster.max_failed_share,
    )
    done = run_shards(job, tasks, config.actors)
    num_images = num_drawn(step.name, tasks, config)
    accounts = done.accounts(num_images * (len(config.captions.questions) or 1))
    check_written(accounts, output, f"Not one of {num_images} images has a caption")
    return {**accounts, NUM_UNITS: num_images}


class _Asked(NamedTuple):
    """An image on its way to its captions."""

    row: dict[str, Any]
    picture: Image.Image
    prompts: Sequence[str]


class Captioner:
    """Writes captions; owns the model."""

    def __init__(self, config: RunConfig, prompts: PromptSet, checkpoint: Location | None) -> None:
        """Load the base model of the run, or what a training step left in `checkpoint`."""
        self.config = config
        self.prompts = prompts
        self.engine = open_trained(config, checkpoint)

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """Return the image's id and path, for each of its prompts."""
        return [{"image_id": row["image_id"], "path": row["path"]}] * (len(self.config.captions.questions) or 1)

    def prepare(self, row: dict[str, Any]) -> _Asked:
        """Decode the image, and draw its prompt."""
        prompts = caption_prompts(row["image_id"], self.config.seed, self.config.captions, self.prompts)
        return _Asked(row, decode_for_storage(fetched(row))[0], prompts)

    def answer(self, prepared: Sequence[_Asked]) -> list[list[list[Answer]]]:
        """Return by image and prompt the answers; those to one prompt are neighbours, so that it is read once."""
        settings = self.config.captions
        numbers = range(settings.num_answers)
        requests = [
            Request(prompt, each.picture, self._seed(each.row["image_id"], place, number), each.row["image_id"])
            for each in prepared
            for place, prompt in enumerate(each.prompts)
            for number in numbers
        ]
        sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
        answers = iter(self.engine.generate(requests, sampling))
        return [[[next(answers) for _ in numbers] for _ in each.prompts] for each in prepared]

    def finish(self, prepared: _Asked, answer: list[list[Answer]]) -> Rows:
        """Return the captions that are kept, and a rejected row for each other."""
        where = self.identities(prepared.row)[0]
        found: dict[str, list[dict[str, Any]]] = {"captions": [], REJECTED_FAMILY: []}
        for prompt, answers in zip(prepared.prompts, answer, strict=True):
            try:
                found["captions"].append(self._caption(prepared.row, prompt, self._taken(answers)))
            except Rejected as error:
                found[REJECTED_FAMILY].append({**where, "reason": error.reason, "message": error.message})
        return {family: rows for family, rows in found.items() if rows}

    def _seed(self, image_id: str, place: int, number: int) -> int:
        settings = self.config.captions
        return seed_for(self.config.seed, image_id, f"{settings.kind} {settings.round}, {place}, {number}")

    def _taken(self, answers: Sequence[Answer]) -> Answer:
        """Return the answer that is kept. Raises Rejected where there is none."""
        settings = self.config.captions
        whole = [a for a in answers if a.finish_reason != "length" or settings.allow_truncated]
        texts = [a.text if a in whole else None for a in answers]
        if not any(text and text.strip() for text in texts):
            if whole:
                raise Rejected(Reason.EMPTY_ANSWER, "the caption is empty")
            limit = f"captions.max_new_tokens={settings.max_new_tokens}"
            raise Rejected(Reason.TRUNCATED_ANSWER, f"the caption was cut off at {limit}")
        taken = next(a for a, text in zip(answers, texts, strict=True) if text and text.strip())
        if settings.num_answers > 1:
            majority = majority_of(texts)
            check_majority(majority, settings.majority, section="captions")
            taken = next(a for a in whole if a.text.strip() == majority.answer)
        if settings.pattern is not None and not re.search(settings.pattern, taken.text):
            raise Rejected(
                Reason.NO_MATCH, f"captions.pattern={settings.pattern!r} is not found in {taken.text[:60]!r}"
            )
        return taken

    def _caption(self, row: dict[str, Any], prompt: str, answer: Answer) -> dict[str, Any]:
        settings = self.config.captions
        return {
            "image_id": row["image_id"],
            "position": row["position"],
            "round": settings.round,
            "kind": settings.kind,
            "prompt": prompt,
            "text": answer.text.strip(),
            "num_tokens": answer.num_tokens,
            "finish_reason": answer.finish_reason,
            "model": self.engine.name,
            "model_revision": self.engine.revision,
            "seed": self.config.seed,
        }


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    settings = config.captions
    num_images = images_used(config, sizes, settings.num_images)
    if not num_images:
        return None
    writes, num_prompts = min(sizes.num_answer_tokens, settings.max_new_tokens), len(settings.questions) or 1
    requests = ((num_prompts * settings.num_answers, sizes.num_prompt_tokens / settings.num_answers, writes),)
    return Work(num_images, requests, storage_bytes=num_images * num_prompts * BYTES_PER_TEXT_TOKEN * writes)


CAPTIONS_STAGE = Stage(
    name="captions",
    run=build_captions,
    settings=("seed", "prompts", "model", "captions", *DRAWN, *ANSWER_SETTINGS),
    need=actors_need,
    writes="captions-*.parquet",
    section="captions",
    reads=("index", "model"),
    work=_work,
    amount="num_images",
    grows=True,
)
