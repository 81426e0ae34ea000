"""Stage `text_logps`: the rows of `sft` with log p of each token of their answers, guessed without the image (PRIOR).

The model that guesses is the one that it reads: a training with `sft.image=none`, as in PRIOR, or the run's own. Rows
without an image are passed through; their tokens all count alike.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from stic_ray.core.config import ANSWER_SETTINGS, RunConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.placement import actors_need
from stic_ray.core.rundir import read_shard
from stic_ray.core.schemas import INFUSED
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import BYTES_PER_TEXT_TOKEN, SHORT_ANSWER_TOKENS, Sizes, Work
from stic_ray.engines.opening import open_trained, with_log_probabilities
from stic_ray.stages.rated import shards_by_number
from stic_ray.stages.shards import ShardJob, ShardTask, check_written, run_shards
from stic_ray.stages.windows import Rows

_COLUMN = "text_logps"
_FAMILIES = ("rows", "text")


def build_text_logps(step: StepRun) -> dict[str, Any]:
    """Write the rows with their log-probabilities into the step's folder and return the manifest's row accounts.

    Raises SourceError where there are no rows.
    """
    config = step.config.model_copy(update={"model": with_log_probabilities(step.config.model)})
    found = {family: shards_by_number(step.inputs["rows"], family) for family in _FAMILIES}
    numbers = sorted({number for shards in found.values() for number in shards})
    if not numbers:
        raise SourceError(f"'{step.inputs['rows'].uri}' has no rows-*.parquet or text-*.parquet.")
    tasks = [
        ShardTask(number, {"shards": [shards[number].uri for shards in found.values() if number in shards]})
        for number in numbers
    ]
    job = ShardJob(
        stage=step.name,
        output=step.output,
        families=dict.fromkeys(_FAMILIES, INFUSED),
        load=_load_shard,
        make_worker=partial(TextScorer, config, step.model()),
        max_failed_share=config.cluster.max_failed_share,
    )
    done = run_shards(job, tasks, config.actors)
    accounts = done.accounts(sum(done.num_rows.values()) + done.num_failed)
    check_written(accounts, step.output, "Not one row was scored")
    return accounts


class TextScorer:
    """Asks a model how well it guesses the answers to images that it is not shown."""

    def __init__(self, config: RunConfig, checkpoint: Location | None) -> None:
        """Load the model: what a training left, or the run's."""
        self.engine = open_trained(config, checkpoint)

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """Return the row's id, and the path of its image."""
        return [{"image_id": row["id"], "path": (row["image"] or {}).get("path") or ""}]

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row as it is."""
        return row

    def answer(self, prepared: Sequence[dict[str, Any]]) -> list[list[float] | None]:
        """Return log p of each token of the answers of each row; None for a row without an image."""
        logps = iter(self.engine.score_tokens([row["messages"] for row in prepared if row["image"] is not None]))
        return [None if row["image"] is None else next(logps) for row in prepared]

    def finish(self, prepared: dict[str, Any], answer: list[float] | None) -> Rows:
        """Return the row with its log-probabilities."""
        return {"text" if prepared["image"] is None else "rows": [{**prepared, _COLUMN: answer}]}


def _load_shard(task: ShardTask) -> pa.Table:
    """Return all rows of a number, whether they were scored before or not."""
    wanted = pa.schema([field for field in INFUSED if field.name != _COLUMN])
    return pa.concat_tables([read_shard(Location.of(uri), wanted) for uri in task.payload["shards"]])


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    if not sizes.num_instructions:
        return None
    writes = min(sizes.num_answer_tokens, config.infusion.max_new_tokens)
    reads = max(0.0, sizes.num_prompt_tokens - sizes.model.num_image_tokens) + SHORT_ANSWER_TOKENS
    stored = sizes.image_bytes + BYTES_PER_TEXT_TOKEN * 2 * writes
    return Work(sizes.num_instructions, ((1, reads, 0),), storage_bytes=sizes.num_instructions * stored)


TEXT_LOGPS = Stage(
    name="text_logps",
    run=build_text_logps,
    settings=("model", *ANSWER_SETTINGS),
    need=actors_need,
    writes="rows-*.parquet",
    reads=("rows", "model"),
    work=_work,
    amount="num_instructions",
    amount_in_manifest="num_rows_in",
)
