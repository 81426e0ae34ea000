"""The gallery of candidates: what scorers thought of them, which were taken, and why others were not."""

import json
from pathlib import Path

import pytest

from stic_ray.core.rundir import RunDir
from stic_ray.report.collect import collect
from stic_ray.report.write import write_report
from tests.report.builders import HOSTILE, Page
from tests.report.rated import NUM_THAT_GIVE, TOO_LONG, rated_image, write_rated


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    made = write_rated(tmp_path_factory.mktemp("rated"))
    write_report(made)
    return made


@pytest.fixture(scope="module")
def rated_page(rated: RunDir) -> Page:
    return Page((rated.location / "report.html").read().decode())


def test_every_candidate_stands_there_with_its_scores_and_what_became_of_it(rated: RunDir) -> None:
    [gallery] = collect(rated)["candidates"]
    assert gallery["num_images_read_by_kind"] == {"taken": NUM_THAT_GIVE, "gap_too_small": 5, "too_long": 1}
    first = gallery["items"][0]
    assert first["image_id"] == rated_image(0) and first["scorers"] == ["claims", "consistency"]
    assert [(each["number"], each["taken"], each["why"]) for each in first["answers"]] == [
        (0, "chosen", None),
        (2, "rejected", None),
        (1, None, "not needed"),
        (3, None, "not needed"),
    ]
    worst = first["answers"][1]
    assert worst["scores"] == {"claims": -2.0, "consistency": pytest.approx(0.4)} and worst["score"] == pytest.approx(
        0.8
    )
    assert worst["statements"][0] == {"question": "Is there a <square> of answer 2?", "p_yes": 0.91}
    assert first["clean_image"].startswith("data:image/") and first["size_px"] == [128, 96]


def test_a_third_of_the_images_gave_nothing_and_say_why(rated: RunDir) -> None:
    items = collect(rated)["candidates"][0]["items"]
    assert [item["kind"] for item in items] == ["taken"] * 8 + ["gap_too_small", "too_long", *["gap_too_small"] * 2]
    long = items[9]
    assert long["image_id"] == rated_image(TOO_LONG) and long["message"] == f"too near <{TOO_LONG}>"
    assert {each["why"] for each in items[8]["answers"]} == {"gap_too_small"}
    assert items[8]["clean_image"], "its picture lies in a file that can be read"
    assert [item["image_id"] for item in items[:8]] == sorted(rated_image(n) for n in range(NUM_THAT_GIVE))[:8]


def test_the_page_shows_it_and_the_json_holds_no_pictures(rated: RunDir, rated_page: Page) -> None:
    assert "candidates" in [a["id"] for a in rated_page.all("section")]
    assert not any(a["id"] == "pairs" for a in rated_page.all("section")), "each pair stands among its candidates"
    assert len(rated_page.all("article")) == len(rated_page.all("img")) == 12
    assert "Nothing was taken of it, gap too small: too near <" in rated_page.text
    assert "2 statements, 1 denied" in rated_page.text and "no 8.0% Is there a horse?" in rated_page.text
    assert "Rules: combine: rank," in rated_page.text and "together" in rated_page.text
    assert HOSTILE[:24] in rated_page.text and not rated_page.all("script")
    ids = [a["id"] for _, a in rated_page.elements if "id" in a]
    assert len(ids) == len(set(ids)) and all("scope" in a for a in rated_page.all("th"))
    report = json.loads((rated.location / "report.json").read())
    assert len(report["candidates"][0]["items"]) == 12 and "data:image" not in json.dumps(report)


def test_what_is_gone_costs_only_itself(tmp_path: Path) -> None:
    run = write_rated(tmp_path)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    for shard in (run / "scores").shards("statements"):
        shard.delete()
    items = collect(run)["candidates"][0]["items"]
    assert all(item["clean_image"] for item in items[:8]), "the pairs hold these"
    assert {item["image_problem"] for item in items[8:]} == {"the run holds no copy of it"}
    assert all(not each["statements"] for item in items for each in item["answers"])
