"""A sample of the preference pairs with small pictures, small enough to put inside the page."""

import base64
import io
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from stic_ray.core.errors import Rejected
from stic_ray.core.rundir import RunDir, read_shard
from stic_ray.core.schemas import PAIRS, check
from stic_ray.core.storage import Location
from stic_ray.method.corruption import corrupt
from stic_ray.method.images import decode
from stic_ray.report.formats import UNKNOWN, shortened, signed

MAX_SHARDS = 16
"""Shards of pairs that the sample is drawn from: the first ones, which are a random part of the pool."""
MAX_SIDE_PX = 192
"""Longer side of a picture on the page."""

_KINDS = ("hallucination_prompt", "low_resolution", "colour_jitter")
"""Of pairs, in the order in which they are shown; others come after them."""
_BATCH_ROWS = 16
_MAX_TEXT_CHARACTERS = 6000
_LOSSLESS_PIXELS = 64 * 64  # below this PNG is small, and JPEG would blur what the picture is there to show
_CHOICE = pa.schema([PAIRS.field(name) for name in ("image_id", "negative", "corruption")])
_SHOWN = pa.schema([field for field in PAIRS if field.name not in ("position", "model", "model_revision", "seed")])


class Candidate(NamedTuple):
    """A pair that may be shown, and where its row is."""

    image_id: str
    kind: str
    shard: int
    row: int


def collect_gallery(stage: RunDir, num_pairs: int) -> dict[str, Any]:
    """Return a sample of the pairs in a stage's folder, and what it is a sample of.

    The choice depends on the image ids alone. Memory holds the ids of `MAX_SHARDS` shards and the images of one
    row group at a time, however large the pool.
    """
    shards = stage.shards("pairs")
    read = shards[:MAX_SHARDS]
    candidates = [candidate for number, shard in enumerate(read) for candidate in _candidates(shard, number)]
    chosen = choose(candidates, num_pairs)
    items: dict[str, dict[str, Any]] = {}
    for number, shard in enumerate(read):
        rows = {candidate.row: candidate for candidate in chosen if candidate.shard == number}
        for row, values in read_rows(shard, sorted(rows), _SHOWN):
            items[rows[row].image_id] = _item(values, rows[row].kind)
    return {
        "num_shards": len(shards),
        "num_shards_read": len(read),
        "num_pairs_read": len(candidates),
        "num_pairs_read_by_kind": dict(Counter(candidate.kind for candidate in candidates)),
        "items": [items[candidate.image_id] for candidate in chosen],
    }


def choose(candidates: Sequence[Candidate], num_pairs: int) -> list[Candidate]:
    """Return up to `num_pairs` candidates, the smallest image ids of each kind, kind by kind in turn."""
    kinds = sorted(sorted({candidate.kind for candidate in candidates}), key=lambda kind: (*_KINDS, kind).index(kind))
    queues = [sorted(candidate for candidate in candidates if candidate.kind == kind) for kind in kinds]
    in_turn = (each for turn in itertools.zip_longest(*queues) for each in turn if each is not None)
    return list(itertools.islice(in_turn, num_pairs))


def corruption_caption(corruption: Mapping[str, Any], pixel_change: float | None) -> str:
    """Return what was done to an image, in order: "shorter side 20 px; mean change 9.1 of 255"."""
    if corruption["kind"] == "low_resolution":
        done = f"shorter side {corruption['shorter_side_px']} px"
    elif corruption.get("strength") is not None:
        done = f"{corruption['kind'].replace('_', ' ')} of strength {corruption['strength']:.2f}"
    else:
        brightness = f"brightness ×{corruption['brightness_factor']:.2f}"
        hue = f"hue {signed(corruption['hue_shift_turns'], 2)} turns"
        done = f"{brightness}, {hue}" if corruption["brightness_first"] else f"{hue}, {brightness}"
    change = UNKNOWN if pixel_change is None else f"{pixel_change:.1f}"
    return f"{done}; mean change {change} of 255"


def _candidates(shard: Location, number: int) -> Iterator[Candidate]:
    for row, values in enumerate(read_shard(shard, _CHOICE).to_pylist()):
        corruption = values["corruption"]
        yield Candidate(values["image_id"], corruption["kind"] if corruption else values["negative"], number, row)


def read_rows(shard: Location, wanted: Sequence[int], schema: pa.Schema) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the wanted rows of a shard, ascending; reads in small batches, and no further than the last one."""
    if not wanted:
        return
    start = 0
    with shard.filesystem.open_input_file(shard.path) as stream:
        # Batches hold half the memory of a whole row group, whose images would all become one table.
        for batch in pq.ParquetFile(stream).iter_batches(_BATCH_ROWS, columns=schema.names):
            here = [row for row in wanted if start <= row < start + batch.num_rows]
            table = check(pa.Table.from_batches([batch]), schema)
            yield from ((row, table.slice(row - start, 1).to_pylist()[0]) for row in here)
            start += batch.num_rows
            if start > wanted[-1]:
                return


def _item(row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    corruption, pixel_change = row["corruption"], row["pixel_change"]
    item = {
        "image_id": row["image_id"],
        "kind": kind,
        "prompt": _text(row["prompt"]),
        "corruption": corruption,
        "pixel_change": pixel_change,
        "caption": corruption_caption(corruption, pixel_change) if corruption else None,
        "num_image_tokens": row["num_image_tokens"],
        "answers": [_answer(row, name) for name in ("chosen", "rejected")],
        "size_px": None,
        "image_problem": None,
        "clean_image": None,
        "corrupted_image": None,
    }
    try:
        clean = decode(row["image"]["bytes"] or b"")
    except Rejected as error:  # one damaged picture must not cost the whole page
        return {**item, "image_problem": str(error)}
    corrupted_image = data_uri(corrupt(clean, corruption)) if corruption else None
    shown = {"size_px": list(clean.size), "clean_image": data_uri(clean), "corrupted_image": corrupted_image}
    return {**item, **shown}


def _answer(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {
        "which": name,
        "prompt": shortened(row[f"{name}_prompt"], _MAX_TEXT_CHARACTERS),
        "text": _text(row[name]),
        "num_tokens": row[f"num_{name}_tokens"],
        "finish_reason": row[f"{name}_finish_reason"],
    }


def _text(messages: Sequence[Mapping[str, str | None]]) -> str:
    return shortened("\n\n".join(message["content"] or "" for message in messages), _MAX_TEXT_CHARACTERS)


def data_uri(picture: Image.Image) -> str:
    """Return an RGB picture as a data URI, shrunk to `MAX_SIDE_PX` and never enlarged."""
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    kind = "png" if small.width * small.height <= _LOSSLESS_PIXELS else "jpeg"
    small.save(buffer, kind, optimize=True, **({} if kind == "png" else {"quality": 82, "subsampling": 0}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
