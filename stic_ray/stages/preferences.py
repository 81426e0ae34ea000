"""Stage `preferences`: from the index to preference pairs (STIC Algorithm 1, first stage)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
from PIL import Image

from stic_ray.core.config import ANSWER_SETTINGS, RunConfig
from stic_ray.core.errors import ConfigError, SourceError
from stic_ray.core.placement import actors_need
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import read_shard
from stic_ray.core.schemas import INDEX, PAIRS
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import BYTES_PER_TEXT_TOKEN, Sizes, Work, pair_tokens
from stic_ray.engines.base import Answer, AnsweredPair, Request, Sampling
from stic_ray.engines.opening import open_engine
from stic_ray.method.images import decode_for_storage
from stic_ray.method.preferences import (
    AnswerText,
    PairPlan,
    judge_pair,
    pair_row,
    picture_for_rejected,
    plan_pair,
)
from stic_ray.method.prompts import PromptSet, load_prompts
from stic_ray.stages.extents import index_shards
from stic_ray.stages.fetch import fetch_indexed, fetched, with_images
from stic_ray.stages.shards import ShardJob, ShardTask, run_shards
from stic_ray.stages.windows import Rows


def build_preferences(step: StepRun) -> dict[str, Any]:
    """Write pairs and rejected shards into the step's folder and return the manifest's row accounts.

    Raises SourceError when not one pair is left.
    """
    config, output = step.config, step.output
    shards = index_shards(step.inputs["index"], config.pool.shard_size, config.preferences.num_images)
    num_images = sum(shard.num_rows for shard in shards)
    tasks = [ShardTask(s.number, {"index": s.location.uri, "num_rows": s.num_rows}, s.num_bytes) for s in shards]
    job = ShardJob(
        stage=step.name,
        output=output,
        families={"pairs": PAIRS},
        load=lambda task: _load_shard(task, config.pool.image_column),
        make_worker=partial(PairMaker, config, load_prompts(config.prompts), step.model()),
        max_failed_share=config.cluster.max_failed_share,
    )
    done = run_shards(job, tasks, config.actors)
    accounts = done.accounts(num_images, ["pairs"])
    if not accounts["num_rows_written"]:
        raise SourceError(
            f"Not one of {num_images} images gave a preference pair: {accounts['rejected_by_reason']}. "
            f"The rejected rows are in '{output.uri}'; delete that folder to try again with other settings."
        )
    return {**accounts, "throughput": done.throughput}


@dataclass(frozen=True)
class _Candidate:
    """An image on its way to a pair."""

    row: dict[str, Any]
    plan: PairPlan
    clean: Image.Image
    stored: bytes
    for_rejected: Image.Image
    pixel_change: float | None


class _Answers(NamedTuple):
    chosen: Answer
    rejected: Answer


class PairMaker:
    """Makes a pair of an image; owns the model."""

    def __init__(self, config: RunConfig, prompts: PromptSet, checkpoint: Location | None = None) -> None:
        """Load the base model of the run, or what a training step left in `checkpoint`."""
        self.config = config
        self.prompts = prompts
        self.engine = open_engine(config.model, config.actors, checkpoint.local_copy() if checkpoint else None)
        self.sampling = Sampling(
            config.preferences.max_new_tokens, config.preferences.temperature, config.preferences.top_p
        )

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """Return the image's id and path."""
        return [{"image_id": row["image_id"], "path": row["path"]}]

    def prepare(self, row: dict[str, Any]) -> _Candidate:
        """Decode the image, plan its pair and corrupt a copy of it."""
        clean, stored = decode_for_storage(fetched(row))
        plan = plan_pair(row["image_id"], self.config.seed, self.config.preferences, self.prompts)
        return _Candidate(row, plan, clean, stored, *picture_for_rejected(plan, clean))

    def answer(self, prepared: Sequence[_Candidate]) -> list[_Answers]:
        """Return the preferred and the dispreferred answer of each image."""
        requests = [request for candidate in prepared for request in self._requests(candidate)]
        answers = self.engine.generate(requests, self.sampling)
        return [_Answers(*answers[2 * place : 2 * place + 2]) for place in range(len(prepared))]

    def finish(self, prepared: _Candidate, answer: _Answers) -> Rows:
        """Return the pair."""
        return {"pairs": [self._pair(prepared, *answer)]}

    def complete(self, finished: Sequence[tuple[_Candidate, Rows]]) -> None:
        """Add the log-probabilities of both answers to the pairs, where they are asked for."""
        if not self.config.preferences.reference_logps:
            return
        pairs = [(candidate, rows["pairs"][0]) for candidate, rows in finished]
        asked = [
            AnsweredPair(
                candidate.clean,
                *(pair[side][0]["content"] for side in ("prompt", "chosen", "rejected")),
                *(pair[f"{side}_finish_reason"] == "length" for side in ("chosen", "rejected")),
            )
            for candidate, pair in pairs
        ]
        for (_, pair), (chosen, rejected) in zip(pairs, self.engine.score_pairs(asked), strict=True):
            pair |= {"reference_chosen_logp": chosen, "reference_rejected_logp": rejected}

    def _requests(self, candidate: _Candidate) -> tuple[Request, Request]:
        """The two requests of an image travel next to each other, in one batch where that has room."""
        identity, seed = candidate.row["image_id"], self.config.seed
        return (
            Request(candidate.plan.chosen_prompt, candidate.clean, seed_for(seed, identity, "chosen"), identity),
            Request(
                candidate.plan.rejected_prompt, candidate.for_rejected, seed_for(seed, identity, "rejected"), identity
            ),
        )

    def _pair(self, candidate: _Candidate, chosen: Answer, rejected: Answer) -> dict[str, Any]:
        def count_tokens(answer: str) -> int:
            conversation = [
                {"role": "user", "content": candidate.plan.prompt},
                {"role": "assistant", "content": answer},
            ]
            return self.engine.count_text_tokens(conversation, with_image=True) + chosen.num_added_tokens

        preferred, dispreferred = _text_of(chosen), _text_of(rejected)
        length = judge_pair(
            preferred,
            dispreferred,
            self.config.preferences,
            count_tokens=count_tokens,
            max_length_tokens=self.config.dpo.max_length_tokens,
        )
        return {
            "image_id": candidate.row["image_id"],
            "position": candidate.row["position"],
            "image": {"bytes": candidate.stored, "path": candidate.row["path"]},
            **pair_row(candidate.plan, preferred, dispreferred),
            "pixel_change": candidate.pixel_change,
            "num_image_tokens": chosen.num_image_tokens,
            "num_sequence_tokens": length,
            "reference_chosen_logp": None,
            "reference_rejected_logp": None,
            "model": self.engine.name,
            "model_revision": self.engine.revision,
            "seed": self.config.seed,
        }


