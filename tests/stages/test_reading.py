"""Reading while a storage is away: again for a while, then failed; what one file is at fault for is rejected."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from stic_ray.core.errors import Failed, Rejected
from stic_ray.core.storage import Location
from stic_ray.method.images import image_id
from stic_ray.stages.containers import Found, Reading, images_in
from stic_ray.stages.fetch import fetch_indexed
from stic_ray.stages.reading import Patience, Stream, read_file
from tests.stages.sources import as_arrow, as_files, as_parquet, as_tar, tiny_pictures

PICTURES = tiny_pictures(5)
IMPATIENT = Patience(0.0)


def read(file: Path, patience: Patience = IMPATIENT, max_bytes: int = 10**6) -> bytes:
    return read_file(Location.of(str(file)), max_bytes, patience)


def in_the_meantime(change: Callable[[], object]) -> Patience:
    """Patience that does not sleep: something happens when it would."""

    def sleep(seconds: float) -> None:
        change()

    return Patience(60.0, sleep=sleep)


def test_a_file_that_is_gone_from_among_others_is_rejected(tmp_path: Path) -> None:
    folder = as_files(tmp_path / "disk", PICTURES)
    with pytest.raises(Rejected, match="unreadable_file: .*none.png' is gone"):
        read(folder / "none.png")


@pytest.mark.parametrize("unmount", ["the folder is gone", "the folder is empty"])
def test_a_file_of_a_disk_that_is_away_has_failed_and_is_read_when_it_is_back(unmount: str, tmp_path: Path) -> None:
    folder = as_files(tmp_path / "disk", PICTURES)
    folder.rename(tmp_path / "away")
    if unmount == "the folder is empty":
        folder.mkdir()
    with pytest.raises(Failed, match="0000.png"):
        read(folder / "0000.png")
    back = in_the_meantime(lambda: (tmp_path / "away").rename(folder))
    assert read(folder / "0000.png", back) == PICTURES[0]


def test_data_may_name_folders_that_were_never_there(tmp_path: Path) -> None:
    """Below the folder that its paths are relative to; where that one is away, or empty, the storage is."""
    folder = as_files(tmp_path / "disk", PICTURES)
    named, below = folder / "parts" / "none" / "a.png", Patience(0.0, root=Location.of(str(folder)))
    with pytest.raises(Failed):
        read(named)
    with pytest.raises(Rejected, match="unreadable_file"):
        read(named, below)
    (folder / "parts").mkdir()  # a disk that is not mounted, in the middle
    with pytest.raises(Failed):
        read(named, below)
    folder.rename(tmp_path / "away")
    with pytest.raises(Failed):
        read(named, below)


def test_a_link_into_a_disk_that_is_away_has_failed(tmp_path: Path) -> None:
    folder = as_files(tmp_path / "disk", PICTURES)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(folder / "0000.png")
    (tmp_path / "links" / "b.png").symlink_to(folder / "none.png")
    with pytest.raises(Rejected):
        read(tmp_path / "links" / "b.png")
    folder.rename(tmp_path / "away")
    with pytest.raises(Failed):
        read(tmp_path / "links" / "a.png")


def test_the_reads_of_a_task_wait_together_and_not_one_after_the_other(tmp_path: Path) -> None:
    """The clock is that of the sleeps: when the first read has used the time up, no other sleeps at all."""
    slept = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    patience = Patience(60.0, sleep=sleep, clock=lambda: now[0])
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(Failed):
            read(tmp_path / "disk" / name, patience)
    assert 60.0 <= sum(slept) < 90.0


def test_trouble_that_is_over_gives_the_next_as_much_time(tmp_path: Path) -> None:
    now = [0.0]
    folder = as_files(tmp_path / "disk", PICTURES)

    def sleep(seconds: float) -> None:
        now[0] += 50.0
        (tmp_path / "away").rename(folder)

    patience = Patience(60.0, sleep=sleep, clock=lambda: now[0])
    for _ in range(3):
        folder.rename(tmp_path / "away")
        assert read(folder / "0000.png", patience) == PICTURES[0]


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0b.png", "half \ud83d.png"])
def test_a_name_that_no_file_can_have_is_rejected(name: str, tmp_path: Path) -> None:
    as_files(tmp_path, PICTURES)
    with pytest.raises(Rejected, match="unreadable_file"):
        read(tmp_path / name)


def test_a_large_file_that_is_no_image_is_not_read(tmp_path: Path) -> None:
    """Of the 300 MiB there is nothing on the disk, and nothing in the memory."""
    with (tmp_path / "film.mp4").open("wb") as stream:
        stream.truncate(300 * 2**20)
    with pytest.raises(Rejected, match="unsupported_format"):
        read(tmp_path / "film.mp4", max_bytes=10**9)


def test_a_stream_goes_on_where_it_was_when_the_disk_comes_back(tmp_path: Path) -> None:
    file = as_tar(tmp_path / "disk", PICTURES)
    whole = file.read_bytes()
    stream = Stream(
        Location.of(str(file)),
        Patience(60.0, sleep=lambda seconds: (tmp_path / "away").rename(tmp_path / "disk") and None),
    )
    assert stream.read(1000) == whole[:1000]
    (tmp_path / "disk").rename(tmp_path / "away")
    stream._file = None  # as an error of a read leaves it
    assert stream.read() == whole[1000:]


AWAY = {
    "a file": lambda folder: as_files(folder, PICTURES) / "0000.png",
    "tar": lambda folder: as_tar(folder, PICTURES),
    "Parquet": lambda folder: as_parquet(folder, PICTURES),
    "Arrow": lambda folder: as_arrow(folder, PICTURES, compression="zstd"),
}


def places_of(found: list[Found]) -> list[dict]:
    encoded = [(image, image.encoded) for image in found if isinstance(image.encoded, bytes)]
    return [
        {"image_id": image_id(e), "path": i.path, "row": i.row, "offset": i.offset, "num_bytes": len(e)}
        for i, e in encoded
    ]


@pytest.mark.parametrize("kind", AWAY)
def test_every_kind_of_file_fails_with_its_disk_and_comes_back_with_it(kind: str, tmp_path: Path) -> None:
    file = AWAY[kind](tmp_path / "disk")
    reading = Reading("image", 10**6, patience=IMPATIENT)
    there = list(images_in([str(file)], reading))
    places = places_of(there)
    assert places
    (tmp_path / "disk").rename(tmp_path / "away")
    assert [type(image.encoded) for image in images_in([str(file)], reading)] == [Failed]
    assert {type(image) for image in fetch_indexed(places, "image", patience=IMPATIENT)} == {Failed}
    (tmp_path / "away").rename(tmp_path / "disk")
    assert list(images_in([str(file)], reading)) == there
    assert fetch_indexed(places, "image") == [image.encoded for image in there]


def test_many_threads_share_one_patience(tmp_path: Path) -> None:
    """All of a shard's files are away, and come back together, while some threads look why theirs is missing."""
    folder = as_files(tmp_path / "disk", tiny_pictures(40))
    places = places_of(list(images_in([str(file) for file in folder.iterdir()], Reading("image", 10**6))))
    folder.rename(tmp_path / "away")
    lock = threading.Lock()

    def mount() -> None:
        with lock:
            if not folder.exists():
                (tmp_path / "away").rename(folder)

    images = fetch_indexed(places, "image", patience=in_the_meantime(mount))
    assert all(isinstance(image, bytes) for image in images)


def test_what_a_bucket_has_not_is_rejected_and_a_bucket_that_is_not_there_has_failed(endpoint: str) -> None:
    options = f"endpoint_override={endpoint}&scheme=http&region=us-east-1"
    (Location.of(f"s3://pictures?{options}") / "reading" / "a.png").write(PICTURES[0])
    rows = [
        {"path": f"s3://{key}?{options}", "row": None}
        for key in ("pictures/reading/a.png", "pictures/reading/b.png", "none/a.png")
    ]
    images = fetch_indexed(rows, "image", patience=IMPATIENT)
    assert [type(image) for image in images] == [bytes, Rejected, Failed]


def test_a_store_that_does_not_answer_has_failed() -> None:
    row = {"path": "s3://pictures/a.png?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1", "row": None}
    [image] = fetch_indexed([row], "image", patience=IMPATIENT)
    assert isinstance(image, Failed) and "pictures/a.png" in image.message
