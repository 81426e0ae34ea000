"""The page of a study: all of it there, nothing from elsewhere, every text escaped."""

import json
import re
from pathlib import Path

import pytest

from stic_ray.core.errors import RunError
from stic_ray.core.rundir import RunDir
from stic_ray.study.report import write_study
from tests.study.made import made_study

VARIANTS = {"stic": {}, "blank": {"dpo.image": "blank", "evaluation.models": ["dpo"]}}


def page_of(home: RunDir) -> str:
    write_study(home)
    return (home.location / "report.html").read().decode()


def test_the_page_shows_curves_fits_costs_and_cells(tmp_path: Path) -> None:
    failed = {"blank-n16000-seed1": ("out_of_memory", "CUDA <out> of memory"), "stic-n250-seed0": ("failed", "why")}
    home = made_study(tmp_path, variants=VARIANTS, outcomes=failed)
    page = page_of(home)
    assert page.count('<svg role="img"') == 2, "one for each benchmark and metric"
    for text in (
        "lower is better",
        "14 of 16 cells done",
        "CUDA &lt;out&gt; of memory",
        "out of memory</span>",
        "GPU-hours",
    ):
        assert text in page
    assert "further images" in page and "per point" in page
    report = json.loads((home.location / "report.json").read())
    assert {run["status"] for run in report["runs"]} == {"done", "failed", "out_of_memory"}
    assert (home.location / "cells.parquet").exists() and (home.location / "cells.csv").exists()


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    page = page_of(made_study(tmp_path, sizes=(10, 20), seeds=(0,), num_questions=5))
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page.replace('xlink:href="#', 'href="#'))
    assert "<script" not in page and "NaN" not in page
    assert "Not fitted: a curve needs at least 4 sizes" in page


@pytest.mark.parametrize("ended", ["failed", "out_of_memory"])
def test_a_study_in_which_all_failed_has_a_page(ended: str, tmp_path: Path) -> None:
    page = page_of(made_study(tmp_path, sizes=(5,), seeds=(0,), outcomes={"default-n5-seed0": (ended, "why")}))
    assert "No cell has scores yet." in page and "0 of 1 cells done" in page


def test_one_question_and_one_size_have_a_page(tmp_path: Path) -> None:
    assert "interval not known" in page_of(made_study(tmp_path, sizes=(5,), seeds=(0,), num_questions=1))


def test_many_variants_have_a_page(tmp_path: Path) -> None:
    variants = {f"variant_with_quite_a_long_name_{i}": {"dpo.beta": 0.1 + i / 10} for i in range(8)}
    assert page_of(made_study(tmp_path, sizes=(5, 10), seeds=(0,), variants=variants, num_questions=3))


def test_no_study_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No study at"):
        write_study(RunDir.of(str(tmp_path)))
