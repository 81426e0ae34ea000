"""Captions of the source: every layout that has them, and that one which is missing or unusable is never made up."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stic_ray.core.config import PoolConfig
from stic_ray.core.errors import ConfigError, Failed, Rejected, SourceError
from stic_ray.core.overrides import build_config
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INDEX
from stic_ray.core.storage import Location
from stic_ray.stages import tars
from stic_ray.stages.containers import Found, Reading, images_in
from stic_ray.stages.listing import entries, write_listing
from stic_ray.stages.reading import Patience
from stic_ray.stages.source_captions import MAX_CHARACTERS, MAX_FILE_BYTES, Captions
from tests.stages.builders import fake_config, rejected_of, run_stages
from tests.stages.sources import as_files, as_tar, tiny_pictures

PICTURES = tiny_pictures(6)
TEXTS = [f"A caption of {number}: é, 写真." for number in range(6)]
TXT, JSON = {"caption_member": "txt"}, {"caption_member": "json:caption"}
COLUMN = {"caption_column": "text"}


def tar_of(file: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def named(ending: str, contents: Sequence[bytes | None]) -> list[tuple[str, bytes]]:
    """Name contents as members of a WebDataset, one by one."""
    return [(f"{number:04d}.{ending}", each) for number, each in enumerate(contents) if each is not None]


def sample_tar(file: Path, ending: str, captions: Sequence[bytes | None]) -> Path:
    """Write the first pictures with these captions, the members of a sample beside each other."""
    members = [*named("png", PICTURES[: len(captions)]), *named(ending, captions)]
    return tar_of(file, sorted(members))


def table_of(folder: Path, captions: Any, name: str = "a.parquet", **columns: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    number = len(captions)
    pq.write_table(pa.table({"image": PICTURES[:number], "text": captions, **columns}), folder / name, row_group_size=2)
    return folder / name


def addresses_of(folder: Path, captions: Sequence[str]) -> Path:
    names = sorted(str(file.relative_to(folder)) for file in as_files(folder / "there", PICTURES).rglob("*.png"))
    order = [int(Path(name).stem) for name in names]
    pq.write_table(pa.table({"image": names, "text": [captions[n] for n in order]}), folder / "a.parquet")
    return folder / "a.parquet"


def arrow_of(folder: Path, captions: Sequence[str]) -> Path:
    rows = {"image": [{"bytes": picture, "path": None} for picture in PICTURES], "text": captions}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return folder


def files_of(folder: Path, captions: Sequence[str], ending: str = "txt") -> Path:
    """Write pictures as trainers of adapters have them: a text of the same name beside each."""
    for file in as_files(folder, PICTURES).rglob("*.png"):
        text = captions[int(file.stem)]
        file.with_suffix(f".{ending}").write_text(json.dumps({"caption": text}) if ending == "json" else f"{text}\n")
    return folder


def apart(folder: Path, captions: Sequence[str]) -> Path:
    """Write a tar whose captions stand behind all of its pictures."""
    texts = [text.encode() for text in captions]
    return tar_of(folder / "a.tar", [*named("png", PICTURES), *named("txt", texts)])


SOURCES: dict[str, tuple[Callable[[Path, Sequence[str]], Path], Mapping[str, str]]] = {
    "Parquet": (table_of, COLUMN),
    "Parquet, large text": (lambda f, c: table_of(f, pa.array(c, pa.large_string())), COLUMN),
    "Parquet, dictionary": (lambda f, c: table_of(f, pa.array(c).dictionary_encode()), COLUMN),
    "Parquet, addresses": (addresses_of, COLUMN),
    "saved dataset": (arrow_of, COLUMN),
    "tar": (lambda f, c: sample_tar(f / "a.tar", "txt", [f"  {text}\n".encode("utf-8-sig") for text in c]), TXT),
    "tar, JSON": (
        lambda f, c: sample_tar(f / "a.tar", "json", [json.dumps({"url": "x", "caption": t}).encode() for t in c]),
        JSON,
    ),
    "tar, captions apart": (apart, TXT),
    "files": (files_of, TXT),
    "files, caption": (lambda f, c: files_of(f, c, "caption"), {"caption_member": "caption"}),
    "files, JSON": (lambda f, c: files_of(f, c, "json"), JSON),
}


def found_in(source: Path, **settings: Any) -> list[Found]:
    rows = pa.concat_tables(entries(str(source))).to_pylist()
    captions = Captions.of(PoolConfig(source=str(source), **settings))
    return list(images_in([row["uri"] for row in rows], Reading("image", 10**6, captions=captions)))


def captions_of(found: Sequence[Found]) -> dict[int, str | None]:
    """Return what each picture got: its caption, or the reason why it has none."""
    given = {}
    for image in found:
        assert isinstance(image.encoded, bytes), image
        told = image.caption
        given[PICTURES.index(image.encoded)] = str(told.reason) if isinstance(told, Rejected) else told
    return given


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_each_picture_its_own_caption(kind: str, tmp_path: Path) -> None:
    write, settings = SOURCES[kind]
    assert captions_of(found_in(write(tmp_path / "source", TEXTS), **settings)) == dict(enumerate(TEXTS))


@pytest.mark.parametrize("kind", ["Parquet", "saved dataset", "tar", "tar, JSON"])
def test_without_a_named_source_of_captions_there_are_none(kind: str, tmp_path: Path) -> None:
    assert set(captions_of(found_in(SOURCES[kind][0](tmp_path / "source", TEXTS))).values()) == {None}


def test_a_caption_far_behind_or_in_front_of_its_picture_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "_NUM_WAITING", 1)
    texts = named("txt", [text.encode() for text in TEXTS])
    for name, members in {
        "behind": [*named("png", PICTURES), *texts],
        "in front": [*texts, *named("png", PICTURES)],
        "mixed": [*texts[3:], *named("png", PICTURES), *texts[:3]],
    }.items():
        assert captions_of(found_in(tar_of(tmp_path / name / "a.tar", members), **TXT)) == dict(enumerate(TEXTS))


def test_names_count_up_to_the_ending_or_as_webdataset_counts_them_to_the_first_dot(tmp_path: Path) -> None:
    members = [
        ("one/a.png", PICTURES[0]),
        ("one/a.txt", b"one"),
        ("two/a.png", PICTURES[1]),  # the same name in another folder is another sample
        ("two/a.txt", b"two"),
        ("b.seg.png", PICTURES[2]),
        ("b.TXT", b"to the first dot"),
        ("c.1.png", PICTURES[3]),
        ("c.1.txt", b"to the ending"),
        ("./._d.txt", b"of macOS"),
        ("d.png", PICTURES[4]),
        ("stray.txt", b"of no picture"),
    ]
    told = captions_of(found_in(tar_of(tmp_path / "a.tar", members), **TXT))
    assert told == {0: "one", 1: "two", 2: "to the first dot", 3: "to the ending", 4: "no_caption"}


def not_text(values: Sequence[bytes]) -> pa.Array:
    """Return a column of text whose bytes Arrow has not checked."""
    held = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(held), held.buffers())


LONG = "x" * (MAX_CHARACTERS + 1)
BAD: dict[str, tuple[Callable[[Path], Path], Mapping[str, str], list[str]]] = {
    "column": (
        lambda f: table_of(f, ["good", None, "", " \n\t", LONG, "x" * MAX_CHARACTERS]),
        COLUMN,
        ["good", "no_caption", "no_caption", "no_caption", "too_long", "x" * MAX_CHARACTERS],
    ),
    "column of bytes that are no text": (
        lambda f: table_of(f, not_text([b"good", b"\xff\xfe", b"good"])),
        COLUMN,
        ["good", "unreadable_row", "good"],
    ),
    "column without any": (lambda f: table_of(f, pa.nulls(2)), COLUMN, ["no_caption", "no_caption"]),
    "text members": (
        lambda f: sample_tar(f / "a.tar", "txt", [b"good", None, b"", b" \n", b"\xff", b"x" * (MAX_FILE_BYTES + 1)]),
        TXT,
        ["good", "no_caption", "no_caption", "no_caption", "unreadable_row", "too_long"],
    ),
    "JSON members": (
        lambda f: sample_tar(
            f / "a.tar",
            "json",
            [b'{"caption": "good"}', b"{", b"[1]", b'{"Caption": "x"}', b'{"caption": null}', b'{"caption": ["x"]}'],
        ),
        JSON,
        ["good", "unreadable_row", "unreadable_row", "no_caption", "no_caption", "unreadable_row"],
    ),
    "JSON members that would stop a reader": (
        lambda f: sample_tar(f / "a.tar", "json", [b'{"caption": "\\ud800"}', b"[" * 100_000]),
        JSON,
        ["unreadable_row", "unreadable_row"],
    ),
    "rows where files are meant": (lambda f: table_of(f, ["x"]), TXT, ["no_caption"]),
    "members where rows are meant": (lambda f: as_tar(f, PICTURES[:1]), COLUMN, ["no_caption"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_caption_that_cannot_be_used_costs_its_own_row_and_says_why(kind: str, tmp_path: Path) -> None:
    write, settings, expected = BAD[kind]
    assert captions_of(found_in(write(tmp_path / "source"), **settings)) == dict(enumerate(expected))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: file.unlink(), "no_caption"),
        (lambda file: file.write_text("\n"), "no_caption"),
        (lambda file: file.write_bytes(b"caf\xe9"), "unreadable_row"),
        (lambda file: file.write_text(LONG), "too_long"),
        (lambda file: (file.unlink(), file.mkdir()), "unreadable_file"),
    ],
    ids=["missing", "empty", "no UTF-8", "long", "a folder"],
)
def test_a_spoiled_file_beside_a_picture(spoil: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    source = files_of(tmp_path / "source", TEXTS)
    spoil(source / "0002.txt")
    assert captions_of(found_in(source, **TXT)) == {**dict(enumerate(TEXTS)), 2: reason}


@pytest.mark.parametrize("settings", [TXT, JSON], ids=["text", "JSON"])
def test_endings_of_files_are_told_apart_from_images_in_capitals_too(
    settings: Mapping[str, str], tmp_path: Path
) -> None:
    """As cameras name them; in a tar the same names give the same captions."""
    files = {}
    for number in range(6):
        spell = (str.lower, str.upper, str.capitalize)[number % 3]
        name, caption = ("json", json.dumps({"caption": TEXTS[number]})) if settings is JSON else ("txt", TEXTS[number])
        files |= {f"IMG_{number}.PNG": PICTURES[number], f"IMG_{number}.{spell(name)}": caption.encode()}
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    for source in (tmp_path / "folder", tar_of(tmp_path / "a.tar", list(files.items()))):
        assert captions_of(found_in(source, **settings)) == dict(enumerate(TEXTS))


def test_captions_in_a_bucket(endpoint: str) -> None:
    folder = Location.of(f"s3://pictures/captions?endpoint_override={endpoint}&scheme=http&region=us-east-1")
    for number in range(3):
        (folder / f"{number}.png").write(PICTURES[number])
        (folder / f"{number}.{'TXT' if number == 2 else 'txt'}").write(TEXTS[number].encode())
    (folder / "1.txt").delete()
    captions = Captions.of(PoolConfig(source=folder.uri, **TXT))
    reading = Reading("image", 10**6, options=folder.uri.partition("?")[2], captions=captions)
    found = images_in([row["uri"] for row in pa.concat_tables(entries(folder.uri)).to_pylist()], reading)
    assert captions_of(list(found)) == {0: TEXTS[0], 1: "no_caption", 2: TEXTS[2]}


def test_a_caption_that_the_storage_withholds_has_failed_with_its_picture(tmp_path: Path) -> None:
    """The disk goes away when the picture has been read; the same command tries the image again."""
    source = files_of(tmp_path / "source", TEXTS)
    place = Location.of(str(source / "0000.png"))
    shutil.rmtree(source)
    with pytest.raises(Failed, match="0000.txt"):
        Captions(ending="txt").beside(place, Patience(0.0))


@pytest.mark.parametrize(
    ("write", "settings", "told"),
    [
        (lambda f: table_of(f, ["x"]), {"caption_column": "texts"}, "no column 'texts'. Did you mean 'text'"),
        (lambda f: table_of(f, [1]), COLUMN, "'text' of .* is int64; pool.caption_column is one caption per row"),
        (lambda f: table_of(f, [["x", "y"]]), COLUMN, "write the one to use into a column of its own"),
        (lambda f: as_files(f, PICTURES), COLUMN, "names a column of tables.* set pool.caption_member=txt"),
        (lambda f: as_tar(f, PICTURES), COLUMN, "names a column of tables.* set pool.caption_member=txt"),
        (lambda f: table_of(f, ["x"]), TXT, "only tables; name their column with pool.caption_column"),
    ],
)
def test_captions_that_the_source_cannot_have_are_refused_before_the_scan(
    write: Callable[[Path], Path], settings: Mapping[str, Any], told: str, tmp_path: Path
) -> None:
    pool = PoolConfig(source=str(write(tmp_path / "source")), **settings)
    with pytest.raises(SourceError, match=told):
        write_listing(pool, RunDir.of(str(tmp_path / "new")), RunDir.of(str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("pool", "told"),
    [
        ({"caption_member": "json"}, "it is txt, text or caption .* or json:KEY"),
        ({"caption_member": "json:"}, "or json:KEY"),
        ({"caption_member": ".txt"}, "pool.caption_member=.txt is no place of a caption"),
        ({"caption_column": "image"}, "is the column of the images"),
        ({"captions": "optional"}, "set pool.caption_column .* or pool.caption_member"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(pool: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_config({"name": "x", "pool": pool})


@pytest.mark.usefixtures("ray_session")
class TestPool:
    """The stage, with the index and the manifest that it leaves."""

    def run(self, folder: Path, source: Path, **pool: Any) -> RunDir:
        folder.mkdir(exist_ok=True)
        return run_stages(fake_config(folder, source, pool=pool), folder / "run", "pool")

    def test_an_image_without_a_caption_is_rejected_or_stays_as_the_setting_says(self, tmp_path: Path) -> None:
        source = files_of(tmp_path / "source", TEXTS)
        without, wrong = source / "0002.txt", source / "deep" / "0003.txt"
        without.unlink()
        wrong.write_bytes(b"\xff")
        required = self.run(tmp_path / "required", source, **TXT)
        optional = self.run(tmp_path / "optional", source, **TXT, captions="optional")

        for run, number, reasons in (
            (required, 4, {"0002.png": "no_caption", "0003.png": "unreadable_row"}),
            (optional, 5, {"0003.png": "unreadable_row"}),
        ):
            rows, manifest = (run / "pool").read_table("index", INDEX).to_pylist(), (run / "pool").manifest
            assert manifest is not None and (len(rows), manifest["num_captions"]) == (number, 4)
            assert {Path(row["path"]).name: row["reason"] for row in rejected_of(run, "pool")} == reasons
            for row in rows:
                place = int(Path(row["path"]).stem)
                assert row["caption"] == (None if place == 2 else TEXTS[place])
        told = {Path(row["path"]).name: row for row in rejected_of(required, "pool")}["0002.png"]
        assert told["message"] == "no '0002.txt' beside it" and len(told["image_id"]) == 32

    def test_the_order_is_that_of_the_pool_without_captions_and_growth_counts_on(self, tmp_path: Path) -> None:
        source = files_of(tmp_path / "source", TEXTS)
        run = self.run(tmp_path, source, **TXT)
        as_files(tmp_path / "plain", PICTURES)
        plain = self.run(tmp_path / "other", tmp_path / "plain")
        columns = [name for name in INDEX.names if name not in ("path", "caption")]
        index = (plain / "pool").read_table("index", INDEX)
        assert (run / "pool").read_table("index", INDEX).select(columns).equals(index.select(columns))
        assert index["caption"].null_count == 6 and "num_captions" not in ((plain / "pool").manifest or {})

        [picture] = tiny_pictures(1, first=50)
        (source / "more.png").write_bytes(picture)
        (source / "more.txt").write_text("One more.")
        run = self.run(tmp_path, source, **TXT)
        assert ((run / "pool").manifest or {})["num_captions"] == 7
        assert (run / "pool").read_table("index", INDEX)["caption"].to_pylist()[6] == "One more."

    def test_near_duplicates_and_copies_keep_their_captions(self, tmp_path: Path) -> None:
        source = table_of(tmp_path / "source", TEXTS)
        run = self.run(tmp_path, source, **COLUMN, near_duplicate_bits=0, copy_compressed=True)
        rows = (run / "pool").read_table("index", INDEX).to_pylist()
        assert rows and all(row["caption"] == TEXTS[row["row"]] for row in rows)

    def test_a_source_whose_captions_are_nowhere_is_refused(self, tmp_path: Path) -> None:
        source = as_files(tmp_path / "source", PICTURES)
        with pytest.raises(SourceError, match=r"no image that can be used: 6 no_caption.* no '000\d.txt' beside it"):
            self.run(tmp_path / "a", source, **TXT)
        with pytest.raises(SourceError, match="No image of .* has a caption by pool.caption_member=txt"):
            self.run(tmp_path / "b", source, **TXT, captions="optional")
        shutil.rmtree(source)
        files_of(source, TEXTS)
        assert ((self.run(tmp_path / "b", source, **TXT, captions="optional") / "pool").manifest or {})["num_captions"]
