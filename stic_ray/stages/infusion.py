"""Stage `infusion`: instruction data whose questions carry the improved model's own description (STIC Algorithm 2).

With `infusion.describe=false`, a control, the questions stay as they are, and no model is loaded.

Rows with an image go to rows-*.parquet, which TRL's SFTTrainer takes as they are; rows without one are passed
through to text-*.parquet, because TRL's collator has no place for an absent image in an image column.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from PIL import Image

from stic_ray.core.config import ANSWER_SETTINGS, IMAGE_SETTINGS, RunConfig
from stic_ray.core.errors import Rejected
from stic_ray.core.placement import Need, actors_need, without_gpus
from stic_ray.core.randomness import seed_for
from stic_ray.core.schemas import INFUSED, Reason
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import BYTES_PER_TEXT_TOKEN, Sizes, Work
from stic_ray.engines.base import Answer, Request, Sampling, TokenCounter
from stic_ray.engines.guarded import GuardedEngine
from stic_ray.engines.opening import open_counter, open_trained
from stic_ray.method.images import ImageLimits, decode_for_storage
from stic_ray.method.infusion import Messages, description_prompt, infuse
from stic_ray.method.prompts import PromptSet, load_prompts
from stic_ray.stages.fetch import fetched
from stic_ray.stages.instructions import image_folder, index_instructions, load_instructions, read_instructions
from stic_ray.stages.lengths import check_length, sequence_length
from stic_ray.stages.shards import ShardJob, check_written, run_shards
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
        families={"text": INFUSED, "rows": INFUSED},
        load=partial(
            load_instructions, max_bytes=ImageLimits.of(config.pool).max_bytes, root=image_folder(config.infusion)
        ),
        make_worker=partial(Infuser, config, load_prompts(config.prompts), step.model()),
        max_failed_share=config.cluster.max_failed_share,
    )
    actors = config.actors.model_copy(update={"num_gpus": _need(config).each["GPU"]})
    done = run_shards(job, tasks, actors)
    accounts = done.accounts(num_rows)
    check_written(accounts, output, f"Not one of {num_rows} instruction rows could be used")
    return {**accounts, "num_text_only_rows": done.num_rows.get("text", 0)}


class _Instruction(NamedTuple):
    """A row on its way to be infused."""

    id: str
    messages: Messages
    picture: Image.Image | None
    stored: dict[str, Any] | None
    """The image as it is written."""


class Infuser:
    """Infuses a row; owns the model that describes."""

    def __init__(self, config: RunConfig, prompts: PromptSet, checkpoint: Location | None) -> None:
        """Load the model that `dpo` left in `checkpoint`, the base model, or none where nothing is described."""
        self.config = config
        self.prompts = prompts
        self.engine: GuardedEngine | None = None
        if config.infusion.describe:
            self.engine = open_trained(config, checkpoint)
        self.counter: TokenCounter = self.engine or open_counter(config.model)
        self.sampling = Sampling(config.infusion.max_new_tokens, config.infusion.temperature)
        self.limits = ImageLimits.of(config.pool)

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """Return the instruction's id, and the path of its image."""
        return [{"image_id": row["id"], "path": row["path"] or ""}]

    def prepare(self, row: dict[str, Any]) -> _Instruction:
        """Decode the image, where there is one."""
        if row["reason"] is not None:
            raise Rejected(Reason(row["reason"]), row["problem"])
        if row["path"] is None:
            return _Instruction(row["id"], row["messages"], None, None)
        picture, stored = decode_for_storage(fetched(row), self.limits)
        return _Instruction(row["id"], row["messages"], picture, {"bytes": stored, "path": row["path"]})

    def answer(self, prepared: Sequence[_Instruction]) -> list[tuple[Answer | None, int]]:
        """Return the description of each image, if one is asked for, and how many tokens the image adds."""
        shown = [(row.id, row.picture) for row in prepared if row.picture is not None]
        if self.engine is None:
            counts = self.counter.count_added_tokens([picture for _, picture in shown])
            found: Iterator[tuple[Answer | None, int]] = ((None, count) for count in counts)
        else:
            requests = [
                Request(self._prompt(name), picture, seed_for(self.config.seed, name, "infusion"))
                for name, picture in shown
            ]
            answers = self.engine.generate(requests, self.sampling)
            found = ((answer, answer.num_added_tokens) for answer in answers)
        return [(None, 0) if row.picture is None else next(found) for row in prepared]

    def finish(self, prepared: _Instruction, answer: tuple[Answer | None, int]) -> Rows:
        """Return the row with the description in front of its first question."""
        description, num_added_tokens = answer
        messages, settings = prepared.messages, self.config.infusion
        if description is not None:
            if not description.text:
                raise Rejected(Reason.EMPTY_ANSWER, "the description is empty")
            if description.finish_reason == "length" and not settings.allow_truncated:
                limit = f"infusion.max_new_tokens={settings.max_new_tokens}"
                raise Rejected(Reason.TRUNCATED_ANSWER, f"the description was cut off at {limit}")
            messages = infuse(messages, description.text, self.prompts)
        has_image = prepared.picture is not None
        length = sequence_length(self.counter, messages, num_added_tokens, with_image=has_image)
        check_length(length, self.config.sft.max_length_tokens, "sft.max_length_tokens")
        row = {
            "id": prepared.id,
            "image": prepared.stored,
            "messages": messages,
            "description": description.text if description else None,
            "description_prompt": self._prompt(prepared.id) if description else None,
            "finish_reason": description.finish_reason if description else None,
            "num_sequence_tokens": length,
            "model": self.engine.name if self.engine else None,
        }
        return {"rows" if prepared.stored else "text": [row]}

    def _prompt(self, identity: str) -> str:
        return description_prompt(identity, self.config.seed, self.config.infusion, self.prompts)


def _need(config: RunConfig) -> Need:
    """Return the actors; without a model a GPU would only be held."""
    need = actors_need(config)
    return need if config.infusion.describe else without_gpus(need)


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
