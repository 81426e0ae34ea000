"""Sources as people leave them: any ending and type of column, side files, damage; one odd thing stops no other."""

import io
import json
import os
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stic_ray.core.config import PoolConfig
from stic_ray.core.errors import Failed, Rejected, SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.storage import Location
from stic_ray.stages.containers import Found, Reading, images_in
from stic_ray.stages.fetch import fetch_indexed
from stic_ray.stages.listing import Part, entries, write_listing
from tests.method.pictures import encode, photo
from tests.stages.sources import as_arrow, as_files, as_parquet, as_tar, tiny_pictures
from tests.stages.test_containers import place_of

PICTURES = tiny_pictures(13)
JPEG = encode(photo(), "JPEG")
ENDINGS = ("JPG", "jfif", "JPeg", "pjpeg", "jpe", "png", "dat", "")
"""Of names that people give a JPEG: content decides."""


def found_in(source: Path, column: str = "image", **reading: Any) -> list[Found]:
    root = Location.of(str(source))
    given: dict[str, Any] = {"root": root if source.is_dir() else None, **reading}
    rows = pa.concat_tables(entries(str(source))).to_pylist()
    return list(images_in([row["uri"] for row in rows], Reading(column, 10**6, **given)))


def listed(source: Path, output: Path, **settings: Any) -> list[Part]:
    pool = PoolConfig(source=str(source), **settings)
    return write_listing(pool, RunDir.of(str(output)), RunDir.of(str(output.parent / "none")))


def used(found: list[Found]) -> list[bytes]:
    return [image.encoded for image in found if isinstance(image.encoded, bytes)]


def refused(found: list[Found]) -> list[tuple[str, str]]:
    outcomes = [(image.path, image.encoded) for image in found if isinstance(image.encoded, Rejected | Failed)]
    return [(Path(path).name, outcome.message) for path, outcome in outcomes]


def tar_of(folder: Path, members: dict[str, bytes], **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "a.tar", "w", **options) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5
            archive.addfile(member, io.BytesIO(content))
    return folder / "a.tar"


def check_fetched(found: list[Found], column: str = "image") -> None:
    """What was found is found again, by what the index keeps of it."""
    there = [image for image in found if isinstance(image.encoded, bytes) and image.encoded]
    assert fetch_indexed([place_of(image) for image in there], column) == [image.encoded for image in there]


def test_pictures_have_any_ending_in_a_folder_and_in_a_tar(tmp_path: Path) -> None:
    names = [f"{number}.{ending}" if ending else f"{number}" for number, ending in enumerate(ENDINGS)]
    (tmp_path / "files").mkdir()
    for name in names:
        (tmp_path / "files" / name).write_bytes(JPEG + name.encode())
    tar = tar_of(tmp_path / "tar", {name: JPEG + name.encode() for name in names})
    for source in (tmp_path / "files", tar):
        found = found_in(source)
        assert sorted(used(found)) == sorted(JPEG + name.encode() for name in names)
        check_fetched(found)


@pytest.mark.parametrize("name", ["a.parquet", "a.tar", "a.arrow", "a.txt"])
def test_a_picture_with_the_ending_of_a_container_is_a_picture(name: str, tmp_path: Path) -> None:
    source = as_files(tmp_path, PICTURES[:2])
    (source / name).write_bytes(JPEG)
    found = found_in(source)
    assert JPEG in used(found) and len(found) == 3
    check_fetched(found)


@pytest.mark.parametrize(
    "options", [{"format": tarfile.GNU_FORMAT}, {"format": tarfile.PAX_FORMAT}], ids=["gnu", "pax"]
)
def test_members_are_pictures_by_content_or_ending_and_each_of_these_is_accounted_for(
    options: dict[str, Any], tmp_path: Path
) -> None:
    members = {
        "000.jpg": JPEG,
        "000.json": b"{}",
        "000.txt": b"BMW 320i, parked.",
        "000.cls": b"1",
        "nested/" + "long" * 60 + ".jfif": JPEG,
        "nested/" + "long" * 60 + ".json": b"{}",
        "ümläut.JPG": JPEG,
        "film.mp4": bytes(5000),
        "text.jpg": b"no picture",
        "._000.jpg": b"\0\5\x16\7\0\2",
        "photo.heic": b"\0\0\0\x18ftypheic",
        "empty.jpg": b"",
    }
    found = found_in(tar_of(tmp_path, members, **options))
    assert used(found) == [JPEG, JPEG, JPEG, b"no picture", b"\0\5\x16\7\0\2", b"\0\0\0\x18ftypheic", b""]
    check_fetched(found)


