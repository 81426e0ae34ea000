"""The report of a small but complete run directory: what is on the page, and what must never be."""

import base64
import io
import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from stic_ray.core.config import PreferencesConfig, RunConfig
from stic_ray.core.errors import RunError
from stic_ray.core.rundir import RunDir, row_counts
from stic_ray.core.schemas import PAIRS, REJECTED, table_of
from stic_ray.method.corruption import Corruption, corrupt, draw_corruption, low_resolution, pixel_change
from stic_ray.report.collect import collect
from stic_ray.report.curves import MAX_POINTS, read_curves
from stic_ray.report.formats import duration, number, points, visible
from stic_ray.report.gallery import Candidate, choose, corruption_caption, data_uri
from stic_ray.report.plots import TRAINING_CHARTS, training_plot
from stic_ray.report.write import render, write_report

NUM_PAIRS = 36
PAIRS_PER_SHARD = 20
HOSTILE = "<script>alert('x')</script> \"quoted\" & <b>bold</b> nul:\x00 bell:\x07 \u202eright-to-left\u202c"
LONG_WORD = "un" * 400
ARABIC = "صورة لقطة نائمة على أريكة زرقاء"
STAGES = ("pool", "preferences", "dpo", "infusion", "sft", "evaluation")
REJECTED_BY_STAGE = {
    "pool": {"undecodable_image": 7, "duplicate": 3},
    "preferences": {"identical_answers": 2},
    "infusion": {},
}


