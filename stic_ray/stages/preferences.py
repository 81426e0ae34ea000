"""Stage `preferences`: from the index to preference pairs (STIC Algorithm 1, first stage)."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from PIL import Image

from stic_ray.core.config import ANSWER_SETTINGS, RunConfig
from stic_ray.core.errors import ConfigError, SourceError
from stic_ray.core.outcomes import Rejected
from stic_ray.core.placement import actors_need
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import REJECTED_FAMILY, read_shard, row_counts
from stic_ray.core.schemas import INDEX, PAIRS, REJECTED
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import BYTES_PER_TEXT_TOKEN, Sizes, Work, pair_tokens
from stic_ray.engines.base import Answer, AnsweredPair, Request, Sampling
from stic_ray.engines.opening import open_engine
from stic_ray.method.images import decode_for_storage
from stic_ray.method.preferences import (
    AnswerText,
    PairPlan,
    Rejection,
    judge_pair,
    pair_row,
    picture_for_rejected,
    plan_pair,
)
from stic_ray.method.prompts import PromptSet, load_prompts
from stic_ray.stages.extents import index_shards
from stic_ray.stages.fetch import fetch_indexed, fetched, with_images
from stic_ray.stages.shards import ShardJob, ShardTask, rejected_row, run_shards
from stic_ray.stages.windows import Rows


def build_preferences(step: StepRun) -> dict[str, Any]:
    """Write pairs and rejected shards into the step's folder and return the manifest's row accounts.

    Raises SourceError when not one pair is left.
    """
    config, output = step.config, step.output
    shards = index_shards(step.inputs["index"], config.pool.shard_size, config.preferences.num_images)
    num_images = sum(shard.num_rows for shard in shards)
    tasks = [ShardTask(s.number, {"index": s.location.uri, "num_rows": s.num_rows}) for s in shards]
    job = ShardJob(
        stage=step.name,
        output=output,
        families={REJECTED_FAMILY: REJECTED, "pairs": PAIRS},
        load=lambda task: _load_shard(task, config.pool.image_column),
        make_worker=partial(PairMaker, config, load_prompts(config.prompts), step.model()),
    )
    throughput = run_shards(job, tasks, config.actors)
    accounts = row_counts(num_images, output.num_rows(["pairs"]), output.rejected_by_reason())
    if not accounts["num_rows_written"]:
        raise SourceError(
            f"Not one of {num_images} images gave a preference pair: {accounts['rejected_by_reason']}. "
            f"The rejected rows are in '{output.uri}'; delete that folder to try again with other settings."
        )
    return {**accounts, "throughput": throughput}


@dataclass(frozen=True)
class _Candidate:
    """An image on its way to a pair."""

    row: dict[str, Any]
    plan: PairPlan
    clean: Image.Image
    stored: bytes
    for_rejected: Image.Image
    pixel_change: float | None


class PairMaker:
    """Makes the pairs of a window; owns the model."""

    def __init__(self, config: RunConfig, prompts: PromptSet, checkpoint: Location | None = None) -> None:
        """Load the base model of the run, or what a training step left in `checkpoint`."""
        self.config = config
        self.prompts = prompts
        self.engine = open_engine(config.model, config.actors, checkpoint.local_copy() if checkpoint else None)
        self.sampling = Sampling(
            config.preferences.max_new_tokens, config.preferences.temperature, config.preferences.top_p
        )

    def __call__(self, window: list[dict[str, Any]]) -> Rows:
        """Return pairs and rejected rows, together as many as the window has images."""
        found: Rows = {REJECTED_FAMILY: [], "pairs": []}
        for row, pair in zip(window, self._make_pairs(window), strict=True):
            if isinstance(pair, Rejection):
                found[REJECTED_FAMILY].append(rejected_row(row["image_id"], row["path"], pair))
            else:
                found["pairs"].append(pair)
        return found

    def reject(self, row: dict[str, Any], rejection: Rejection) -> Rows:
        """Return the rejected row of an image."""
        return {REJECTED_FAMILY: [rejected_row(row["image_id"], row["path"], rejection)]}

    def _make_pairs(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | Rejection]:
        prepared = [self._prepare(row) for row in rows]
        requests = [r for p in prepared if isinstance(p, _Candidate) for r in self._requests(p)]
        answers = iter(self.engine.generate(requests, self.sampling))
        pairs = [p if isinstance(p, Rejection) else self._finish(p, next(answers), next(answers)) for p in prepared]
        if self.config.preferences.reference_logps:
            self._score([(c, p) for c, p in zip(prepared, pairs, strict=True) if isinstance(p, dict)])
        return pairs

    def _score(self, made: list[tuple[Any, dict[str, Any]]]) -> None:
        """Add the log-probabilities of both answers to the pairs."""
        asked = [
            AnsweredPair(
                each.clean,
                *(pair[side][0]["content"] for side in ("prompt", "chosen", "rejected")),
                *(pair[f"{side}_finish_reason"] == "length" for side in ("chosen", "rejected")),
            )
            for each, pair in made
        ]
        for (_, pair), (chosen, rejected) in zip(made, self.engine.score_pairs(asked), strict=True):
            pair |= {"reference_chosen_logp": chosen, "reference_rejected_logp": rejected}

    def _prepare(self, row: dict[str, Any]) -> _Candidate | Rejection:
        try:
            clean, stored = decode_for_storage(fetched(row))
        except Rejected as error:
            return Rejection(error.reason, error.message)
        plan = plan_pair(row["image_id"], self.config.seed, self.config.preferences, self.prompts)
        picture = picture_for_rejected(plan, clean)
        return picture if isinstance(picture, Rejection) else _Candidate(row, plan, clean, stored, *picture)

    def _requests(self, candidate: _Candidate) -> tuple[Request, Request]:
        """The two requests of an image travel next to each other, in one batch where that has room."""
        identity, seed = candidate.row["image_id"], self.config.seed
        return (
            Request(candidate.plan.chosen_prompt, candidate.clean, seed_for(seed, identity, "chosen"), identity),
            Request(
                candidate.plan.rejected_prompt, candidate.for_rejected, seed_for(seed, identity, "rejected"), identity
            ),
        )

    def _finish(self, candidate: _Candidate, chosen: Answer, rejected: Answer) -> dict[str, Any] | Rejection:
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
        if isinstance(length, Rejection):
            return length
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
