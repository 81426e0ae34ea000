"""Stage `candidates`: several answers of each image, for scorers to look at and rules to choose from."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from PIL import Image

from stic_ray.core.config import ANSWER_SETTINGS, DRAWN, RunConfig
from stic_ray.core.errors import ConfigError
from stic_ray.core.placement import actors_need
from stic_ray.core.randomness import seed_for
from stic_ray.core.schemas import CANDIDATES as TABLE
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import BYTES_PER_TEXT_TOKEN, Sizes, Work, images_used
from stic_ray.engines.base import Answer, Request, Sampling
from stic_ray.engines.opening import open_trained
from stic_ray.method.candidates import candidate_prompts, filed_under, usable
from stic_ray.method.images import decode_for_storage
from stic_ray.method.preferences import AnswerText
from stic_ray.method.prompts import PromptSet, load_prompts
from stic_ray.stages.fetch import fetched, indexed_tasks, load_drawn, num_drawn
from stic_ray.stages.shards import ShardJob, check_written, run_shards
from stic_ray.stages.windows import Rows


def build_candidates(step: StepRun) -> dict[str, Any]:
    """Write candidates and rejected shards into the step's folder and return the manifest's row accounts.

    A row in is an image, whatever it gives; the candidates are counted beside. Raises SourceError when no image has
    any.
    """
    config, output = step.config, step.output
    tasks = indexed_tasks(step.inputs["index"], config.pool.shard_size, config.candidates.num_images)
    num_images = num_drawn(step.name, tasks, config)
    job = ShardJob(
        stage=step.name,
        output=output,
        families={"candidates": TABLE},
        load=partial(load_drawn, config=config),
        make_worker=partial(Answerer, config, load_prompts(config.prompts), step.model()),
        max_failed_share=config.cluster.max_failed_share,
    )
    accounts = run_shards(job, tasks, config.actors).accounts_by_image(num_images, "candidates")
    check_written(accounts, output, f"Not one of {num_images} images has candidates")
    return accounts


class _Asked(NamedTuple):
    """An image on its way to its answers."""

    row: dict[str, Any]
    picture: Image.Image
    prompts: list[str]


class Answerer:
    """Answers several times; owns the model."""

    def __init__(self, config: RunConfig, prompts: PromptSet, checkpoint: Location | None) -> None:
        """Load the base model of the run, or what a training step left in `checkpoint`."""
        self.config = config
        self.prompts = prompts
        self.engine = open_trained(config, checkpoint)
        settings = config.candidates
        self.sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """Return the image's id and path."""
        return [{"image_id": row["image_id"], "path": row["path"]}]

    def prepare(self, row: dict[str, Any]) -> _Asked:
        """Decode the image, and draw its prompts."""
        prompts = candidate_prompts(row["image_id"], self.config.seed, self.config.candidates, self.prompts)
        return _Asked(row, decode_for_storage(fetched(row))[0], prompts)

    def answer(self, prepared: Sequence[_Asked]) -> list[list[Answer]]:
        """Return the answers of each image by number; those to one prompt travel together, so that it is read once."""
        seed, num_parts = self.config.seed, len(self.config.candidates.prompts)
        numbers = sorted(range(self.config.candidates.num_candidates), key=lambda number: (number % num_parts, number))
        requests = [
            Request(each.prompts[number], each.picture, seed_for(seed, image_id, f"candidate {number}"), image_id)
            for each in prepared
            for image_id in [each.row["image_id"]]
            for number in numbers
        ]
        answers = iter(self.engine.generate(requests, self.sampling))
        by_number = [dict(zip(numbers, [next(answers) for _ in numbers], strict=True)) for _ in prepared]
        return [[found[number] for number in range(len(numbers))] for found in by_number]

    def finish(self, prepared: _Asked, answer: list[Answer]) -> Rows:
        """Return the candidates that can be used."""
        row, config = prepared.row, self.config
        texts = [AnswerText(each.text, each.num_tokens, each.finish_reason) for each in answer]
        return {
            "candidates": [
                {
                    "image_id": row["image_id"],
                    "position": row["position"],
                    "number": number,
                    "prompt": prepared.prompts[number],
                    "filed_under": filed_under(row["image_id"], config.seed, self.prompts),
                    "text": answer[number].text,
                    "num_tokens": answer[number].num_tokens,
                    "finish_reason": answer[number].finish_reason,
                    "num_image_tokens": answer[number].num_image_tokens,
                    "num_added_tokens": answer[number].num_added_tokens,
                    "model": self.engine.name,
                    "model_revision": self.engine.revision,
                    "seed": config.seed,
                }
                for number in usable(texts, config.candidates)
            ]
        }


def _check(step: StepRun) -> None:
    settings = step.config.candidates
    if settings.temperature == 0 and settings.num_candidates > len(set(settings.prompts)):
        raise ConfigError(
            f"candidates.temperature=0 gives equal answers to equal prompts, and {settings.num_candidates} candidates "
            f"share {len(set(settings.prompts))} prompts an image; set a temperature, 0.7 is usual."
        )


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    settings = config.candidates
    num_images = images_used(config, sizes, settings.num_images)
    if not num_images:
        return None
    writes = min(sizes.num_answer_tokens, settings.max_new_tokens)
    reads = sizes.num_prompt_tokens * len(set(settings.prompts)) / settings.num_candidates  # each prompt once
    stored = BYTES_PER_TEXT_TOKEN * settings.num_candidates * writes
    return Work(num_images, ((settings.num_candidates, reads, writes),), storage_bytes=num_images * stored)


CANDIDATES = Stage(
    name="candidates",
    run=build_candidates,
    settings=("seed", "prompts", "model", "candidates", *DRAWN, *ANSWER_SETTINGS),
    need=actors_need,
    writes="candidates-*.parquet",
    section="candidates",
    reads=("index", "model"),
    check=_check,
    work=_work,
    amount="num_images",
    grows=True,
)