def damaged(archive: bytes, place: int, generator: random.Random) -> bytes:
    return archive[:place] + generator.randbytes(512) + archive[place + 512 :]


@pytest.mark.parametrize(
    "options", [{"format": tarfile.GNU_FORMAT}, {"format": tarfile.PAX_FORMAT}], ids=["gnu", "pax"]
)
def test_a_damaged_block_of_a_tar_costs_no_more_than_one_member(options: dict[str, Any], tmp_path: Path) -> None:
    generator = random.Random(0)
    tar = tar_of(tmp_path, {f"{number:03d}.jpg": JPEG + bytes([number]) for number in range(5)}, **options)
    whole = tar.read_bytes()
    for place in range(0, len(whole) - 10240, 512):
        tar.write_bytes(damaged(whole, place, generator))
        found = found_in(tar)
        there = [image for image in used(found) if image[:-1] == JPEG]
        assert len(there) >= 4
        assert len(there) == 5 or len(found) >= 5, "what is lost is told"
        check_fetched(found)


@pytest.mark.parametrize("kept", [0, 100, 512, 3000, 7000])
def test_a_tar_that_was_cut_off_gives_what_it_has_and_one_rejected_row(kept: int, tmp_path: Path) -> None:
    tar = as_tar(tmp_path, PICTURES)
    tar.write_bytes(tar.read_bytes()[:kept])
    found = found_in(tar)
    assert len(refused(found)) == 1
    assert set(used(found)) <= set(PICTURES)


def test_two_tars_one_behind_the_other_are_read_whole(tmp_path: Path) -> None:
    tar = as_tar(tmp_path / "a", PICTURES[:6])
    tar.write_bytes(tar.read_bytes() + as_tar(tmp_path / "b", PICTURES[6:]).read_bytes())
    assert used(found_in(tar)) == PICTURES


def binaries(kind: pa.DataType) -> Callable[[list], pa.Array]:
    return lambda values: pa.array(values, pa.binary()).cast(kind)


def texts(kind: pa.DataType) -> Callable[[list], pa.Array]:
    return lambda values: pa.array(values, pa.string()).cast(kind)


def in_lists(make: Callable[[list], pa.Array], kind: str) -> Callable[[list], pa.Array]:
    def column(values: list) -> pa.Array:
        inner = make(values)
        if kind == "fixed":
            return pa.FixedSizeListArray.from_arrays(inner, 1)
        offsets = list(range(len(values) + 1))
        return (pa.LargeListArray if kind == "large" else pa.ListArray).from_arrays(offsets, inner)

    return column


def in_structs(make: Callable[[list], pa.Array], name: str) -> Callable[[list], pa.Array]:
    return lambda values: pa.StructArray.from_arrays([make(values), pa.array(["x"] * len(values))], [name, "other"])


class Picture(pa.ExtensionType):
    """An extension type that stands for bytes."""

    def __init__(self) -> None:
        super().__init__(pa.binary(), "tests.picture")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Picture":
        return cls()


BYTES = {
    "binary": binaries(pa.binary()),
    "large_binary": binaries(pa.large_binary()),
    "binary_view": binaries(pa.binary_view()),
    "dictionary of binary": lambda values: pa.array(values, pa.binary()).dictionary_encode(),
    "extension": lambda values: pa.ExtensionArray.from_storage(Picture(), pa.array(values, pa.binary())),
}
TEXTS = {
    "string": texts(pa.string()),
    "large_string": texts(pa.large_string()),
    "string_view": texts(pa.string_view()),
    "dictionary of string": lambda values: pa.array(values, pa.string()).dictionary_encode(),
}
NESTED: dict[str, Callable[[Callable[[list], pa.Array], str], Callable[[list], pa.Array]]] = {
    "plain": lambda make, name: make,
    "struct": in_structs,
    "list": lambda make, name: in_lists(make, "list"),
    "large list": lambda make, name: in_lists(make, "large"),
    "fixed list": lambda make, name: in_lists(make, "fixed"),
    "list of structs": lambda make, name: in_lists(in_structs(make, name), "list"),
}


CASES = [
    (file, kind, nested)
    for file in ("a.parquet", "plain.parquet", "a.arrow")
    for kind in [*BYTES, *TEXTS]
    for nested in NESTED
    if not ("view" in kind and "struct" in nested and "parquet" in file)  # pyarrow cannot write them
]


