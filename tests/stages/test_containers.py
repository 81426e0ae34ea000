"""Every kind of file of a source: which images it holds, where each is, and fetching it from there later."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stic_ray.core.config import PoolConfig
from stic_ray.core.errors import Rejected, SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.method.images import image_id
from stic_ray.stages.containers import Found, Reading, images_in
from stic_ray.stages.fetch import fetch_indexed
from stic_ray.stages.listing import FAMILY, Change, Part, compare, entries, read_parts, write_listing
from tests.stages.sources import SOURCES, as_arrow, as_files, as_list, as_parquet, as_tar, tiny_pictures

PICTURES = tiny_pictures(13)
MANY_BYTES = 10**6
BY_BYTES = ("tar", "Parquet, as it is", "Parquet, as it is, with a dictionary", "Parquet, structs", "saved dataset")


def found_in(source: Path, max_bytes: int = MANY_BYTES) -> list[Found]:
    rows = pa.concat_tables(entries(str(source))).to_pylist()
    return list(images_in([row["uri"] for row in rows], Reading("image", max_bytes)))


def encoded(found: list[Found]) -> list[bytes]:
    assert all(isinstance(image.encoded, bytes) for image in found), found
    return [image.encoded for image in found if isinstance(image.encoded, bytes)]


def reasons(found: list[Found]) -> list[str]:
    return [str(image.encoded.reason) for image in found if isinstance(image.encoded, Rejected)]


def place_of(image: Found) -> dict:
    assert isinstance(image.encoded, bytes)
    return {
        "image_id": image_id(image.encoded),
        "path": image.path,
        "row": image.row,
        "offset": image.offset,
        "num_bytes": len(image.encoded),
    }


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_its_pictures_and_each_is_fetched_again(kind: str, tmp_path: Path) -> None:
    found = found_in(SOURCES[kind](tmp_path / "source", PICTURES))
    assert sorted(encoded(found)) == sorted(PICTURES)
    assert fetch_indexed([place_of(image) for image in found[::-1]], "image") == encoded(found)[::-1]
    if kind in BY_BYTES:
        assert all(image.offset is not None for image in found)


@pytest.mark.parametrize("kind", BY_BYTES)
def test_an_image_that_lies_as_it_is_is_read_without_what_is_around_it(kind: str, tmp_path: Path) -> None:
    found = found_in(SOURCES[kind](tmp_path / "source", PICTURES))
    wanted = place_of(found[6])
    file = Path(wanted["path"])
    kept = file.read_bytes()[wanted["offset"] : wanted["offset"] + wanted["num_bytes"]]
    with file.open("r+b") as stream:  # nothing else of the file is there any more
        stream.truncate(0)
        stream.seek(wanted["offset"])
        stream.write(kept)
    assert fetch_indexed([wanted], "image") == [found[6].encoded]


def test_pieces_of_a_table_are_the_whole_of_it(tmp_path: Path) -> None:
    for kind in ("Parquet, compressed", "Parquet, paths"):
        source = SOURCES[kind](tmp_path / kind, PICTURES)
        pieces = [list(images_in([str(source)], Reading("image", MANY_BYTES), piece, 4)) for piece in range(4)]
        assert [image.encoded for piece in pieces for image in piece] == [i.encoded for i in found_in(source)]
        assert sum(map(bool, pieces)) > 1


def test_equal_images_in_a_dictionary_are_all_found(tmp_path: Path) -> None:
    found = found_in(as_parquet(tmp_path, [PICTURES[0], PICTURES[1], PICTURES[0]] * 3, compression="none"))
    assert fetch_indexed([place_of(image) for image in found], "image") == encoded(found)
    assert all(image.offset is not None for image in found)


@pytest.mark.parametrize("kind", ["tar", "Parquet, compressed", "Arrow file, compressed", "saved dataset"])
def test_a_damaged_container_is_a_rejected_row_behind_what_could_be_read(kind: str, tmp_path: Path) -> None:
    source = SOURCES[kind](tmp_path / "source", PICTURES)
    file = source if source.is_file() else next(source.rglob("*.arrow"))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    found = found_in(source)
    assert reasons(found) == ["unreadable_file"]
    assert found[-1].path == str(file)
    assert set(encoded(found[:-1])) <= set(PICTURES)
    assert kind != "tar" or len(found) > 3


def test_values_that_are_no_image_are_rejected_rows(tmp_path: Path) -> None:
    found = found_in(as_parquet(tmp_path / "a", [PICTURES[0], None, b""]))
    assert reasons(found) == ["empty_file"] and [image.row for image in found] == [0, 1, 2]
    found = found_in(as_parquet(tmp_path / "b", ["none.png", None, "ftp://host/a.png"]))
    assert reasons(found) == ["unreadable_file", "empty_file", "unreadable_file"]


@pytest.mark.parametrize("with_bytes", [False, True])
def test_a_path_that_is_no_text_costs_its_own_row(with_bytes: bool, tmp_path: Path) -> None:
    names = pa.array([b"0.png", b"\xff.png", b"2.png"])
    paths = pa.Array.from_buffers(pa.string(), len(names), names.buffers())
    images = pa.StructArray.from_arrays([pa.array(PICTURES[:3]), paths], ["bytes", "path"]) if with_bytes else paths
    for number, picture in enumerate(PICTURES[:3]):
        (tmp_path / f"{number}.png").write_bytes(picture)
    pq.write_table(pa.table({"image": images}), tmp_path / "table.parquet")
    found = found_in(tmp_path / "table.parquet")
    assert [image.encoded for image in found if image.encoded in PICTURES] == [PICTURES[0], PICTURES[2]]
    assert reasons(found) == ["unreadable_file"] and len(found) == 3


def test_a_missing_file_of_a_list_is_a_rejected_row(tmp_path: Path) -> None:
    source = as_list(tmp_path, PICTURES)
    (tmp_path / "there" / "0004.png").unlink()
    found = found_in(source)
    assert reasons(found) == ["unreadable_file"]
    assert len(found) == 13


def test_what_is_too_large_to_be_an_image_is_not_read(tmp_path: Path) -> None:
    source = as_files(tmp_path / "files", PICTURES)
    (source / "0000.png").unlink()
    os.mkfifo(source / "pipe.png")  # would be read for ever
    with (source / "film.mp4").open("wb") as stream:
        stream.truncate(10 * MANY_BYTES)
    assert sorted(reasons(found_in(source))) == ["too_many_bytes", "unreadable_file"]
    for source in (as_tar(tmp_path / "t", PICTURES), as_parquet(tmp_path / "p", PICTURES)):
        assert reasons(found_in(source, max_bytes=10)) == ["too_many_bytes"] * 13


def test_a_mixture_is_read_whole(tmp_path: Path) -> None:
    source = as_files(tmp_path, PICTURES[:3])
    as_tar(source / "tars", PICTURES[3:6])
    as_parquet(source / "tables", PICTURES[6:9])
    as_arrow(source / "more", PICTURES[9:])
    assert sorted(encoded(found_in(source))) == sorted(PICTURES)


def test_another_picture_in_the_place_is_not_taken_for_the_indexed_one(tmp_path: Path) -> None:
    [first, *_] = found_in(as_files(tmp_path, PICTURES))
    Path(first.path).write_bytes(PICTURES[1])
    [image] = fetch_indexed([place_of(first)], "image")
    assert isinstance(image, Rejected) and "does not hold the image that was indexed" in str(image)


@pytest.mark.parametrize(
    ("values", "told"),
    [([1, 2], "is int64; images are bytes, a path or URI, or a struct"), ([{"x": 1}], "struct<x: int64>")],
)
def test_a_column_that_holds_no_images_is_refused(values: list, told: str, tmp_path: Path) -> None:
    source = as_parquet(tmp_path / "source", values)
    with pytest.raises(SourceError, match=told):
        write_listing(
            PoolConfig(source=str(source)), RunDir.of(str(tmp_path / "new")), RunDir.of(str(tmp_path / "none"))
        )
    assert reasons(found_in(source)) == ["unreadable_file"]


def test_the_listing_is_cut_by_files_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = as_files(tmp_path / "source", PICTURES)
    as_parquet(source / "z", tiny_pictures(40, first=100), rows=2)
    size = (source / "z" / "a.parquet").stat().st_size
    monkeypatch.setattr("stic_ray.stages.listing._FILES_PER_PART", (4, 4))
    monkeypatch.setattr("stic_ray.stages.listing._BYTES_PER_PART", (size // 2, size // 2))
    output = RunDir.of(str(tmp_path / "out"))
    parts = write_listing(PoolConfig(source=str(source)), output, RunDir.of(str(tmp_path / "none")))
    assert read_parts(output) == parts
    assert [(part.start, part.stop) for part in parts if part.num_pieces == 1] == [(0, 4), (4, 8), (8, 12), (12, 13)]
    assert [part for part in parts if part.num_pieces > 1] == [Part(0, 13, 14, piece, 3) for piece in range(3)]


def test_a_list_that_names_a_file_again_and_again_is_compared_line_by_line(tmp_path: Path) -> None:
    source, known = as_files(tmp_path / "source", tiny_pictures(3)), RunDir.of(str(tmp_path / "known"))
    first, second, third = sorted(source.iterdir())
    names = tmp_path / "list.txt"
    names.write_text(f"{first}\n" * 1000 + f"{second}\n")
    write_listing(PoolConfig(source=str(names)), known, known)
    num_shards = len(known.shards(FAMILY))
    assert compare(str(names), known, num_shards) == Change()
    names.write_text(f"{first}\n" * 1000 + f"{third}\n" * 2)
    assert compare(str(names), known, num_shards) == Change(num_new=2, num_gone=1)


def test_a_source_is_compared_with_its_listing(tmp_path: Path) -> None:
    source, known = as_files(tmp_path / "source", PICTURES), RunDir.of(str(tmp_path / "known"))
    write_listing(PoolConfig(source=str(source)), known, known)
    assert compare(str(source), known, 1).num_new == 0
    as_files(source, tiny_pictures(2, first=50), first=50)
    (source / "0000.png").unlink()
    shutil.copy(source / "0002.png", source / "0004.png")
    change = compare(str(source), known, 1)
    assert (change.num_new, change.num_changed, change.num_gone) == (2, 1, 1)
    new = RunDir.of(str(tmp_path / "new"))
    assert write_listing(PoolConfig(source=str(source)), new, known) == [Part(1, 0, 2)], (
        "only what is new, behind what is known"
    )
