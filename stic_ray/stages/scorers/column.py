"""Scorer `column`: scores that somebody else gave, in Parquet, joined by the ids of images."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import dataset as ds

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, SourceError, nearest, one_line
from stic_ray.core.storage import Location
from stic_ray.core.verification import ScoresConfig
from stic_ray.stages.scorers.base import Answered, Scored, Scorer

_ID, _NUMBER = "image_id", "number"
_WHERE = "scores.column_source"


def column(settings: ScoresConfig) -> Scorer:
    """Return the scorer of a column from outside; images and answers that it does not have get no score."""
    return Scorer(
        lambda tools: _score,
        check=lambda step: _open(step.config),
        read=_read,
        none_because=f"'{settings.column_source}' has no '{settings.column}' for it",
    )


def _score(images: Sequence[Answered]) -> list[Scored]:
    return [Scored({None: image.outside[None]} if None in image.outside else _of_answers(image)) for image in images]


def _of_answers(image: Answered) -> dict[int | None, float | None]:
    return {answer.number: image.outside.get(answer.number) for answer in image.answers}


def _read(config: RunConfig, image_ids: Sequence[str]) -> dict[str, dict[int | None, float]]:
    """Return the scores of some images by id, then number, or None of the image; only their rows are kept in memory.

    Raises SourceError for two scores of the same.
    """
    source, name = _open(config), config.scores.column
    wanted = pc.field(_ID).cast(pa.string()).isin(pa.array(image_ids, pa.string()))
    columns = [each for each in (_ID, _NUMBER, name) if each in source.schema.names]
    table = source.to_table(columns=columns, filter=wanted, batch_readahead=2, fragment_readahead=1)
    found: dict[str, dict[int | None, float]] = {}
    for row in table.to_pylist():
        own, number, value = found.setdefault(row[_ID], {}), row.get(_NUMBER), row[name]
        if number in own:
            of = "" if number is None else f", answer {number}"
            raise SourceError(f"{_WHERE}='{config.scores.column_source}' has two scores of image {row[_ID]}{of}.")
        if value is not None:
            own[number] = float(value)
    return found


def _open(config: RunConfig) -> ds.Dataset:
    """Open the files; reads nothing but the schema. Raises ConfigError and SourceError."""
    settings = config.scores
    if not settings.column_source:
        raise ConfigError(f"Scorer 'column' needs {_WHERE}: Parquet with image_id and scores.column.")
    place = Location.of(settings.column_source)
    below = place.files(recursive=True) if place.is_folder() else []
    files = [file.path for file in below if file.path.endswith(".parquet")] if below else [place.path]
    if not files or not place.exists():
        raise SourceError(f"{_WHERE}='{place.uri}' is no Parquet file, and no folder with some.")
    try:
        source = ds.dataset(files, filesystem=place.filesystem, format="parquet")
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError(f"{_WHERE}='{place.uri}' cannot be read: {one_line(error)}") from error
    names = source.schema.names
    for name, setting in ((_ID, ""), (settings.column, " Name the one with the scores with scores.column.")):
        if name not in names:
            columns = ", ".join(names)
            raise SourceError(
                f"{_WHERE}='{place.uri}' has no column '{name}'.{nearest(name, names)} Its columns: {columns}.{setting}"
            )
    kind = source.schema.field(settings.column).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise SourceError(f"Column '{settings.column}' of {_WHERE}='{place.uri}' is {kind}; scores are numbers.")
    return source