def _text_of(answer: Answer) -> AnswerText:
    return AnswerText(answer.text, answer.num_tokens, answer.finish_reason)


def _load_shard(task: ShardTask, image_column: str) -> pa.Table:
    index = read_shard(Location.of(task.payload["index"]), INDEX).slice(0, task.payload["num_rows"])
    return with_images(index, fetch_indexed(index.to_pylist(), image_column))


def _check(step: StepRun) -> None:
    model = step.config.model
    if step.config.preferences.reference_logps and model.engine != "transformers":
        raise ConfigError(
            "preferences.reference_logps=true needs model.engine=transformers, which scores answers; "
            f"model.engine={model.engine} does not."
        )


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    if not sizes.num_images:
        return None
    reads, writes = 2 * sizes.num_prompt_tokens, min(sizes.num_answer_tokens, config.preferences.max_new_tokens)
    if config.model.engine == "vllm":  # the image of both clean requests is computed once
        reads -= config.preferences.hallucination_share * sizes.model.num_image_tokens
    if config.preferences.reference_logps:
        reads += pair_tokens(sizes.num_prompt_tokens, writes, shared_prefix=True)
    stored = sizes.image_bytes + BYTES_PER_TEXT_TOKEN * 2 * writes
    return Work(sizes.num_images, ((2, reads / 2, writes),), storage_bytes=sizes.num_images * stored)


PREFERENCES = Stage(
    name="preferences",
    run=build_preferences,
    settings=("seed", "prompts", "model", "preferences", "dpo.max_length_tokens", "pool.shard_size", *ANSWER_SETTINGS),
    need=actors_need,
    writes="pairs-*.parquet",
    section="preferences",
    reads=("index", "model"),
    check=_check,
    work=_work,
    amount="num_images",
    grows=True,
)
