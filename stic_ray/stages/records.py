"""Rows that the user brings, with or without an image: JSON, JSONL or Parquet, read in one way."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.errors import SourceError
from stic_ray.core.storage import Location
from stic_ray.stages.fetch import fetch_indexed, with_images

_IMAGE = "image"


def read_records(uri: str, setting: str) -> tuple[Location, list[dict[str, Any]]]:
    """Return the rows of a .json list, a .jsonl or a .parquet file; `setting` names it in errors.

    Image bytes of a Parquet file stay where they are: such a row gets `image_row`, its number in the file.
    Raises SourceError when the file is missing, empty or of another format.
    """
    source = Location.of(uri)
    if not source.exists() or source.is_folder():
        raise SourceError(f"{setting}: '{uri}' is no file; it needs JSON, JSONL or Parquet.")
    try:
        if source.path.endswith(".parquet"):
            rows = _read_parquet(source)
        elif source.path.endswith(".jsonl"):
            rows = [json.loads(line) for line in source.read().decode().split("\n") if line.strip()]
        else:
            rows = json.loads(source.read().decode())
    except (json.JSONDecodeError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise SourceError(f"{setting}: '{uri}' cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(rows, list) or any(not isinstance(row, dict) for row in rows):
        raise SourceError(f"{setting}: '{uri}' must hold a list of rows, each a JSON object.")
    if not rows:
        raise SourceError(f"{setting}: '{uri}' holds no rows.")
    return source, rows


def image_place(row: Mapping[str, Any], source: Location, folder: Location) -> dict[str, Any]:
    """Say where a row's image is: `path` of a file, `path` and `row` of the Parquet source, or neither.

    Relative paths are below `folder`. `problem` is set for a row with several images.
    """
    if row.get("image_row") is not None:
        return {"path": source.uri, "row": row["image_row"], "problem": None}
    image = row.get(_IMAGE)
    if isinstance(image, list):
        if len(image) > 1:
            return {"path": None, "row": None, "problem": f"{len(image)} images; one image per row"}
        image = image[0] if image else None
    if isinstance(image, Mapping):
        image = image.get("path")
    if not image:
        return {"path": None, "row": None, "problem": None}
    path = str(image)
    absolute = path.startswith("/") or "://" in path
    return {"path": path if absolute else (folder / path).uri, "row": None, "problem": None}


def folder_of(source: Location) -> Location:
    """Return the folder that a file is in."""
    return source.at(source.path.rsplit("/", 1)[0])


def load_records(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return rows that have `path` and `row` as a table, with the bytes of their images."""
    fetched = iter(fetch_indexed([row for row in rows if row["path"] is not None], _IMAGE))
    images = [None if row["path"] is None else next(fetched) for row in rows]
    return with_images(pa.Table.from_pylist(list(rows), schema=schema), images)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _read_parquet(source: Location) -> list[dict[str, Any]]:
    with source.filesystem.open_input_file(source.path) as stream:
        schema = pq.read_schema(stream)
    holds_bytes = _IMAGE in schema.names and not _is_text(schema.field(_IMAGE).type)
    columns = [name for name in schema.names if name != _IMAGE or not holds_bytes]
    with source.filesystem.open_input_file(source.path) as stream:
        rows = pq.read_table(stream, columns=columns).to_pylist()
    if not holds_bytes:
        return rows
    with source.filesystem.open_input_file(source.path) as stream:
        present = pq.read_table(stream, columns=[_IMAGE])[_IMAGE].is_valid().to_pylist()
    return [{**row, "image_row": number if present[number] else None} for number, row in enumerate(rows)]