def picture(number: int, side_px: int = 96) -> Image.Image:
    """A picture with large coloured areas, of landscape, square or portrait shape."""
    generator = random.Random(number)
    width, height = [(side_px * 4 // 3, side_px), (side_px, side_px), (side_px, side_px * 3 // 2)][number % 3]
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:] = [generator.randrange(90, 220) for _ in range(3)]
    for _ in range(4):
        x, y = generator.randrange(width - 20), generator.randrange(height - 20)
        pixels[y : y + 20, x : x + 20] = [generator.randrange(256) for _ in range(3)]
    return Image.fromarray(pixels)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pair(position: int) -> dict[str, Any]:
    """A third each: hallucination prompt, low resolution, colour jitter."""
    image = picture(position)
    corruption: Corruption | None = None
    if position % 3 == 1:
        corruption = low_resolution(20)
    elif position % 3 == 2:
        corruption = draw_corruption(
            random.Random(position), PreferencesConfig(low_resolution_share=0.0, jitter_brightness=0.5)
        )
    chosen = f"A picture of coloured squares, number {position}. It shows {'one more square, ' * 20}and no more."
    rejected = [HOSTILE, LONG_WORD, ARABIC, *["Something else."] * 3][position % 6]
    return {
        "image_id": f"{position * 2654435761 % 2**32:032x}",
        "position": position,
        "image": {"bytes": encoded(image), "path": f"/images/{position}.png"},
        "prompt": [{"role": "user", "content": "Describe this picture."}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "chosen_prompt": "Work through this picture one step at a time.\n" + "Name what can be seen. " * 20,
        "rejected_prompt": "Describe this picture." if corruption else "Describe it & invent <two> objects.",
        "negative": "corrupted_image" if corruption else "hallucination_prompt",
        "corruption": corruption,
        "pixel_change": pixel_change(image, corrupt(image, corruption)) if corruption else None,
        "num_image_tokens": 144,
        "num_chosen_tokens": 61 + position,
        "num_rejected_tokens": 35,
        "num_sequence_tokens": 300,
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "length" if position == 4 else "stop",
        "model": "toyworld",
        "model_revision": "abc",
        "seed": 0,
    }


def write_pairs(stage: RunDir, pairs: list[dict[str, Any]], per_shard: int = PAIRS_PER_SHARD) -> None:
    for shard, start in enumerate(range(0, len(pairs), per_shard)):
        stage.write_shard("pairs", shard, table_of(pairs[start : start + per_shard], PAIRS), PAIRS)


def write_rejected(stage: RunDir, counts: dict[str, int]) -> None:
    rows = [
        {
            "image_id": f"{i:032x}",
            "path": f"/images/{reason}-{i}.jpg",
            "reason": reason,
            "message": f"{HOSTILE} {i}",
        }
        for reason, count in counts.items()
        for i in range(count)
    ]
    stage.write_shard("rejected", 0, table_of(rows, REJECTED), REJECTED)


def manifest(stage: str, num_rows_in: int, rejected: dict[str, int]) -> dict[str, Any]:
    num_written = num_rows_in - sum(rejected.values())
    return {
        "stage": stage,
        "seconds": 12.5 * (STAGES.index(stage) + 1),
        "config": {"shard_size": 256},
        "config_hash": "0011223344556677",
        "inputs": {"source": "s3://user:secret@bucket/images"},
        **row_counts(num_rows_in, num_written, rejected),
        "model": "toyworld",
    }


def dpo_lines() -> list[dict[str, Any]]:
    lines = []
    for step in range(1, 41):
        lines.append(
            {
                "step": step,
                "epoch": step / 40,
                "loss": 0.69 - 0.01 * step,
                "loss/dpo": 0.69 - 0.012 * step,
                "loss/regulariser": 0.08 + 0.001 * math.sin(step),
                "rewards/margins": 0.02 * step,
                "rewards/accuracies": min(1.0, 0.5 + 0.015 * step),
                "logps/chosen": -80.0 + 0.2 * step,
                "logps/rejected": -60.0 - 0.5 * step,
                "learning_rate": 1e-6 * (1 - step / 40),
                "grad_norm": 2.0 + math.cos(step),
            }
        )
    return lines


def write_lines(stage: RunDir, lines: list[dict[str, Any]]) -> None:
    stage.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def scores() -> list[dict[str, Any]]:
    rows = []
    for benchmark, shift in (("toyworld", 0.0), ("colours & <shapes>", 0.1)):
        for i, model in enumerate(("base", "dpo", "sft")):
            for j, mode in enumerate(("direct", "describe_and_respond")):
                score, is_reference = 0.4 + shift + 0.05 * i + 0.02 * j, i == j == 0
                difference = None if is_reference else 0.05 * i + 0.02 * j
                rows.append(
                    {
                        "benchmark": benchmark,
                        "model": model,
                        "mode": mode,
                        "num_questions": 240,
                        "score": score,
                        "low": score - 0.06,
                        "high": score + 0.06,
                        "difference": difference,
                        "difference_low": None if difference is None else difference - 0.06,
                        "difference_high": None if difference is None else difference + 0.06,
                    }
                )
    return rows


def write_run(path: Path) -> RunDir:
    run = RunDir.of(str(path))
    settings = {
        "config": RunConfig(name="demo <run> & more").model_dump(mode="json"),
        "recipe": "demo",
        "overrides": ["pool.source=s3://user:secret@bucket/images", "seed=3"],
        "package_versions": {"torch": "2.13.0", "ray": "2.60.0"},
        "git_commit": "93cde73+changes",
    }
    run.write_text("config.yaml", yaml.safe_dump(settings))
    write_pairs(run / "preferences", [pair(position) for position in range(NUM_PAIRS)])
    for stage, counts in REJECTED_BY_STAGE.items():
        write_rejected(run / stage, counts)
    write_lines(run / "dpo", dpo_lines())
    write_lines(run / "sft", [{"step": s, "loss": 2.0 / s, "learning_rate": 1e-5} for s in range(1, 21)])
    (run / "dpo").write_json("result.json", {"num_steps": 40, "trainable": ["q_proj", "<v_proj>"], "seconds": 61.0})
    (run / "sft").write_json("result.json", {"num_steps": 20, "num_trainable_parameters": 1234567, "frozen": []})
    (run / "evaluation").write_json("scores.json", scores())
    for i, stage in enumerate(STAGES):
        rejected = REJECTED_BY_STAGE.get(stage, {})
        (run / stage).write_manifest(manifest(stage, 1000 + i + sum(rejected.values()), rejected))
    return run


class Page(HTMLParser):
    """The parts of a page: elements with their attributes, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            continue

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.texts.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    made = write_run(tmp_path_factory.mktemp("runs") / "a")
    write_report(made)
    return made


@pytest.fixture(scope="module")
def source(run: RunDir) -> str:
    return (run.location / "report.html").read().decode()


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_page_has_every_section_and_the_headline(page: Page) -> None:
    assert [a["id"] for a in page.all("section")] == [
        "scores",
        "stages",
        "training",
        "pairs",
        "rejected",
        "configuration",
    ]
    assert "demo <run> & more" in page.text
    assert (
        "+12.0 points on toyworld with sft, describe and respond (95% interval +6.0 to +18.0), "
        "the largest of 8 changes against the base model answering directly." in page.text
    )
    assert "93cde73+changes" in page.text and "seed=3" in page.text
    assert "num_trainable_parameters 1,234,567" in page.text


def test_score_table_shows_scores_intervals_and_differences(page: Page) -> None:
    assert "40.0% 34.0 to 46.0 reference" in page.text
    assert "47.0% 41.0 to 53.0 +7.0 points +1.0 to +13.0" in page.text
    labels = [a["aria-label"] for a in page.all("svg") if a["aria-label"].startswith("Scores on")]
    assert len(labels) == 2
    assert "base direct 40.0; " in labels[0] and "sft describe and respond 52.0" in labels[0]


def test_model_text_is_escaped_and_control_characters_are_visible(source: str, page: Page) -> None:
    assert not page.all("script") and not page.all("b")
    assert "<script>alert('x')</script> \"quoted\" & <b>bold</b> nul:\\x00 bell:\\x07" in page.text
    assert ARABIC in page.text and LONG_WORD in page.text
    assert "colours & <shapes>" in page.text and "<v_proj>" in page.text
    assert not set(source) & set(map(chr, [*range(9), 11, 12, *range(13, 32), 127]))


def test_page_needs_no_other_file(source: str, page: Page) -> None:
    keys = ("src", "href", "xlink:href", "action", "srcset", "poster", "data")
    addresses = [a[key] for _, a in page.elements for key in keys if key in a]
    assert len(addresses) > 24
    assert [each[:80] for each in addresses if not each.startswith(("data:image/", "#"))] == []
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "object", "base", "form")]
    assert "@import" not in source and "url(http" not in source and "@font-face" not in source
    assert len(source) < 5_000_000


def test_ids_are_unique_and_every_reference_has_its_target(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a[key][1:] for _, a in page.elements for key in ("href", "xlink:href") if key in a}
    clips = {a["clip-path"][5:-1] for _, a in page.elements if "clip-path" in a}
    assert len(targets) > 10 and clips and targets | clips <= set(ids)


def test_page_is_accessible(page: Page) -> None:
    assert all(a["alt"] for a in page.all("img"))
    assert all("scope" in a for a in page.all("th"))
    assert all(a["role"] == "img" and a["aria-label"] for a in page.all("svg"))
    assert page.all("html", lang="en") and page.all("meta", name="viewport")


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))).convert("RGB")


def test_gallery_is_balanced_and_shows_corrupted_pictures_that_differ(run: RunDir, page: Page) -> None:
    stored = {row["image_id"]: row for row in map(pair, range(NUM_PAIRS))}
    items = collect(run)["gallery"]["items"]
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
    items = collect(run, num_gallery_pairs=NUM_PAIRS)["gallery"]["items"]
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
        run = RunDir.of(str(tmp_path / str(per_shard)))
        write_pairs(run / "preferences", rows, per_shard)
        items = collect(run, num_gallery_pairs=6)["gallery"]["items"]
        chosen.append([(item["image_id"], item["clean_image"]) for item in items])
    assert len(chosen[0]) == 6 and chosen[0] == chosen[1] == chosen[2]


def test_gallery_fills_up_from_the_other_kinds() -> None:
    candidates = [Candidate(f"{i:02d}", "low_resolution", 0, 8 - i) for i in reversed(range(9))]
    candidates.append(Candidate("99", "hallucination_prompt", 0, 9))
    assert [c.image_id for c in choose(candidates, 4)] == ["99", "00", "01", "02"]
    assert len(choose(candidates, 24)) == 10


def test_gallery_reads_a_bounded_number_of_shards(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path))
    write_pairs(run / "preferences", [pair(position) for position in range(18)], per_shard=1)
    (run / "preferences").write_text("pairs-000017.parquet", "not read")
    gallery = collect(run)["gallery"]
    assert (gallery["num_shards"], gallery["num_shards_read"], gallery["num_pairs_read"]) == (18, 16, 16)


def test_damaged_stored_picture_is_named_and_the_rest_stays(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path))
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


def test_report_json_holds_the_numbers_of_the_manifests(run: RunDir) -> None:
    text = (run.location / "report.json").read().decode()
    assert "data:image" not in text

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads(text, parse_constant=refuse)
    assert [stage["stage"] for stage in report["stages"]] == list(STAGES)
    for stage in report["stages"]:
        written = (run / stage["stage"]).manifest
        assert written is not None
        for key in ("num_rows_in", "num_rows_written", "num_rows_rejected", "rejected_by_reason", "seconds"):
            assert stage[key] == written[key]
        assert stage["rows_per_second"] == pytest.approx(written["num_rows_in"] / written["seconds"])
    best = report["headline"]["best"]
    assert (best["benchmark"], best["model"]) == ("toyworld", "sft") and best["difference"] == pytest.approx(0.12)
    assert len(report["gallery"]["items"]) == 24
    assert report["training"][0]["curves"]["metrics"]["loss/dpo"] == [line["loss/dpo"] for line in dpo_lines()]


def test_rejected_rows_are_counted_and_shown_by_example(run: RunDir, page: Page) -> None:
    pool = collect(run)["rejected"][0]
    assert [(each["reason"], each["count"], len(each["examples"])) for each in pool["reasons"]] == [
        ("undecodable_image", 7, 5),
        ("duplicate", 3, 3),
    ]
    assert "pool: 10 rejected" in page.text and "/images/duplicate-2.jpg" in page.text
    assert "infusion: none" in page.text


def test_passwords_in_addresses_are_hidden(run: RunDir, source: str) -> None:
    assert "secret" not in source and "secret" not in (run.location / "report.json").read().decode()
    assert "s3://***@bucket/images" in source


def test_stages_that_did_not_run_are_shown_as_not_run(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path))
    (run / "pool").write_manifest(manifest("pool", 10, {}))
    write_lines(run / "dpo", dpo_lines()[:3])
    write_report(run)
    page = Page((run.location / "report.html").read().decode())
    report = json.loads((run.location / "report.json").read())
    statuses = {stage["stage"]: stage["status"] for stage in report["stages"]}
    assert statuses == {**dict.fromkeys(STAGES, "not run"), "pool": "finished", "dpo": "not finished"}
    assert "Not evaluated (evaluation not run)." in page.text
    for text in ("Evaluation: not run", "sft not run", "dpo not finished", "Preferences: not run"):
        assert text in page.text
    assert "preferences not run – – – – –" in page.text
    assert page.text.count("not recorded") == 5  # recipe, commit, overrides, package versions, configuration
    assert not page.all("img") and not [a for a in page.all("svg") if "Scores" in a["aria-label"]]


def test_scores_of_an_unfinished_evaluation_are_no_headline(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path))
    (run / "evaluation").write_json("scores.json", scores())
    report = collect(run)
    assert report["headline"]["best"] is None
    assert report["headline"]["sentence"] == "Not evaluated (evaluation not finished)."
    assert len(report["scores"]["benchmarks"]) == 2


def with_scores(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    run = RunDir.of(str(path))
    (run / "evaluation").write_json("scores.json", rows)
    (run / "evaluation").write_manifest(manifest("evaluation", len(rows), {}))
    return collect(run)


def test_headline_admits_that_nothing_was_gained(tmp_path: Path) -> None:
    base, trained = scores()[0], scores()[2]
    worse = {**trained, "difference": -0.03, "difference_low": -0.08, "difference_high": 0.02}
    sentence = with_scores(tmp_path, [base, worse])["headline"]["sentence"]
    assert sentence == (
        "No gain: \u22123.0 points on toyworld with dpo, direct (interval \u22128.0 to +2.0), "
        "the only change against the base model answering directly. The interval includes zero."
    )


def test_intervals_without_bounds_are_not_known(tmp_path: Path) -> None:
    rows = [{**row, "low": -math.inf, "high": math.inf, "difference_low": math.nan} for row in scores()[:4]]
    report = with_scores(tmp_path, rows)
    assert "(interval not known)" in report["headline"]["sentence"]
    text = Page(render(report)).text
    assert "40.0% interval not known reference" in text
    assert "+5.0 points interval not known" in text and "nan" not in text.lower() and "inf " not in text


def test_models_and_benchmarks_of_any_name_are_drawn(tmp_path: Path) -> None:
    names = ["$\\frac{$", "模型 <二>", "x" * 200, "line\nbreak\x00"]
    rows = [{**scores()[0], "model": name, "benchmark": name, "mode": name} for name in names]
    report = with_scores(tmp_path, rows)
    page = Page(render(report))
    assert len([a for a in page.all("svg") if a["aria-label"].startswith("Scores on")]) == 4
    assert report["headline"]["sentence"] == "No trained model was compared with the base model."


def test_missing_metric_is_a_gap_and_not_a_zero(tmp_path: Path) -> None:
    lines: list[dict[str, Any]]
    lines = [{"step": step, "loss": 1.0 + step, "rewards/margins": 0.5} for step in range(1, 10)]
    del lines[3]["loss"]
    lines[6]["loss"] = math.nan
    lines[8]["loss"] = None
    write_lines(RunDir.of(str(tmp_path)) / "dpo", lines)
    curves = read_curves(RunDir.of(str(tmp_path)) / "dpo")
    assert curves is not None
    assert curves["metrics"]["loss"] == [2.0, 3.0, 4.0, None, 6.0, 7.0, None, 9.0, None]
    assert curves["num_missing"] == {"loss": 3, "rewards/margins": 0}
    by_title = {chart.title: chart for chart in TRAINING_CHARTS["dpo"]}
    svg = training_plot("dpo", by_title["Loss"], curves)
    assert svg is not None and "6 points, 3 missing" in svg
    line = svg.partition('id="dpo-loss-loss"')[2].partition("</g>")[0]
    assert (line.count("M "), line.count("L ")) == (3, 3)  # steps 1 to 3, 5 to 6, and 8 alone
    assert training_plot("dpo", by_title["Gradient norm"], curves) is None


def test_metrics_of_a_resumed_and_killed_training(tmp_path: Path) -> None:
    stage = RunDir.of(str(tmp_path))
    text = "".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in [(1, 9.0), (2, 8.0), (2, 5.0), (1, 7.0)])
    stage.write_text("metrics.jsonl", text + '{"train_runtime": 3}\n{"step": 3, "lo')
    curves = read_curves(stage)
    assert curves is not None
    assert curves["steps"] == [1, 2] and curves["metrics"] == {"loss": [7.0, 5.0]}
    assert (curves["num_resumes"], curves["num_skipped_lines"]) == (1, 2)


def test_long_trainings_are_averaged_to_a_bounded_number_of_points(tmp_path: Path) -> None:
    stage = RunDir.of(str(tmp_path))
    write_lines(stage, [{"step": step, "loss": float(step)} for step in range(1, 1001)])
    curves = read_curves(stage)
    assert curves is not None
    assert curves["steps_per_point"] == 3 and len(curves["steps"]) == 334 <= MAX_POINTS
    assert curves["steps"][:2] == [3, 6] and curves["metrics"]["loss"][:2] == [2.0, 5.0]
    assert curves["steps"][-1] == 1000 and curves["metrics"]["loss"][-1] == 1000.0


def test_report_is_the_same_every_time(run: RunDir, source: str) -> None:
    assert render(collect(run)) == source


def test_no_run_at_the_address_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No run at .*absent"):
        write_report(RunDir.of(str(tmp_path / "absent")))
    assert not (tmp_path / "absent").exists()


def test_values_as_words() -> None:
    assert [duration(s) for s in (None, 0.042, 43.21, 59.97, 243.4, 93_900)] == [
        "–",
        "0.042 s",
        "43.2 s",
        "1 min 00 s",
        "4 min 03 s",
        "26 h 05 min",
    ]
    assert [number(v) for v in (None, 12345, 0.000123456, -2.5, 12345.67)] == [
        "–",
        "12,345",
        "0.0001235",
        "\u22122.5",
        "12,345.7",
    ]
    assert [points(d) for d in (None, 0.042, -0.1)] == ["–", "+4.2", "\u221210.0"]
    assert visible("a\x00\r\n\x85\x7f\ud800b") == "a\\x00\n\\x85\\x7f\ufffdb"
