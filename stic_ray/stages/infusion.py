"""Stage `infusion`: instruction data whose questions carry the improved model's own description (STIC Algorithm 2).

Rows with an image go to rows-*.parquet, which TRL's SFTTrainer takes as they are; rows without one are passed
through to text-*.parquet, because TRL's collator has no place for an absent image in an image column.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.config import InfusionConfig, RunConfig
from stic_ray.core.errors import SourceError, nearest
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import REJECTED_FAMILY, RunDir, row_counts
from stic_ray.core.schemas import INFUSED, REJECTED, Reason, table_of
from stic_ray.core.storage import Location
from stic_ray.engines.base import Answer, Request, Sampling
from stic_ray.engines.opening import open_engine
from stic_ray.method.images import ImageLimits, ImageRejected, decode_for_storage, inspect
from stic_ray.method.infusion import Messages, infuse, read_conversation
from stic_ray.method.preferences import Rejection
from stic_ray.method.prompts import load_prompts
from stic_ray.stages.fetch import fetch_indexed, with_images
from stic_ray.stages.shards import ShardJob, ShardTask, Tables, rejected_row, run_shards

_CONVERSATIONS = "conversations"


def build_infusion(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Write infused, text-only and rejected shards below `run`/infusion and return the manifest's row accounts.

    Raises SourceError when the source is missing or of another format, or when no row is left.
    """
    output, checkpoint = run / "infusion", (run / "dpo").location / "checkpoint"
    rows = _sample(read_instructions(config.infusion), config)
    size = config.pool.shard_size
    tasks = [
        ShardTask(number, {"rows": rows[start : start + size]})
        for number, start in enumerate(range(0, len(rows), size))
    ]
    job = ShardJob(
        stage="infusion",
        output=output,
        families={REJECTED_FAMILY: REJECTED, "text": INFUSED, "rows": INFUSED},
        load=_load_rows,
        make_worker=lambda: Infuser(config, checkpoint),
    )
    run_shards(job, tasks, config.actors)
    accounts = row_counts(len(rows), output.num_rows(["rows", "text"]), output.rejected_by_reason())
    if not accounts["num_rows_written"]:
        raise SourceError(
            f"Not one of {len(rows)} instruction rows could be used: {accounts['rejected_by_reason']}. "
            f"The rejected rows are in '{output.uri}'; delete that folder to try again with other settings."
        )
    return {**accounts, "num_text_only_rows": output.num_rows(["text"])}


def read_instructions(config: InfusionConfig) -> list[dict[str, Any]]:
    """Return the rows of the source: id, where the image is (`path`, `row`; both None without one), turns as JSON.

    Raises SourceError when the source is missing or of another format.
    """
    source = Location.of(config.source)
    if not source.exists() or source.is_folder():
        raise SourceError(f"infusion.source='{config.source}' is no file; it needs LLaVA-format JSON or Parquet.")
    images = Location.of(config.images) if config.images else source.at(source.path.rsplit("/", 1)[0])
    rows = _parquet_rows(source) if source.path.endswith(".parquet") else _json_rows(source)
    found = [_place(number, row, source, images) for number, row in enumerate(rows)]
    if not found:
        raise SourceError(f"infusion.source='{config.source}' holds no rows.")
    return found


class Infuser:
    """Infuses the rows of a shard; owns the model of `dpo`."""

    def __init__(self, config: RunConfig, checkpoint: Location) -> None:
        """Load the model that `dpo` left in `checkpoint`."""
        self.config = config
        self.prompts = load_prompts(config.prompts)
        self.engine = open_engine(config.model, config.actors, checkpoint.local_copy())
        self.sampling = Sampling(config.infusion.max_new_tokens, config.infusion.temperature)
        pool = config.pool
        self.limits = ImageLimits(pool.min_side_px, pool.max_image_pixels, pool.max_aspect_ratio)

    def __call__(self, shard: pa.Table) -> Tables:
        """Return infused, text-only and rejected rows, together as many as the shard has."""
        found: dict[str, list[dict[str, Any]]] = {REJECTED_FAMILY: [], "text": [], "rows": []}
        for batch in shard.to_batches(max_chunksize=self.config.actors.batch_size):
            rows = batch.to_pylist()
            for row, result in zip(rows, self._infuse_all(rows), strict=True):
                if isinstance(result, Rejection):
                    found[REJECTED_FAMILY].append(rejected_row(row["id"], row["path"] or "", result))
                else:
                    found["rows" if result["image"] else "text"].append(result)
        schemas = {REJECTED_FAMILY: REJECTED, "text": INFUSED, "rows": INFUSED}
        return {family: table_of(found[family], schema) for family, schema in schemas.items()}

    def _infuse_all(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | Rejection]:
        prepared = [self._prepare(row) for row in rows]
        requests = [
            Request(self.prompts.describe, p["picture"], seed_for(self.config.seed, p["id"], "infusion"))
            for p in prepared
            if not isinstance(p, Rejection) and p["picture"] is not None
        ]
        answers = iter(self.engine.generate(requests, self.sampling))
        return [
            p if isinstance(p, Rejection) else self._finish(p, next(answers) if p["picture"] is not None else None)
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
        if row["fetch_error"] is not None:
            return Rejection(Reason.UNREADABLE_FILE, row["fetch_error"])
        try:
            inspect(row["encoded"] or b"", self.limits)
            picture, stored = decode_for_storage(row["encoded"])
        except ImageRejected as error:
            return Rejection(error.reason, error.message)
        return {**found, "picture": picture, "image": {"bytes": stored, "path": row["path"]}}

    def _finish(self, row: dict[str, Any], answer: Answer | None) -> dict[str, Any] | Rejection:
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
        length = self.engine.count_text_tokens(messages, with_image=answer is not None)
        length += answer.num_image_tokens if answer else 0
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
            "model": self.engine.name,
        }


