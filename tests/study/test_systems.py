"""The numbers and plots of the toy experiment, from a study made by hand."""

import json
from pathlib import Path

import pytest
from PIL import Image

from experiments import toyworld_results as systems
from experiments.toyworld_results import SYSTEMS, write_systems
from stic_ray.core.errors import RunError
from stic_ray.core.rundir import RunDir
from stic_ray.study.plan import read_variants
from tests.study.made import made_study

VARIANTS = read_variants(Path(__file__).parents[2] / "docs" / "results" / "toyworld_variants.yaml")


@pytest.fixture(autouse=True)
def measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The study made by hand has other benchmarks than the toy world."""
    made = {"f1": ("toy", "exact_match"), "hallucination": ("described", "hallucinated_share")}
    monkeypatch.setattr(systems, "MEASURES", made | {"questions": ("not_asked", "exact_match")})


def test_every_system_has_means_intervals_and_spread_at_the_largest_size(tmp_path: Path) -> None:
    home = made_study(tmp_path, variants=VARIANTS)
    write_systems(home, tmp_path / "out", "python -m experiments.toyworld_results")
    table = json.loads((tmp_path / "out" / "toyworld.json").read_text())
    assert set(table["systems"]) == set(SYSTEMS)
    assert (table["sizes"], table["seeds"]) == ([250, 1000, 4000, 16000], [0, 1])
    for name, system in table["systems"].items():
        assert system["f1_low"] < system["f1"] < system["f1_high"]
        assert system["hallucination_low"] < system["hallucination"] < system["hallucination_high"]
        assert system["f1_spread"] is not None and "questions" not in system
        is_base = name.startswith("base")
        assert system["size"] == (None if is_base else 16000)
        assert list(system["by_size"]) == ([] if is_base else ["250", "1000", "4000", "16000"])
        assert is_base or system["by_size"]["16000"]["f1"] == system["f1"] > system["by_size"]["250"]["f1"]
    found = table["systems"]
    assert found["stic_stage1"]["f1"] > found["base"]["f1"]
    assert found["stic_stage1"]["hallucination"] < found["base"]["hallucination"]
    assert found["stic_dar"]["f1"] != found["stic_stage2"]["f1"] != found["stic_stage1"]["f1"]
    with Image.open(tmp_path / "out" / "toyworld.png") as picture:
        assert picture.width > 1000


def test_systems_are_compared_where_all_of_them_have_all_seeds(tmp_path: Path) -> None:
    late = {f"{name}-n16000-seed1": ("not_run", "") for name in ("shuffled_images", "sft_more")}
    home = made_study(tmp_path, variants=VARIANTS, outcomes=late)
    write_systems(home, tmp_path / "out", "command")
    found = json.loads((tmp_path / "out" / "toyworld.json").read_text())["systems"]
    assert {found[name]["size"] for name in found} == {4000, None}
    assert (found["stic_stage1"]["seeds"], found["shuffled_images"]["by_size"]["16000"]["seeds"]) == ([0, 1], [0])


def test_a_missing_variant_is_named(tmp_path: Path) -> None:
    home = made_study(tmp_path, variants={"stic": {}})
    with pytest.raises(RunError, match="No size is finished by all systems with all 2 seeds.*text_only_dpo: none"):
        write_systems(home, tmp_path / "out", "command")


def test_no_study_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No study at"):
        write_systems(RunDir.of(str(tmp_path)), tmp_path / "out", "command")
