"""Instruction data: read once, row by row, sampled, checked, and kept in small shards below the step's folder."""

import heapq
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import pyarrow as pa

from stic_ray.core.config import InfusionConfig, RunConfig
from stic_ray.core.errors import Rejected, SourceError, nearest, type_and_message
from stic_ray.core.json_stream import literal
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import RunDir, read_shard, shard_name
from stic_ray.core.schemas import MESSAGES, Reason
from stic_ray.core.storage import Location
from stic_ray.method.infusion import read_conversation
from stic_ray.stages.records import Row, image_place, load_records, read_rows, row_id
from stic_ray.stages.shards import ShardTask

_CONVERSATIONS = "conversations"
_TEXTS = ("id", _CONVERSATIONS)
_NUM_ROWS_LOOKED_AT = 1000
"""Rows by which a file is judged before anything is spent."""
_FAMILY, _INDEX = "instructions", "index.json"
_ROWS = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "path", "column", "reason", "problem")),
        ("row", pa.int64()),
        ("messages", MESSAGES),
    ]
)


def read_instructions(config: InfusionConfig) -> Iterator[dict[str, Any]]:
    """Return the rows of the source, one by one: id, place of the image (`path`, `row`, `column`), messages.

    A row that cannot be used has `reason` and `problem` instead of messages. Raises SourceError when the source is
    missing, or when its first 1000 rows show that it is no instruction data or names its pictures otherwise.
    """
    setting = f"infusion.source='{config.source}'"
    if config.images and not Location.of(config.images).is_folder():
        raise SourceError(f"infusion.images='{config.images}' is no folder.")
    source, rows = read_rows(config.source, "infusion.source")
    folder = image_folder(config)
    first = list(islice(rows, _NUM_ROWS_LOOKED_AT))
    values = [row.value for row in first if row.value is not None]
    if not values:
        raise SourceError(
            f"{setting} cannot be read: {first[0].place}: {first[0].problem}. It must be a list of rows, each a JSON "
            "object (a JSON list, or JSON Lines), or Parquet."
        )
    if not any(_CONVERSATIONS in value for value in values):
        names = list(values[0])
        raise SourceError(
            f"{setting} has no '{_CONVERSATIONS}'.{nearest(_CONVERSATIONS, names)} Its columns: {', '.join(names)}."
        )
    read = [_instruction(row, source, folder) for row in first]
    foreign = (Reason.NO_IMAGE, Reason.VIDEO, Reason.AUDIO)
    if all(row["reason"] in foreign for row in read):
        raise SourceError(f"{setting} names no picture in any row that was looked at; {read[0]['problem']}")
    return chain(read, (_instruction(row, source, folder) for row in rows))


def index_instructions(config: RunConfig, output: RunDir) -> tuple[list[ShardTask], int]:
    """Return the shards of the (sampled) instruction data, and the number of their rows.

    The first call reads the source and leaves the shards below `output`; later ones find them there.
    """
    folder = output / "instructions"
    found = folder.read_json(_INDEX)
    if found is None:
        rows = _distinct(_sampled(config))
        num_rows = num_shards = 0
        while some := list(islice(rows, config.pool.shard_size)):
            folder.write_shard(_FAMILY, num_shards, pa.Table.from_pylist(some, schema=_ROWS), _ROWS)
            num_rows, num_shards = num_rows + len(some), num_shards + 1
        found = {"num_rows": num_rows, "num_shards": num_shards}
        folder.write_json(_INDEX, found)
    tasks = [ShardTask(number, {"folder": folder.uri}) for number in range(found["num_shards"])]
    return tasks, found["num_rows"]


def image_folder(config: InfusionConfig) -> Location:
    """Return the folder that the paths of images are relative to."""
    return Location.of(config.images) if config.images else Location.of(config.source).folder


def load_instructions(task: ShardTask, max_bytes: int, root: Location | None = None) -> pa.Table:
    """Return the rows of a shard with their images of at most `max_bytes`, below `root`."""
    folder = RunDir.of(task.payload["folder"])
    rows = read_shard(folder.location / shard_name(_FAMILY, task.number), _ROWS).to_pylist()
    return load_records(rows, _ROWS, max_bytes, root)


def _instruction(row: Row, source: Location, folder: Location) -> dict[str, Any]:
    found = dict.fromkeys(_ROWS.names) | {"id": str(row.number), "number": row.number}
    try:
        if row.value is None:
            raise Rejected(Reason.UNREADABLE_ROW, row.problem or "")
        found["id"] = row_id(row.value.get("id")) or str(row.number)
        found |= image_place(row.value, _TEXTS, source, folder)
        turns = row.value.get(_CONVERSATIONS)
        found["messages"] = read_conversation(
            literal(turns) if isinstance(turns, str) else turns, has_image=found["path"] is not None
        )
    except Rejected as why:
        found |= {"reason": why.reason, "problem": f"{row.place}: {why.message}"}
    except Exception as error:  # whatever a stranger's row makes Python raise is a property of that row
        found |= {"reason": Reason.UNREADABLE_ROW, "problem": f"{row.place}: {type_and_message(error)}"}
    return found


def _sampled(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Return the rows that the run's seed draws, those with the smallest hashes, in the order of the source.

    The source is read twice, once to draw, so that no more than numbers of rows live in memory.
    """
    if config.infusion.num_rows is None:
        return read_instructions(config.infusion)
    _, rows = read_rows(config.infusion.source, "infusion.source")
    hashed = ((seed_for(config.seed, str(row.number), "instructions"), row.number) for row in rows)
    drawn = {number for _, number in heapq.nsmallest(config.infusion.num_rows, hashed)}
    return (row for row in read_instructions(config.infusion) if row["number"] in drawn)


def _distinct(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield rows with an id each of its own: by it answers are drawn and rows held out.

    An id that was there before gets the row's number behind it.
    """
    seen: set[int] = set()
    for row in rows:
        name = row["id"]
        while hash(name) in seen:
            name = f"{name}#{row['number']}"
        seen.add(hash(name))
        yield {**row, "id": name}