@pytest.mark.parametrize(("file", "kind", "nested"), CASES)
def test_every_type_that_holds_pictures_or_their_places_is_read(
    kind: str, nested: str, file: str, tmp_path: Path
) -> None:
    holds_bytes = kind in BYTES
    files = sorted(as_files(tmp_path / "there", PICTURES).rglob("*.png"), key=lambda file: file.name)
    values = PICTURES if holds_bytes else [str(file.relative_to(tmp_path)) for file in files]
    column = NESTED[nested]((BYTES | TEXTS)[kind], "bytes" if holds_bytes else "path")(values)
    table = pa.table({"image": column})
    if file.endswith(".arrow"):
        with pa.ipc.new_file(tmp_path / file, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    else:
        pq.write_table(table, tmp_path / file, row_group_size=5, compression="none" if "plain" in file else "snappy")
    found = found_in(tmp_path / file)
    assert used(found) == PICTURES
    check_fetched(found)


def test_fixed_size_bytes_are_read(tmp_path: Path) -> None:
    same = [picture.ljust(100, b"\0") for picture in PICTURES]
    pq.write_table(pa.table({"image": pa.array(same, pa.binary(100))}), tmp_path / "a.parquet")
    assert used(found_in(tmp_path / "a.parquet")) == same


def test_a_list_of_none_or_several_is_the_rejection_of_its_row(tmp_path: Path) -> None:
    values = [[PICTURES[0]], [], PICTURES[1:3], None, [None], [PICTURES[3]]]
    found = found_in(as_parquet(tmp_path, values))
    assert used(found) == [PICTURES[0], PICTURES[3]]
    messages = ["no value", "2 images; one image per row", "no value", "no value"]
    assert [message for _, message in refused(found)] == messages
    assert [image.row for image in found] == list(range(6))


def test_addresses_in_a_table_stay_below_the_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    as_files(source / "there", PICTURES[:2])
    as_files(tmp_path / "private", PICTURES[2:4])
    inside = ["../there/0000.png", str(source / "there" / "deep" / "0001.png")]
    outside = [
        "../../private/0000.png",
        str(tmp_path / "private" / "deep" / "0001.png"),
        "s3://b/a.png?endpoint_override=x:1",
    ]
    as_parquet(source / "tables", inside + outside)
    found = found_in(source)
    assert sorted(used(found)) == sorted([*PICTURES[:2], *PICTURES[:2]])
    assert [message.partition(" is not below")[0].strip("'") for _, message in refused(found)] == outside
    found = found_in(source, allow_outside=True)
    assert Counter(used(found)) == Counter([*PICTURES[:2], *PICTURES[:2], *PICTURES[2:4]])
    [(_, message)] = refused(found)
    assert "has options of its own" in message


def with_side_files(folder: Path) -> Path:
    """What img2dataset and the systems of desktops leave beside pictures."""
    as_files(folder, PICTURES[:3])
    as_tar(folder, PICTURES[3:6])
    for name in ("00000.parquet", "metadata.parquet"):
        pq.write_table(pa.table({"url": ["https://x/1.jpg"], "caption": ["a"]}), folder / name)
    pq.write_table(pa.table({"image": [1, 2]}), folder / "numbers.parquet")
    (folder / "damaged.parquet").write_bytes(b"PAR1" + bytes(100))
    (folder / "damaged.arrow").write_bytes(b"ARROW1\0\0" + bytes(range(100)))
    (folder / "damaged.tar").write_bytes(bytes(range(256)) * 10)
    (folder / "00000_stats.json").write_text(json.dumps({"count": 6}))
    for name in (".DS_Store", "Thumbs.db", "._0000.png", "a.lock", "captions.txt", "dataset_dict.json", "state.json"):
        (folder / name).write_bytes(b"\0\1[")
    (folder / "empty.parquet").write_bytes(b"")
    return folder


def test_side_files_are_rejected_rows_and_stop_nothing(tmp_path: Path) -> None:
    source = with_side_files(tmp_path / "source")
    found = found_in(source)
    assert set(PICTURES[:6]) <= set(used(found))
    files = [file.name for file in source.rglob("*") if file.is_file()]
    assert {Path(image.path).name for image in found} == set(files), "each is accounted for"
    messages = dict(refused(found))
    assert "has no column 'image'" in messages["metadata.parquet"]
    assert "is int64" in messages["numbers.parquet"]
    assert messages["empty.parquet"] == "0 bytes"
    parts = listed(source, tmp_path / "new")
    assert sum(part.stop - part.start for part in parts) == len(files)


def test_a_table_without_the_column_is_an_error_where_nothing_else_is(tmp_path: Path) -> None:
    for number in range(3):
        as_parquet(tmp_path / "source", [b"x"], name=f"{number}.parquet")
    (tmp_path / "source" / "README.md").write_text("Our pictures.")
    with pytest.raises(SourceError, match="no column 'photo'.*Its columns: id, image"):
        listed(tmp_path / "source", tmp_path / "new", image_column="photo")


def test_what_cannot_be_opened_in_a_folder_is_listed_and_rejected(tmp_path: Path) -> None:
    source = as_files(tmp_path, PICTURES[:3])
    os.mkfifo(source / "pipe.png")
    (source / "nowhere.png").symlink_to(source / "none.png")
    (source / "circle.png").symlink_to(source / "circle.png")
    (source / "back").symlink_to(source, target_is_directory=True)
    as_files(tmp_path / "elsewhere", PICTURES[3:5]).rename(tmp_path / "else")
    (source / "linked").symlink_to(tmp_path / "else", target_is_directory=True)
    os.mkdir(os.fsencode(source) + b"/f\xfflder")
    for name in (b"/\xff\xfe.png", b"/f\xfflder/a.png"):
        Path(os.fsdecode(os.fsencode(source) + name)).write_bytes(PICTURES[5])
    found = found_in(source)
    assert set(used(found)) >= set(PICTURES[:5])
    names = [name for name, _ in refused(found)]
    assert {"pipe.png", "nowhere.png", "circle.png", "\\xff\\xfe.png", "f\\xfflder", "back"} <= set(names)
    assert all(isinstance(image.encoded, bytes | Rejected) for image in found)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-le", "utf-32", "cp1252", "latin-1"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_list_is_read_as_any_system_writes_it(encoding: str, newline: str, tmp_path: Path) -> None:
    names = ["größe.png", "b.png", "c d.png"]
    for name, picture in zip(names, PICTURES, strict=False):
        (tmp_path / name).write_bytes(picture)
    text = newline.join(["# ours", "", *names, "   ", ""])
    content = b"\xff\xfe" + text.encode("utf-16-le") if encoding == "utf-16-le-bom" else text.encode(encoding)
    (tmp_path / "list.txt").write_bytes(content)
    assert used(found_in(tmp_path / "list.txt")) == PICTURES[:3]


def test_options_in_a_list_do_not_count(tmp_path: Path) -> None:
    as_files(tmp_path, PICTURES[:1])
    lines = ["0000.png", "s3://bucket/a.png?endpoint_override=127.0.0.1:9&scheme=http", "s3://key:secret@bucket/a.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    found = found_in(tmp_path / "list.txt")
    assert used(found) == PICTURES[:1]
    (_, first), (_, second) = refused(found)
    assert "has options of its own" in first and "holds credentials" in second and "secret" not in second


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    source = as_parquet(tmp_path, PICTURES, rows=4, compression="snappy")
    there = found_in(source)
    begin = pq.read_metadata(source).row_group(1).column(1).dictionary_page_offset
    assert begin
    content = bytearray(source.read_bytes())
    content[begin : begin + 40] = b"\xff" * 40
    source.write_bytes(content)
    found = found_in(source)
    assert used(found) == [*PICTURES[:4], *PICTURES[8:]]
    [(_, message)] = refused(found)
    assert message.startswith("rows 4 to 7: ")
    images = fetch_indexed([place_of(image) for image in there], "image")
    assert [i for i, image in enumerate(images) if isinstance(image, Rejected)] == [4, 5, 6, 7]


def test_a_damaged_record_batch_costs_its_own_rows(tmp_path: Path) -> None:
    source = as_arrow(tmp_path, PICTURES, compression="zstd")
    content = source.read_bytes()
    places = [place for place in range(len(content)) if content[place : place + 4] == b"\x28\xb5\x2f\xfd"]
    assert len(places) >= 8, "two buffers a batch"
    damaged = content[: places[3]] + bytes(20) + content[places[3] + 20 :]
    source.write_bytes(damaged)
    found = found_in(source)
    assert used(found) == [*PICTURES[:4], *PICTURES[8:]]
    assert len(refused(found)) == 1
    check_fetched(found)


@pytest.mark.parametrize(
    ("compression", "copied", "expected"),
    [("none", False, None), ("zstd", False, "row groups of 5, .*pool.copy_compressed=true"), ("zstd", True, None)],
)
def test_compressed_tables_are_reported_with_what_they_cost(
    compression: str, copied: bool, expected: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed(as_parquet(tmp_path / "a", PICTURES, compression=compression), tmp_path / "new", copy_compressed=copied)
    assert re.search(expected, caplog.text) if expected else not caplog.text
