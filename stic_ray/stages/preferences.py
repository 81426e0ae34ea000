"""Stage `preferences`: from the index to preference pairs (STIC Algorithm 1, first stage)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from PIL import Image

from stic_ray.core.config import ANSWER_SETTINGS, DRAWN, RunConfig
from stic_ray.core.errors import ConfigError, Rejected
from stic_ray.core.placement import actors_need
from stic_ray.core.preferences import TEXT_NEGATIVES
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import REJECTED_FAMILY
from stic_ray.core.schemas import PAIRS, REJECTED, table_of
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import BYTES_PER_TEXT_TOKEN, Sizes, Work, images_used, pair_tokens
from stic_ray.engines.base import Answer, AnsweredPrompt, Request, Sampling
from stic_ray.engines.opening import open_trained
from stic_ray.method.images import decode_for_storage
from stic_ray.method.preferences import (
    NO_CANDIDATES,
    AnswerText,
    PairPlan,
    answer_columns,
    borrowed,
    judge_pair,
    pair_row,
    picture_for_rejected,
    plan_pair,
    swapped,
)
from stic_ray.method.prompts import PromptSet, load_prompts
from stic_ray.stages.fetch import fetched, indexed_tasks, load_drawn, num_drawn
from stic_ray.stages.shards import ShardJob, check_written, run_shards
from stic_ray.stages.windows import Rows, Tables


def build_preferences(step: StepRun) -> dict[str, Any]:
    """Write pairs and rejected shards into the step's folder and return the manifest's row accounts.

    Raises SourceError when not one pair is left.
    """
    config, output = step.config, step.output
    tasks = indexed_tasks(step.inputs["index"], config.pool.shard_size, config.preferences.num_images)
    num_images = num_drawn(step.name, tasks, config)
    job = ShardJob(
        stage=step.name,
        output=output,
        families={"pairs": PAIRS},
        load=partial(load_drawn, config=config),
        make_worker=partial(PairMaker, config, load_prompts(config.prompts), step.model()),
        max_failed_share=config.cluster.max_failed_share,
    )
    accounts = run_shards(job, tasks, config.actors).accounts(num_images)
    check_written(accounts, output, f"Not one of {num_images} images gave a preference pair")
    return accounts


class _Candidate(NamedTuple):
    """An image on its way to a pair."""

    row: dict[str, Any]
    plan: PairPlan
    clean: Image.Image
    stored: bytes
    for_rejected: Image.Image
    pixel_change: float | None


_NOT_YET = AnswerText("", 0, "stop")
"""Stands for another image's answer until that is there."""


