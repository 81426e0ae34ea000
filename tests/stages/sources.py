"""The same pictures as every kind of source, for the tests of the pool."""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def tiny_pictures(number: int, first: int = 0, side_px: int = 8) -> list[bytes]:
    """Return so many encoded pictures, each of another colour."""
    pictures = []
    for index in range(first, first + number):
        buffer = io.BytesIO()
        colour = (index % 251, index // 251 % 251, 7 * index % 251)
        Image.new("RGB", (side_px, side_px), colour).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    return pictures


def as_files(folder: Path, pictures: Sequence[bytes], first: int = 0) -> Path:
    (folder / "deep").mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures, start=first):
        (folder / ("deep" if index % 2 else ".") / f"{index:04d}.png").write_bytes(picture)
    return folder


def as_list(folder: Path, pictures: Sequence[bytes]) -> Path:
    """Relative and absolute paths, a comment and blank lines."""
    files = sorted(as_files(folder / "there", pictures).rglob("*.png"))
    lines = [str(file if index % 3 else file.relative_to(folder)) for index, file in enumerate(files)]
    (folder / "list.txt").write_text("# our pictures\n\n" + "\n".join(lines) + "\n\n")
    return folder / "list.txt"


def as_tar(folder: Path, pictures: Sequence[bytes], name: str = "000.tar") -> Path:
    """A WebDataset: a picture and what is said of it, by the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / name, "w") as archive:
        for index, picture in enumerate(pictures):
            for ending, content in ((".png", picture), (".json", b"{}"), (".txt", b"A colour.")):
                member = tarfile.TarInfo(f"{index:04d}{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder / name


def as_parquet(
    folder: Path, values: Sequence[object], name: str = "a.parquet", *, rows: int = 5, **options: object
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": range(len(values)), "image": list(values)})
    pq.write_table(table, folder / name, row_group_size=rows, **options)
    return folder / name


def _addresses(folder: Path, pictures: Sequence[bytes]) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in as_files(folder / "there", pictures).rglob("*.png"))


def _saved(folder: Path, pictures: Sequence[bytes]) -> datasets.Dataset:
    rows = {"image": [{"bytes": picture, "path": None} for picture in pictures]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))


def as_dataset(folder: Path, pictures: Sequence[bytes]) -> Path:
    _saved(folder, pictures).save_to_disk(folder)
    return folder


def as_splits(folder: Path, pictures: Sequence[bytes]) -> Path:
    halves = {"train": _saved(folder, pictures[::2]), "test": _saved(folder, pictures[1::2])}
    datasets.DatasetDict(halves).save_to_disk(folder)
    return folder


def as_arrow(folder: Path, pictures: Sequence[bytes], **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": list(pictures)})
    with pa.ipc.new_file(folder / "a.arrow", table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=4)
    return folder / "a.arrow"


SOURCES: dict[str, Callable[[Path, Sequence[bytes]], Path]] = {
    "folder": as_files,
    "list": as_list,
    "tar": as_tar,
    "Parquet, compressed": as_parquet,
    "Parquet, as it is": lambda f, p: as_parquet(f, p, compression="none", use_dictionary=False),
    "Parquet, as it is, with a dictionary": lambda f, p: as_parquet(f, p, compression="none"),
    "Parquet, structs": lambda f, p: as_parquet(f, [{"bytes": e, "path": "x"} for e in p], compression="none"),
    "Parquet, paths": lambda f, p: as_parquet(f, _addresses(f, p)),
    "Parquet, structs with paths": lambda f, p: as_parquet(
        f, [{"bytes": None, "path": a} for a in _addresses(f, p)], compression="none"
    ),
    "saved dataset": as_dataset,
    "saved dataset with splits": as_splits,
    "Arrow file": as_arrow,
    "Arrow file, compressed": lambda f, p: as_arrow(f, p, compression="zstd"),
}
"""Writes pictures as a source below a folder and returns what pool.source is set to."""
