"""Stage `pool`: every file ends as an index row or a rejected row, in an order that depends on content alone."""

import io
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stic_ray.core.errors import SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INDEX
from stic_ray.method.images import ImageLimits, image_id, inspect
from stic_ray.stages.fetch import fetch_indexed
from tests.method.pictures import animated, header_of_png
from tests.stages.builders import TELLING, draw_pictures, fake_config, pairs_of, rejected_of, run_stages
from tests.stages.sources import as_parquet, tiny_pictures

pytestmark = pytest.mark.usefixtures("ray_session")


def index_of(run: RunDir) -> list[dict]:
    return (run / "pool").read_table("index", INDEX).to_pylist()


def test_every_file_is_indexed_or_rejected_with_its_reason(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 6)
    nested = pictures / "deep" / "er"
    nested.mkdir(parents=True)
    picture = Image.open(pictures / "000.jpg")
    for name, mode in (("grey.png", "L"), ("palette.gif", "P"), ("alpha.webp", "RGBA"), ("print.tiff", "CMYK")):
        picture.convert(mode).save(nested / name)
    picture.save(nested / "plain.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), "red").save(nested / "turned.jpg", exif=exif)
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "text.jpg").write_text("no picture")
    (pictures / "cut.jpg").write_bytes((pictures / "001.jpg").read_bytes()[:900])
    shutil.copy(pictures / "002.jpg", pictures / "again.jpg")  # 002.jpg comes first, so this is the duplicate
    Image.new("RGB", (400, 10)).save(pictures / "long.png")
    Image.new("RGB", (2, 2)).save(pictures / "dot.png")
    Image.new("RGB", (300, 300)).save(pictures / "big.png")
    (pictures / "bomb.png").write_bytes(header_of_png(100_000, 100_000))
    Image.new("RGB", (30_000, 10)).save(pictures / "ribbon.png")
    picture.save(pictures / "really_png.jpg", "PNG")
    Image.new("I;16", (40, 40), 32896).save(nested / "deep.png")
    (nested / "animated.gif").write_bytes(animated("GIF"))
    picture.convert("P").save(nested / "see_through.png", transparency=0)

    run = run_stages(fake_config(tmp_path, pictures, pool={"max_image_pixels": 64 * 64 + 1}), tmp_path / "run", "pool")

    reasons = {Path(row["path"]).name: row["reason"] for row in rejected_of(run, "pool")}
    assert reasons == {
        "again.jpg": "duplicate",
        "big.png": "too_many_pixels",
        "bomb.png": "too_many_pixels",
        "cut.jpg": "undecodable_image",
        "dot.png": "too_small",
        "empty.jpg": "empty_file",
        "long.png": "aspect_ratio",
        "ribbon.png": "too_many_pixels",
        "text.jpg": "unsupported_format",
    }
    rows = {Path(row["path"]).name: row for row in index_of(run)}
    assert len(rows) + len(reasons) == len([f for f in pictures.rglob("*") if f.is_file()])
    assert (rows["turned.jpg"]["width_px"], rows["turned.jpg"]["height_px"]) == (20, 30)
    assert rows["really_png.jpg"]["format"] == "PNG"
    assert (rows["deep.png"]["mode"], rows["see_through.png"]["mode"]) == ("I;16", "P")
    assert {row["format"] for row in rows.values()} == {"JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"}
    manifest = (run / "pool").manifest
    assert manifest is not None
    assert manifest["num_rows_in"] == len(rows) + len(reasons)
    assert manifest["num_rows_rejected"] == len(reasons)


def test_order_survives_renaming_and_a_larger_pool_keeps_it(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 10)
    first = [row["image_id"] for row in index_of(run_stages(fake_config(tmp_path, pictures), tmp_path / "a", "pool"))]
    for path in sorted(pictures.iterdir()):
        path.rename(path.with_name(f"moved_{path.name[::-1]}.jpg"))
    renamed = [row["image_id"] for row in index_of(run_stages(fake_config(tmp_path, pictures), tmp_path / "b", "pool"))]
    larger = draw_pictures(tmp_path / "larger", 14)
    more = [row["image_id"] for row in index_of(run_stages(fake_config(tmp_path, larger), tmp_path / "c", "pool"))]

    assert renamed == first
    assert [identity for identity in more if identity in set(first)] == first
    assert first != sorted(first)


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_parquet_gives_the_same_images_as_files(kind: str, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 7)
    encoded = [path.read_bytes() for path in sorted(pictures.iterdir())]
    values = [{"bytes": e, "path": None} for e in encoded] if kind == "struct" else encoded
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"photo": values, "n": range(7)}), tmp_path / "tables" / "a.parquet", row_group_size=3)
    config = fake_config(tmp_path, tmp_path / "tables", pool={"image_column": "photo"})

    from_tables = run_stages(config, tmp_path / "a", "pool", "preferences")
    from_files = run_stages(fake_config(tmp_path, pictures), tmp_path / "b", "pool", "preferences")

    assert [r["image_id"] for r in index_of(from_tables)] == [r["image_id"] for r in index_of(from_files)]
    assert pairs_of(from_tables).num_rows + len(rejected_of(from_tables, "preferences")) == 7
    for shard in (from_tables / "preferences").shards("pairs"):
        for row in pq.read_table(shard.path).to_pylist():
            assert row["image"]["bytes"] in encoded


def test_a_parquet_source_without_the_column_names_the_ones_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"images": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="no column 'image'. Did you mean 'images'"):
        run_stages(fake_config(tmp_path, tmp_path / "a.parquet"), tmp_path / "run", "pool")


