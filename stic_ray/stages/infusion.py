"""Stage `infusion`: instruction data whose questions carry the improved model's own description (STIC Algorithm 2).

With `infusion.describe=false`, a control, the questions stay as they are, and no model is loaded.

Rows with an image go to rows-*.parquet, which TRL's SFTTrainer takes as they are; rows without one are passed
through to text-*.parquet, because TRL's collator has no place for an absent image in an image column.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from stic_ray.core.config import ANSWER_SETTINGS, IMAGE_SETTINGS, RunConfig
from stic_ray.core.errors import ModelError, SourceError
from stic_ray.core.outcomes import Rejected
from stic_ray.core.placement import Need, actors_need
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import REJECTED_FAMILY, row_counts
from stic_ray.core.schemas import INFUSED, REJECTED, Reason
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import BYTES_PER_TEXT_TOKEN, Sizes, Work
from stic_ray.engines.base import Answer, Request, Sampling, TokenCounter
from stic_ray.engines.opening import open_counter, open_engine
from stic_ray.engines.watched import WatchedEngine
from stic_ray.method.images import ImageLimits, decode_for_storage
from stic_ray.method.infusion import Messages, description_prompt, infuse
from stic_ray.method.preferences import Rejection
from stic_ray.method.prompts import PromptSet, load_prompts
from stic_ray.stages.fetch import fetched
from stic_ray.stages.instructions import index_instructions, load_instructions, read_instructions
from stic_ray.stages.shards import ShardJob, rejected_row, run_shards
from stic_ray.stages.windows import Rows


def build_infusion(step: StepRun) -> dict[str, Any]:
    """Write infused, text-only and rejected shards into the step's folder and return the manifest's row accounts.

    Raises SourceError when the source is missing or of another format, or when no row is left.
    """
    config, output = step.config, step.output
    tasks, num_rows = index_instructions(config, output)
    job = ShardJob(
        stage=step.name,
        output=output,
        families={REJECTED_FAMILY: REJECTED, "text": INFUSED, "rows": INFUSED},
        load=partial(load_instructions, max_bytes=ImageLimits.of(config.pool).max_bytes),
        make_worker=partial(Infuser, config, load_prompts(config.prompts), step.model()),
    )
    actors = config.actors.model_copy(update={"num_gpus": _need(config).each["GPU"]})
    throughput = run_shards(job, tasks, actors)
    accounts = row_counts(num_rows, output.num_rows(["rows", "text"]), output.rejected_by_reason())
    if not accounts["num_rows_written"]:
        raise SourceError(
            f"Not one of {num_rows} instruction rows could be used: {accounts['rejected_by_reason']}. "
            f"The rejected rows are in '{output.uri}'; delete that folder to try again with other settings."
        )
    return {**accounts, "num_text_only_rows": output.num_rows(["text"]), "throughput": throughput}


class Infuser:
    """Infuses the rows of a window; owns the model that describes."""

    def __init__(self, config: RunConfig, prompts: PromptSet, checkpoint: Location | None) -> None:
        """Load the model that `dpo` left in `checkpoint`, the base model, or none where nothing is described."""
        self.config = config
        self.prompts = prompts
        self.engine: WatchedEngine | None = None
        if config.infusion.describe:
            self.engine = open_engine(config.model, config.actors, checkpoint.local_copy() if checkpoint else None)
        self.counter: TokenCounter = self.engine or open_counter(config.model)
        self.sampling = Sampling(config.infusion.max_new_tokens, config.infusion.temperature)
        self.limits = ImageLimits.of(config.pool)

    def __call__(self, window: list[dict[str, Any]]) -> Rows:
        """Return infused, text-only and rejected rows, together as many as the window has."""
        found: Rows = {REJECTED_FAMILY: [], "text": [], "rows": []}
        for row, result in zip(window, self._infuse_all(window), strict=True):
            if isinstance(result, Rejection):
                found[REJECTED_FAMILY].append(rejected_row(row["id"], row["path"] or "", result))
            else:
                found["rows" if result["image"] else "text"].append(result)
        return found

    def reject(self, row: dict[str, Any], rejection: Rejection) -> Rows:
        """Return the rejected row of an instruction."""
        return {REJECTED_FAMILY: [rejected_row(row["id"], row["path"] or "", rejection)]}

    def _infuse_all(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | Rejection]:
        prepared = [self._prepare(row) for row in rows]
        seen = [p for p in prepared if not isinstance(p, Rejection) and p["picture"] is not None]
        if self.engine is None:
            counts = self.counter.count_added_tokens([p["picture"] for p in seen])
            found: list[tuple[Answer | None, int]] = [(None, count) for count in counts]
        else:
            requests = [
                Request(self._prompt(p), p["picture"], seed_for(self.config.seed, p["id"], "infusion")) for p in seen
            ]
            found = [(answer, answer.num_added_tokens) for answer in self.engine.generate(requests, self.sampling)]
        of_pictures = iter(found)
        return [
            p
            if isinstance(p, Rejection)
            else self._finish(p, *(next(of_pictures) if p["picture"] is not None else (None, 0)))
            for p in prepared
        ]

    def _prompt(self, row: dict[str, Any]) -> str:
        return description_prompt(row["id"], self.config.seed, self.config.infusion, self.prompts)

    def _prepare(self, row: dict[str, Any]) -> dict[str, Any] | Rejection:
        if row["reason"] is not None:
            return Rejection(Reason(row["reason"]), row["problem"])
        found = {"id": row["id"], "messages": row["messages"], "picture": None, "image": None}
        if row["path"] is None:
            return found
        try:
            picture, stored = decode_for_storage(fetched(row), self.limits)
        except Rejected as error:
            return Rejection(error.reason, error.message)
        return {**found, "picture": picture, "image": {"bytes": stored, "path": row["path"]}}

    def _finish(self, row: dict[str, Any], answer: Answer | None, num_added_tokens: int) -> dict[str, Any] | Rejection:
        messages: Messages = row["messages"]
        if answer is not None:
            if not answer.text:
                return Rejection(Reason.EMPTY_ANSWER, "the description is empty")
            if answer.finish_reason == "length" and not self.config.infusion.allow_truncated:
                limit = self.config.infusion.max_new_tokens
                return Rejection(
                    Reason.TRUNCATED_ANSWER, f"the description was cut off at infusion.max_new_tokens={limit}"
                )
            messages = infuse(messages, answer.text, self.prompts)
        try:
            length = self.counter.count_text_tokens(messages, with_image=row["picture"] is not None)
        except ModelError as error:
            return Rejection(Reason.BAD_CONVERSATION, str(error))
        length += num_added_tokens
        limit = self.config.sft.max_length_tokens
        if length > limit:
            return Rejection(Reason.TOO_LONG, f"{length} tokens, more than sft.max_length_tokens={limit}")
        return {
            "id": row["id"],
            "image": row["image"],
            "messages": messages,
            "description": answer.text if answer else None,
            "description_prompt": self._prompt(row) if answer else None,
            "finish_reason": answer.finish_reason if answer else None,
            "num_sequence_tokens": length,
            "model": self.engine.name if self.engine else None,
        }


def _need(config: RunConfig) -> Need:
    """Return the actors; without a model a GPU would only be held."""
    need = actors_need(config)
    return need if config.infusion.describe else replace(need, each={**need.each, "GPU": 0.0})


def _check(step: StepRun) -> None:
    read_instructions(step.config.infusion)


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    if not sizes.num_instructions:
        return None
    writes = min(sizes.num_answer_tokens, config.infusion.max_new_tokens)
    requests = ((1, sizes.num_prompt_tokens, writes),) if config.infusion.describe else ()
    stored = sizes.image_bytes + BYTES_PER_TEXT_TOKEN * 2 * writes
    return Work(sizes.num_instructions, requests, storage_bytes=sizes.num_instructions * stored)


INFUSION = Stage(
    name="infusion",
    run=build_infusion,
    settings=("seed", "prompts", "model", "infusion", "sft.max_length_tokens", *IMAGE_SETTINGS, *ANSWER_SETTINGS),
    need=_need,
    writes="rows-*.parquet",
    section="infusion",
    reads=("model",),
    sources=("infusion.source",),
    check=_check,
    work=_work,
    amount="num_instructions",
    amount_in_manifest="num_rows_in",
)
