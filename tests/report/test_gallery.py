"""The gallery of pairs: which are shown, and that corruptions are made again exactly."""

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from stic_ray.core.rundir import RunDir
from stic_ray.method.corruption import corrupt, low_resolution, pixel_change
from stic_ray.report.collect import collect
from stic_ray.report.gallery import Candidate, choose, corruption_caption, data_uri
from stic_ray.report.write import write_report
from tests.report.builders import LONG_WORD, NUM_PAIRS, Page, new_run, pair, write_pairs


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))).convert("RGB")


def test_gallery_is_balanced_and_shows_corrupted_pictures_that_differ(run: RunDir, page: Page) -> None:
    stored = {row["image_id"]: row for row in map(pair, range(NUM_PAIRS))}
    items = collect(run)["galleries"][0]["items"]
    kinds = [item["kind"] for item in items]
    assert kinds == ["hallucination_prompt", "low_resolution", "colour_jitter"] * 8
    assert len(page.all("article")) == 24 and len(page.all("img")) == 24 + 16
    assert all(a["loading"] == "lazy" and a["src"].startswith("data:image/") for a in page.all("img"))
    for item in items:
        clean = decoded(item["clean_image"])
        assert max(clean.size) <= 192
        if item["kind"] == "hallucination_prompt":
            assert item["corrupted_image"] is None and item["caption"] is None
            continue
        corrupted = decoded(item["corrupted_image"])
        assert pixel_change(clean, corrupted) > 0.5 * item["pixel_change"] > 1.0
        assert min(corrupted.size) == 20 or item["kind"] == "colour_jitter"
        original = Image.open(io.BytesIO(stored[item["image_id"]]["image"]["bytes"]))
        assert item["corrupted_image"] == data_uri(corrupt(original, item["corruption"]))
        assert item["caption"] in page.text


def test_gallery_shows_the_prompts_and_facts_of_each_answer(run: RunDir) -> None:
    expected = {row["image_id"]: row for row in map(pair, range(NUM_PAIRS))}
    items = collect(run, num_gallery_pairs=NUM_PAIRS)["galleries"][0]["items"]
    assert len(items) == NUM_PAIRS
    for item in items:
        row = expected[item["image_id"]]
        chosen, rejected = item["answers"]
        assert chosen["text"] == row["chosen"][0]["content"] and chosen["prompt"] == row["chosen_prompt"]
        assert rejected["text"] == row["rejected"][0]["content"] and rejected["prompt"] == row["rejected_prompt"]
        assert chosen["num_tokens"] == row["num_chosen_tokens"]
        assert rejected["finish_reason"] == row["rejected_finish_reason"]
        assert item["prompt"] == "Describe this picture."


def test_gallery_does_not_depend_on_how_the_pairs_are_cut(tmp_path: Path) -> None:
    rows = [pair(position) for position in range(12)]
    chosen = []
    for per_shard in (12, 5, 1):
        run = new_run(tmp_path / str(per_shard))
        write_pairs(run / "preferences", rows, per_shard)
        items = collect(run, num_gallery_pairs=6)["galleries"][0]["items"]
        chosen.append([(item["image_id"], item["clean_image"]) for item in items])
    assert len(chosen[0]) == 6 and chosen[0] == chosen[1] == chosen[2]


def test_gallery_fills_up_from_the_other_kinds() -> None:
    candidates = [Candidate(f"{i:02d}", "low_resolution", 0, 8 - i) for i in reversed(range(9))]
    candidates.append(Candidate("99", "hallucination_prompt", 0, 9))
    assert [c.image_id for c in choose(candidates, 4)] == ["99", "00", "01", "02"]
    assert len(choose(candidates, 24)) == 10


def test_gallery_reads_a_bounded_number_of_shards(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_pairs(run / "preferences", [pair(position) for position in range(18)], per_shard=1)
    (run / "preferences").write_text("pairs-000017.parquet", "not read")
    gallery = collect(run)["galleries"][0]
    assert (gallery["num_shards"], gallery["num_shards_read"], gallery["num_pairs_read"]) == (18, 16, 16)


def test_damaged_stored_picture_is_named_and_the_rest_stays(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    damaged = {**pair(1), "image": {"bytes": pair(1)["image"]["bytes"][:200], "path": "a.png"}}
    write_pairs(run / "preferences", [damaged, pair(2)])
    write_report(run)
    page = Page((run.location / "report.html").read().decode())
    assert "The stored image cannot be shown: undecodable_image" in page.text
    assert len(page.all("img")) == 2 and LONG_WORD in page.text


@pytest.mark.parametrize(
    ("brightness_first", "expected"),
    [
        (True, "brightness ×0.71, hue +0.12 turns; mean change 23.4 of 255"),
        (False, "hue +0.12 turns, brightness ×0.71; mean change 23.4 of 255"),
    ],
)
def test_caption_says_what_was_applied_in_its_order(brightness_first: bool, expected: str) -> None:
    jitter = {"kind": "colour_jitter", "brightness_factor": 0.714, "hue_shift_turns": 0.12}
    assert corruption_caption({**jitter, "brightness_first": brightness_first}, 23.41) == expected
    assert corruption_caption(low_resolution(20), 9.06) == "shorter side 20 px; mean change 9.1 of 255"
