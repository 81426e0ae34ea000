"""A sample of images with their candidates: what scorers thought of each, which were taken, and why others were not."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from stic_ray.core.errors import Rejected, SourceError
from stic_ray.core.rundir import REJECTED_FAMILY, RunDir, read_shard, shard_name
from stic_ray.core.schemas import CANDIDATES, DECISIONS, INDEX, INFUSED, PAIRS, REJECTED, SCORES, STATEMENTS
from stic_ray.core.steps import place_of
from stic_ray.core.storage import Location
from stic_ray.method.images import decode
from stic_ray.report.formats import shortened
from stic_ray.report.gallery import MAX_SHARDS, Candidate, choose, data_uri, read_rows

_Rows = list[dict[str, Any]]

TAKEN = "taken"
"""Kind of an image of which something was taken; others have the reason why nothing was."""
_MAX_TEXT_CHARACTERS = 2000
_MAX_STATEMENTS = 40
_MAX_IMAGE_BYTES = 2**26
_IMAGES = {
    "pairs": pa.schema([PAIRS.field(name) for name in ("image_id", "image")]),
    "rows": pa.schema([INFUSED.field(name) for name in ("id", "image")]),
}
_PLACE = pa.schema([INDEX.field(name) for name in ("image_id", "path", "row", "offset", "num_bytes")])


def collect_candidates(run: RunDir, step: Mapping[str, Any], num_images: int) -> dict[str, Any]:
    """Return a sample of the images that a step with the inputs `candidates` and `scores` decided about.

    A third of them are images of which nothing was taken, of each reason in turn. The choice depends on image ids
    alone. What the inputs do not hold any more is left out.
    """
    stage = run / step["name"]
    numbers = sorted(stage.shard_numbers("decisions"))[:MAX_SHARDS]
    decided, messages = _decided(stage, numbers)
    found = [Candidate(image, _kind(rows, messages.get(image)), n, 0) for (n, image), rows in decided.items()]
    refused = choose([each for each in found if each.kind != TAKEN], num_images // 3)
    shown = [*choose([each for each in found if each.kind == TAKEN], num_images - len(refused)), *refused]
    inputs = {role: place_of(source, run) for role, source in step["inputs"].items()}
    items: list[dict[str, Any]] = []
    for number in sorted({each.shard for each in shown}):
        images = [each for each in shown if each.shard == number]
        tables = _tables(inputs, number, {each.image_id for each in images})
        pictures = _pictures(stage, inputs["index"], number, images)
        items += [
            _item(each, decided[number, each.image_id], messages.get(each.image_id), tables, pictures)
            for each in images
        ]
    order = {each.image_id: place for place, each in enumerate(shown)}
    return {
        "num_images_read": len(found),
        "num_images_read_by_kind": dict(Counter(each.kind for each in found).most_common()),
        "items": sorted(items, key=lambda item: order[item["image_id"]]),
    }


def _decided(
    stage: RunDir, numbers: Iterable[int]
) -> tuple[dict[tuple[int, str], list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Return the decisions of some shards by shard and image, and the rejected rows by image."""
    decided: dict[tuple[int, str], _Rows] = defaultdict(list)
    messages: dict[str, dict[str, Any]] = {}
    for number in numbers:
        for row in _read(stage, "decisions", number, DECISIONS):
            decided[number, row["image_id"]].append(row)
        messages |= {row["image_id"]: row for row in _read(stage, REJECTED_FAMILY, number, REJECTED)}
    return decided, messages


def _kind(decisions: Sequence[Mapping[str, Any]], rejected: Mapping[str, Any] | None) -> str:
    return (
        TAKEN
        if rejected is None and any(row["taken"] for row in decisions)
        else (rejected or {}).get("reason", "failed")
    )


def _read(stage: RunDir, family: str, number: int, schema: pa.Schema) -> _Rows:
    """Return the rows of a shard; none where it has no such file."""
    file = stage.location / shard_name(family, number)
    return read_shard(file, schema).to_pylist() if file.exists() else []


def _tables(inputs: Mapping[str, RunDir], number: int, images: set[str]) -> dict[str, dict[str, _Rows]]:
    """Return candidates, scores and statements of some images of a shard, by table and image."""
    scores = [place for role, place in inputs.items() if role.partition(":")[0] == "scores"]
    sources = [("candidates", inputs["candidates"], CANDIDATES)]
    sources += [
        (family, place, schema)
        for place in scores
        for family, schema in (("scores", SCORES), ("statements", STATEMENTS))
    ]
    tables: dict[str, dict[str, _Rows]] = defaultdict(lambda: defaultdict(list))
    for family, place, schema in sources:
        for row in _read(place, family, number, schema):
            if row["image_id"] in images:
                tables[family][row["image_id"]].append(row)
    return tables