class PairMaker:
    """Makes a pair of an image; owns the model."""

    def __init__(self, config: RunConfig, prompts: PromptSet, checkpoint: Location | None = None) -> None:
        """Load the base model of the run, or what a training step left in `checkpoint`."""
        self.config = config
        self.prompts = prompts
        self.engine = open_trained(config, checkpoint)
        settings = config.preferences
        self.sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """Return the image's id and path."""
        return [{"image_id": row["image_id"], "path": row["path"]}]

    def prepare(self, row: dict[str, Any]) -> _Candidate:
        """Decode the image, plan its pair and corrupt a copy of it."""
        clean, stored = decode_for_storage(fetched(row))
        plan = plan_pair(row["image_id"], self.config.seed, self.config.preferences, self.prompts, row["position"])
        return _Candidate(row, plan, clean, stored, *picture_for_rejected(plan, clean))

    def answer(self, prepared: Sequence[_Candidate]) -> list[tuple[Answer, Answer | None]]:
        """Return the preferred answer of each image, and the dispreferred one where that is asked for.

        Its two requests travel next to each other, in one batch where that has room.
        """
        requests = [
            Request(prompt, picture, seed_for(self.config.seed, each.row["image_id"], side), each.row["image_id"])
            for each in prepared
            for side, prompt, picture in (
                ("chosen", each.plan.chosen_prompt, each.clean),
                ("rejected", each.plan.rejected_prompt, each.for_rejected),
            )
            if side == "chosen" or each.plan.asks_twice
        ]
        answers = iter(self.engine.generate(requests, self.sampling))
        return [(next(answers), next(answers) if each.plan.asks_twice else None) for each in prepared]

    def finish(self, prepared: _Candidate, answer: tuple[Answer, Answer | None]) -> Rows:
        """Return the pair; one with another image's answer waits for that until `close_shard`."""
        row, plan, (first, second) = prepared.row, prepared.plan, answer
        chosen = _text_of(first)
        rejected = _text_of(second) if second else None
        count_tokens = self._counter(plan.prompt, first.num_added_tokens)
        length = self._judge(chosen, rejected, count_tokens)
        if plan.negative == "text_swap":
            rejected = swapped(chosen, row["image_id"], self.config.seed, count_tokens)
            length = self._judge(chosen, rejected, count_tokens)
        pair = {
            "image_id": row["image_id"],
            "position": row["position"],
            "image": {"bytes": prepared.stored, "path": row["path"]},
            **pair_row(plan, chosen, rejected or _NOT_YET),
            "pixel_change": prepared.pixel_change,
            **NO_CANDIDATES,
            "num_image_tokens": first.num_image_tokens,
            "num_sequence_tokens": length,
            "reference_chosen_logp": None,
            "reference_rejected_logp": None,
            "model": self.engine.name,
            "model_revision": self.engine.revision,
            "seed": self.config.seed,
        }
        return {"pairs": [pair]}

    def complete(self, finished: Sequence[tuple[_Candidate, Rows]]) -> None:
        """Add the log-probabilities of both answers to the pairs, where they are asked for."""
        if not self.config.preferences.reference_logps:
            return
        pairs = [(candidate, rows["pairs"][0]) for candidate, rows in finished]
        asked = [
            AnsweredPrompt(
                pair["prompt"][0]["content"],
                candidate.clean,
                tuple(pair[side][0]["content"] for side in ("chosen", "rejected")),
                tuple(pair[f"{side}_finish_reason"] == "length" for side in ("chosen", "rejected")),
            )
            for candidate, pair in pairs
        ]
        for (_, pair), (chosen, rejected) in zip(pairs, self.engine.score_answers(asked), strict=True):
            pair |= {"reference_chosen_logp": chosen, "reference_rejected_logp": rejected}

    def close_shard(self, tables: Tables) -> Tables:
        """Give the pairs that wait for it the preferred answer of another image of the shard."""
        if "other_image" not in self.config.preferences.shares:
            return tables
        pairs, rejected = tables["pairs"].to_pylist(), tables[REJECTED_FAMILY].to_pylist()
        answers = [AnswerText.in_pair(pair, "chosen") for pair in pairs]
        kept = []
        for pair in pairs:
            try:
                kept.append(pair if pair["negative"] != "other_image" else self._with_other(pair, answers))
            except Rejected as error:
                why = {"reason": error.reason, "message": error.message}
                rejected.append({"image_id": pair["image_id"], "path": pair["image"]["path"], **why})
        return {**tables, "pairs": table_of(kept, PAIRS), REJECTED_FAMILY: table_of(rejected, REJECTED)}

    def _with_other(self, pair: dict[str, Any], answers: Sequence[AnswerText]) -> dict[str, Any]:
        chosen, prompt = AnswerText.in_pair(pair, "chosen"), pair["prompt"][0]["content"]
        other = borrowed(chosen.text, pair["image_id"], self.config.seed, answers)
        num_added_tokens = pair["num_sequence_tokens"] - self._counter(prompt, 0)(chosen.text)
        length = self._judge(chosen, other, self._counter(prompt, num_added_tokens))
        return {**pair, **answer_columns("rejected", other), "num_sequence_tokens": length}

    def _counter(self, prompt: str, num_added_tokens: int) -> Callable[[str], int]:
        """Return what gives the length of the training sequence for an answer's text."""

        def count_tokens(text: str) -> int:
            conversation = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            return self.engine.count_text_tokens(conversation, with_image=True) + num_added_tokens

        return count_tokens

    def _judge(self, chosen: AnswerText, rejected: AnswerText | None, count_tokens: Callable[[str], int]) -> int:
        limit = self.config.dpo.max_length_tokens
        settings = self.config.preferences
        return judge_pair(chosen, rejected, settings, count_tokens=count_tokens, max_length_tokens=limit)


def _text_of(answer: Answer) -> AnswerText:
    return AnswerText(answer.text, answer.num_tokens, answer.finish_reason)


def _check(step: StepRun) -> None:
    model = step.config.model
    if step.config.preferences.reference_logps and model.engine != "transformers":
        raise ConfigError(
            "preferences.reference_logps=true needs model.engine=transformers, which scores answers; "
            f"model.engine={model.engine} does not."
        )


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    num_images = images_used(config, sizes, config.preferences.num_images)
    if not num_images:
        return None
    shares = config.preferences.shares
    num_requests = 2 - sum(shares.get(kind, 0.0) for kind in TEXT_NEGATIVES)
    writes = min(sizes.num_answer_tokens, config.preferences.max_new_tokens)
    reads = num_requests * sizes.num_prompt_tokens
    if config.model.engine == "vllm":  # the image of both clean requests is computed once
        reads -= shares.get("hallucination_prompt", 0.0) * sizes.model.num_image_tokens
    if config.preferences.reference_logps:
        reads += pair_tokens(sizes.num_prompt_tokens, writes, shared_prefix=True)
    stored = sizes.image_bytes + BYTES_PER_TEXT_TOKEN * 2 * writes
    requests = ((num_requests, reads / num_requests, writes),)
    return Work(num_images, requests, storage_bytes=num_images * stored)


PREFERENCES = Stage(
    name="preferences",
    run=build_preferences,
    settings=("seed", "prompts", "model", "preferences", "dpo.max_length_tokens", *DRAWN, *ANSWER_SETTINGS),
    need=actors_need,
    writes="pairs-*.parquet",
    section="preferences",
    reads=("index", "model"),
    check=_check,
    work=_work,
    amount="num_images",
    grows=True,
)