def _sample(rows: list[dict[str, Any]], config: RunConfig) -> list[dict[str, Any]]:
    """Return `infusion.num_rows` rows drawn by the run's seed, in the order of the source."""
    wanted = config.infusion.num_rows
    if wanted is None or wanted >= len(rows):
        return rows
    drawn = sorted(range(len(rows)), key=lambda number: seed_for(config.seed, str(number), "instructions"))
    return [rows[number] for number in sorted(drawn[:wanted])]


def _load_rows(task: ShardTask) -> pa.Table:
    rows = task.payload["rows"]
    with_image = [row for row in rows if row["path"] is not None]
    fetched = iter(fetch_indexed(with_image, "image"))
    images = [None if row["path"] is None else next(fetched) for row in rows]
    schema = pa.schema(
        [("id", pa.string()), ("path", pa.string()), ("row", pa.int64()), ("turns", pa.string()), ("problem", pa.string())]
    )
    return with_images(pa.Table.from_pylist(rows, schema=schema), images)


def _json_rows(source: Location) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(source.read())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"infusion.source='{source.uri}' is not valid JSON: {error}") from error
    if not isinstance(rows, list) or any(not isinstance(row, dict) for row in rows):
        raise SourceError(f"infusion.source='{source.uri}' must be a JSON list of rows with id, image, {_CONVERSATIONS}.")
    if rows and not any(_CONVERSATIONS in row for row in rows):
        raise _no_conversations(source, list(rows[0]))
    yield from rows


def _parquet_rows(source: Location) -> Iterator[dict[str, Any]]:
    try:
        with source.filesystem.open_input_file(source.path) as stream:
            schema = pq.read_schema(stream)
        if _CONVERSATIONS not in schema.names:
            raise _no_conversations(source, schema.names)
        holds_paths = "image" in schema.names and pa.types.is_string(schema.field("image").type)
        columns = [n for n in ("id", _CONVERSATIONS, "image") if n in schema.names and (n != "image" or holds_paths)]
        with source.filesystem.open_input_file(source.path) as stream:
            table = pq.read_table(stream, columns=columns)
    except pa.ArrowInvalid as error:
        raise SourceError(f"infusion.source='{source.uri}' is no Parquet file: {str(error).splitlines()[0]}") from error
    in_rows = "image" in schema.names and not holds_paths
    for row in table.to_pylist():
        yield {**row, "image_in_row": in_rows}


def _no_conversations(source: Location, names: list[str]) -> SourceError:
    return SourceError(
        f"infusion.source='{source.uri}' has no '{_CONVERSATIONS}'.{nearest(_CONVERSATIONS, names)} "
        f"Its columns: {', '.join(names)}."
    )


def _place(number: int, row: Mapping[str, Any], source: Location, images: Location) -> dict[str, Any]:
    """Say where a row's image is: a file, a row of the Parquet source, or nowhere."""
    image = row.get("image")
    problem = None
    if isinstance(image, list):
        problem = f"{len(image)} images; one image per row" if len(image) > 1 else None
        image = image[0] if image else None
    place: dict[str, Any] = {"path": None, "row": None}
    if row.get("image_in_row"):
        place = {"path": source.uri, "row": number}
    elif image:
        path = str(image)
        place["path"] = path if path.startswith("/") or "://" in path else (images / path).uri
    turns = json.dumps(row.get(_CONVERSATIONS))
    return {"id": str(row.get("id", number)), **place, "turns": turns, "problem": problem}
