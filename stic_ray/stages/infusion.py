"""Stage `infusion`: instruction data whose questions carry the improved model's own description (STIC Algorithm 2).

With `infusion.describe=false`, a control, the questions stay as they are, and no model is loaded.

Rows with an image go to rows-*.parquet, which TRL's SFTTrainer takes as they are; rows without one are passed
through to text-*.parquet, because TRL's collator has no place for an absent image in an image column.
"""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from stic_ray.core.config import IMAGE_SETTINGS, InfusionConfig, RunConfig
from stic_ray.core.errors import ModelError, SourceError, nearest
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
from stic_ray.method.infusion import Messages, infuse, read_conversation
from stic_ray.method.preferences import Rejection
from stic_ray.method.prompts import PromptSet, load_prompts
from stic_ray.stages.fetch import fetched
from stic_ray.stages.records import folder_of, image_place, load_records, read_records
from stic_ray.stages.shards import ShardJob, ShardTask, rejected_row, run_shards
from stic_ray.stages.windows import Rows

_CONVERSATIONS = "conversations"
_ROWS = pa.schema(
    [("id", pa.string()), ("path", pa.string()), ("row", pa.int64()), ("problem", pa.string()), ("turns", pa.string())]
)


def build_infusion(step: StepRun) -> dict[str, Any]:
    """Write infused, text-only and rejected shards into the step's folder and return the manifest's row accounts.

    Raises SourceError when the source is missing or of another format, or when no row is left.
    """
    config, output = step.config, step.output
    rows = _sample(read_instructions(config.infusion), config)
    size = config.pool.shard_size
    tasks = [
        ShardTask(number, {"rows": rows[start : start + size]})
        for number, start in enumerate(range(0, len(rows), size))
    ]
    job = ShardJob(
        stage=step.name,
        output=output,
        families={REJECTED_FAMILY: REJECTED, "text": INFUSED, "rows": INFUSED},
        load=lambda task: load_records(task.payload["rows"], _ROWS),
        make_worker=partial(Infuser, config, load_prompts(config.prompts), step.model()),
    )
    actors = config.actors.model_copy(update={"num_gpus": _need(config).each["GPU"]})
    throughput = run_shards(job, tasks, actors)
    accounts = row_counts(len(rows), output.num_rows(["rows", "text"]), output.rejected_by_reason())
    if not accounts["num_rows_written"]:
        raise SourceError(
            f"Not one of {len(rows)} instruction rows could be used: {accounts['rejected_by_reason']}. "
            f"The rejected rows are in '{output.uri}'; delete that folder to try again with other settings."
        )
    return {**accounts, "num_text_only_rows": output.num_rows(["text"]), "throughput": throughput}


def read_instructions(config: InfusionConfig) -> list[dict[str, Any]]:
    """Return the rows of the source: id, where the image is (`path`, `row`; both None without one), turns as JSON.

    Raises SourceError when the source is missing or of another format.
    """
    setting = f"infusion.source='{config.source}'"
    source, rows = read_records(config.source, "infusion.source")
    if not any(_CONVERSATIONS in row for row in rows):
        names = list(rows[0])
        raise SourceError(
            f"{setting} has no '{_CONVERSATIONS}'.{nearest(_CONVERSATIONS, names)} Its columns: {', '.join(names)}."
        )
    if config.images and not Location.of(config.images).is_folder():
        raise SourceError(f"infusion.images='{config.images}' is no folder.")
    folder = Location.of(config.images) if config.images else folder_of(source)
    return [
        {
            "id": str(row.get("id", number)),
            **image_place(row, source, folder),
            "turns": json.dumps(row.get(_CONVERSATIONS)),
        }
        for number, row in enumerate(rows)
    ]


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
                Request(self.prompts.describe, p["picture"], seed_for(self.config.seed, p["id"], "infusion"))
                for p in seen
            ]
            found = [(answer, answer.num_added_tokens) for answer in self.engine.generate(requests, self.sampling)]
        of_pictures = iter(found)
        return [
            p
            if isinstance(p, Rejection)
            else self._finish(p, *(next(of_pictures) if p["picture"] is not None else (None, 0)))
            for p in prepared
        ]

    def _prepare(self, row: dict[str, Any]) -> dict[str, Any] | Rejection:
        messages = read_conversation(json.loads(row["turns"]))
        if isinstance(messages, Rejection):
            return messages
        if row["problem"] is not None:
            return Rejection(Reason.SEVERAL_IMAGES, row["problem"])
        found = {"id": row["id"], "messages": messages, "picture": None, "image": None}
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
            "description_prompt": self.prompts.describe if answer else None,
            "finish_reason": answer.finish_reason if answer else None,
            "num_sequence_tokens": length,
            "model": self.engine.name if self.engine else None,
        }


def _sample(rows: list[dict[str, Any]], config: RunConfig) -> list[dict[str, Any]]:
    """Return `infusion.num_rows` rows drawn by the run's seed, in the order of the source."""
    wanted = config.infusion.num_rows
    if wanted is None or wanted >= len(rows):
        return rows
    drawn = sorted(range(len(rows)), key=lambda number: seed_for(config.seed, str(number), "instructions"))
    return [rows[number] for number in sorted(drawn[:wanted])]


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
    settings=("seed", "prompts", "model", "infusion", "sft.max_length_tokens", *IMAGE_SETTINGS),
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