def test_a_folder_without_a_usable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("x")
    with pytest.raises(SourceError, match="no image that can be used: 1 unsupported_format"):
        run_stages(fake_config(tmp_path, tmp_path / "bad"), tmp_path / "run", "pool")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty folder"):
        run_stages(fake_config(tmp_path, tmp_path / "empty"), tmp_path / "run2", "pool")


def test_an_image_that_vanished_after_indexing_is_a_rejected_row(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 5)
    config = fake_config(tmp_path, pictures, TELLING)
    run_stages(config, tmp_path / "run", "pool")
    os.remove(pictures / "003.jpg")

    run = run_stages(config, tmp_path / "run", "preferences")

    assert [(Path(r["path"]).name, r["reason"]) for r in rejected_of(run, "preferences")] == [
        ("003.jpg", "unreadable_file")
    ]
    assert pairs_of(run).num_rows == 4


def test_stored_pictures_are_what_the_model_saw(tmp_path: Path) -> None:
    """A 16-bit grey picture is stored as the 8-bit RGB one that was described, an ordinary JPEG as it came."""
    pictures = draw_pictures(tmp_path / "pictures", 1)
    Image.new("I;16", (40, 40), 32896).save(pictures / "deep.png")
    script = "rules: [{prompt: step, answer: 'Colour {colour} {seed}.'}]\ndefault: 'Else.'"
    config = fake_config(tmp_path, pictures, script, preferences={"hallucination_share": 1.0})
    run = run_stages(config, tmp_path / "run", "pool", "preferences")

    rows = {Path(row["image"]["path"]).name: row for row in pairs_of(run).to_pylist()}
    assert rows["deep.png"]["chosen"][0]["content"].startswith("Colour #808080 ")
    stored = Image.open(io.BytesIO(rows["deep.png"]["image"]["bytes"]))
    assert stored.mode == "RGB" and stored.getpixel((0, 0)) == (128, 128, 128)
    assert rows["000.jpg"]["image"]["bytes"] == (pictures / "000.jpg").read_bytes()


def test_a_source_that_was_mended_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "000.jpg").write_text("x")
    config = fake_config(tmp_path, tmp_path / "pictures")
    with pytest.raises(SourceError, match="no image that can be used"):
        run_stages(config, tmp_path / "run", "pool")
    draw_pictures(tmp_path / "pictures", 1)
    assert len(index_of(run_stages(config, tmp_path / "run", "pool"))) == 1


def test_other_files_beside_parquet_are_accounted_for(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 3)
    pq.write_table(pa.table({"image": [(pictures / "000.jpg").read_bytes()]}), pictures / "more.parquet")
    (pictures / "_SUCCESS").write_text("")
    run = run_stages(fake_config(tmp_path, pictures), tmp_path / "run", "pool")
    reasons = {Path(row["path"]).name: row["reason"] for row in rejected_of(run, "pool")}
    assert reasons == {"_SUCCESS": "empty_file", "more.parquet": "duplicate"}
    assert len(index_of(run)) == 3


def test_near_duplicates_of_earlier_pictures_are_rejected(tmp_path: Path) -> None:
    """Ten pictures, each again in another format: of each two, the one that is first in the order stays."""
    pictures = draw_pictures(tmp_path / "pictures", 10)
    for path in sorted(pictures.iterdir()):
        Image.open(path).save(path.with_suffix(".png"))
    settings = {"near_duplicate_bits": 4}
    everything = index_of(run_stages(fake_config(tmp_path, pictures), tmp_path / "all", "pool"))
    config = fake_config(tmp_path, pictures, pool=settings)
    run = run_stages(config, tmp_path / "run", "pool")

    hashes = {row["image_id"]: hash_of(row["path"]) for row in everything}
    ids = list(hashes)  # in the order
    expected = {a for i, a in enumerate(ids) if any((hashes[a] ^ hashes[b]).bit_count() <= 4 for b in ids[:i])}
    near = {row["image_id"]: row for row in rejected_of(run, "pool")}
    kept = [row["image_id"] for row in index_of(run)]
    assert near.keys() == expected and len(expected) >= 10
    assert kept == [identity for identity in ids if identity not in expected]
    for identity, row in near.items():
        told = re.fullmatch(r"(\d) of 64 bits from image (\w+), which comes earlier", row["message"])
        assert told is not None and row["reason"] == "near_duplicate"
        assert (hashes[identity] ^ hashes[told[2]]).bit_count() == int(told[1]) <= 4
        assert ids.index(told[2]) < ids.index(identity)

    Image.open(next(row["path"] for row in everything if row["image_id"] == kept[0])).save(pictures / "late.bmp")
    run_stages(config, tmp_path / "run", "pool")
    assert [row["image_id"] for row in index_of(run)] == kept, "what the index has is earlier than all that is new"
    assert [Path(r["path"]).name for r in rejected_of(run, "pool") if r["image_id"] not in near] == ["late.bmp"]


def hash_of(path: str) -> int:
    found = inspect(Path(path).read_bytes(), ImageLimits(8, 10**8, 20.0), with_hash=True).perceptual_hash
    assert found is not None
    return found % 2**64


def test_images_of_a_compressed_table_can_be_copied_to_be_read_by_themselves(tmp_path: Path) -> None:
    pictures = tiny_pictures(12)
    source = as_parquet(tmp_path / "source", pictures)
    run = run_stages(fake_config(tmp_path, source, TELLING, pool={"copy_compressed": True}), tmp_path / "run", "pool")
    shutil.rmtree(source.parent)
    rows = index_of(run)
    assert {image_id(image) for image in fetch_indexed(rows, "image") if isinstance(image, bytes)} == {
        image_id(picture) for picture in pictures
    }
    assert sorted(row["row"] for row in rows) == list(range(12)), "where they came from is still told"
