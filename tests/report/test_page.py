"""The page of a small but complete run: what is on it, and what must never be."""

import json
from pathlib import Path

import pytest

from stic_ray.core.errors import RunError
from stic_ray.core.rundir import RunDir
from stic_ray.report.collect import collect
from stic_ray.report.formats import duration, number, points, visible
from stic_ray.report.write import render, write_report
from tests.report.builders import ARABIC, LONG_WORD, STAGES, Page, dpo_lines, manifest, new_run, write_lines


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
        "the best of 8 changes against the base model answering directly." in page.text
    )
    assert "93cde73+changes" in page.text and "seed=3" in page.text
    assert "num_trainable_parameters 1,234,567" in page.text
    assert "What was read of each source" in page.text and "text num_rows: 288, token_share: 0.5" in page.text


def test_what_was_expected_stands_beside_what_it_took(run: RunDir, page: Page) -> None:
    """A manifest says 12.5 s for the first stage, 25 s for the second, and so on."""
    preferences, dpo = collect(run)["estimates"]
    assert preferences["stage"] == "preferences" and preferences["money"] == {"expected": None, "actual": None}
    assert preferences["gpu_hours"]["actual"] == pytest.approx(8 * 25 / 3600)
    assert dpo["seconds"] == {"expected": 30.0, "actual": 37.5}
    assert dpo["money"]["actual"] == pytest.approx(3 * 8 * 37.5 / 3600)
    assert "dpo 30.0 s 37.5 s 0.07 0.08 0.20 0.25 1.25 model" in page.text
    assert "Estimate and actual" in page.text and "set estimate.num_questions" not in page.text


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
    assert len(report["galleries"][0]["items"]) == 24
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
    run = new_run(tmp_path)
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
    assert "preferences pool not run – – – – –" in page.text
    assert page.text.count("not recorded") == 5  # recipe, commit, overrides, package versions, configuration
    assert not page.all("img") and not [a for a in page.all("svg") if "Scores" in a["aria-label"]]


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