def _pictures(stage: RunDir, index: RunDir, number: int, images: Sequence[Candidate]) -> dict[str, bytes]:
    """Return encoded pictures: those that the step stored, and of other images those that lie in plain files."""
    found: dict[str, bytes] = {}
    for family, schema in _IMAGES.items():
        file = stage.location / shard_name(family, number)
        if not file.exists():
            continue
        column = schema.names[0]
        ids = read_shard(file, pa.schema([schema.field(column)]))[column].to_pylist()
        wanted = sorted(ids.index(each.image_id) for each in images if each.image_id in ids)
        found |= {row[column]: row["image"]["bytes"] for _, row in read_rows(file, wanted, schema)}
    places = {row["image_id"]: row for row in _read(index, "index", number, _PLACE)}
    for image in [each.image_id for each in images if each.image_id not in found and each.image_id in places]:
        place = places[image]
        if place["row"] is None or place["offset"] is not None:
            found[image] = _from_file(place)
    return {image: encoded for image, encoded in found.items() if encoded}


def _from_file(place: Mapping[str, Any]) -> bytes:
    try:
        with Location.of(place["path"]).open() as stream:
            return stream.read_at(min(place["num_bytes"], _MAX_IMAGE_BYTES), place["offset"] or 0)
    except (OSError, SourceError):  # the page may be written where the source cannot be read
        return b""


def _item(
    image: Candidate,
    decisions: Sequence[Mapping[str, Any]],
    rejected: Mapping[str, Any] | None,
    tables: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    pictures: Mapping[str, bytes],
) -> dict[str, Any]:
    rows = {name: by_image.get(image.image_id, ()) for name, by_image in tables.items()}
    texts = {row["number"]: row for row in rows.get("candidates", ())}
    values = {(row["number"], row["scorer"]): row["value"] for row in rows.get("scores", ())}
    statements: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows.get("statements", ()):
        statements[row["number"]].append({"question": row["question"], "p_yes": row["p_yes"]})
    answers = [
        _answer(row, texts[row["number"]], values, statements[row["number"]], gives=rejected is None)
        for row in decisions
        if row["number"] in texts
    ]
    places = ("chosen", "both", "rejected", None)
    answers.sort(key=lambda each: (places.index(each["taken"]), -(each["score"] or 0.0), each["number"]))
    return {
        "image_id": image.image_id,
        "kind": image.kind,
        "message": rejected["message"] if rejected else None,
        "prompt": next((row["filed_under"] for row in texts.values()), None),
        "scorers": sorted({scorer for _, scorer in values}),
        "answers": answers,
        **_picture(pictures.get(image.image_id)),
    }


def _answer(
    decision: Mapping[str, Any],
    candidate: Mapping[str, Any],
    values: Mapping[tuple[int | None, str], float],
    statements: Sequence[Mapping[str, Any]],
    *,
    gives: bool,
) -> dict[str, Any]:
    number = decision["number"]
    scorers = {scorer for _, scorer in values}
    not_needed = "not needed" if gives and not decision["taken"] else None
    return {
        "number": number,
        "text": shortened(candidate["text"], _MAX_TEXT_CHARACTERS),
        "prompt": candidate["prompt"],
        "num_tokens": candidate["num_tokens"],
        "finish_reason": candidate["finish_reason"],
        "scores": {name: values.get((number, name), values.get((None, name))) for name in sorted(scorers)},
        "score": decision["score"],
        "taken": decision["taken"],
        "why": decision["reason"] or not_needed,
        "statements": list(statements[:_MAX_STATEMENTS]),
        "num_more_statements": max(0, len(statements) - _MAX_STATEMENTS),
    }


def _picture(encoded: bytes | None) -> dict[str, Any]:
    if not encoded:
        return {"clean_image": None, "size_px": None, "image_problem": "the run holds no copy of it"}
    try:
        picture = decode(encoded)
    except Rejected as error:
        return {"clean_image": None, "size_px": None, "image_problem": str(error)}
    return {"clean_image": data_uri(picture), "size_px": list(picture.size), "image_problem": None}
