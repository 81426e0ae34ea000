"""What a study consists of, and what is refused before any work."""

from pathlib import Path
from typing import Any

import pytest

from stic_ray.core.errors import ConfigError, UserError
from stic_ray.core.rundir import RunDir
from stic_ray.recipes import demo
from stic_ray.study.plan import plan_study, read_record, read_variants, write_record
from stic_ray.study.run import scaling_study
from tests.study.builders import study_in

VARIANTS: dict[str, dict[str, Any]] = {
    "stic": {},
    "blank": {"dpo.image": "blank", "evaluation.models": ["dpo"], "evaluation.modes": ["direct"]},
    "sft_more": {"sft.start": "base", "sft.num_steps": {10: 7, 20: 9}, "evaluation.models": ["base", "sft"]},
    "all_hallucinated": {"preferences.hallucination_share": 1.0},
}


def test_every_combination_is_a_cell_with_its_own_settings(tmp_path: Path) -> None:
    study, home = study_in(tmp_path, seeds=(0, 3), variants=VARIANTS)
    assert len(study.cells) == 2 * 2 * 4 == len({cell.name for cell in study.cells})
    cell = next(c for c in study.cells if c.name == "sft_more-n20-seed3")
    config = study.configs[cell]
    assert (config.seed, config.dpo.num_images, config.sft.num_steps) == (3, 20, 9)
    assert config.evaluation.models == ("sft",), "the base model is scored by the source"
    assert config.dpo.pairs == f"{home.uri}/sources/{cell.source}/preferences"
    (stic,) = (config for config in study.configs.values() if config.name == "stic-n10-seed0")
    assert stic.evaluation.models == ("dpo", "sft")


def test_variants_with_the_same_pool_and_preferences_share_a_source(tmp_path: Path) -> None:
    study, _ = study_in(tmp_path, seeds=(0, 1), variants=VARIANTS)
    used = {(cell.seed, cell.variant): cell.source for cell in study.cells}
    assert used[0, "stic"] == used[0, "blank"] == used[0, "sft_more"] != used[0, "all_hallucinated"]
    assert len(set(used.values())) == len(study.sources) == 4
    for source in study.sources:
        config = study.configs[source]
        assert (config.preferences.num_images, config.seed) == (20, source.seed)
        assert config.evaluation.models == ("base",) and config.dpo.pairs is None
        assert config.evaluation.modes == ("direct", "describe_and_respond"), "the study's, not a variant's"


def test_a_variant_that_only_changes_training_keeps_the_name_of_the_source(tmp_path: Path) -> None:
    alone, _ = study_in(tmp_path)
    other, _ = study_in(tmp_path, variants={"b": {"dpo.beta": 0.5, "actors.batch_size": 3}})
    assert alone.sources[0].name == other.sources[0].name


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a": {"dpo.bta": 1}}, "Variant 'a': Unknown key 'bta' in section 'dpo'. Did you mean 'beta'?"),
        ({"a": {"dpo.beta": "many"}}, "Variant 'a': dpo.beta='many'"),
        ({"a": {"dpo": 1}}, "Variant 'a': 'dpo' is a section"),
        ({"a b": {}}, "Variant 'a b' cannot name a folder"),
        ({"../a": {}}, "Variant '../a' cannot name a folder"),
        ({"base": {}}, "not 'base'"),
        ({"a": {"sft.num_steps": {10: 1}}}, "for 10; give exactly the sizes 10, 20"),
        ({"a": {"sft.num_steps": {10: 1, 20: 2, 30: 3}}}, "for 10, 20, 30; give exactly the sizes 10, 20"),
        ({"a": {"seed": 1}}, "sets seed, which the study sets"),
        ({"a": {"dpo.num_images": 1}}, "sets dpo.num_images, which the study sets"),
        ({"a": {"evaluation.max_answer_tokens": 1}}, "all variants must be scored alike"),
        ({"a": {"evaluation.models": ["base"]}}, "name dpo, sft or both"),
        ({"a": {7: 1}}, "give section.field"),
    ],
)
def test_variants_that_cannot_be_are_refused(variants: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=None) as refusal:
        study_in(tmp_path, variants=variants)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No variants file"),
        ("a: [", "is not valid YAML"),
        ("- a", "must map names of variants"),
        ("", "must map names of variants"),
        ("a: 3", "Variant 'a'"),
    ],
)
def test_variants_files_that_cannot_be_read(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        read_variants(path)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "20,10"], "--sizes 20,10 must be positive, each once, smallest first"),
        (["--sizes", "10,10"], "each once"),
        (["--sizes", "0,10"], "must be positive"),
        (["--sizes", ""], "must be positive"),
        (["--sizes", "10,many"], "--sizes 10,many must be whole numbers"),
        (["--sizes", "10", "--seeds", "1,1"], "--seeds 1,1"),
        (["--sizes", "10", "--seeds", "-1"], "--seeds -1"),
        (["--sizes", "10", "--parallel", "0"], "--parallel 0 must be 1 or more"),
        (["--sizes", "10", "--parallel", "2"], "RAY_ADDRESS=http://10.0.0.1:8265 is a dashboard"),
        (["--sizes", "10", "--set", "dpo.bta=1"], "Did you mean 'beta'?"),
        ([], "--sizes"),
    ],
)
def test_a_mistake_on_the_command_line_touches_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    with pytest.raises(UserError) as refusal:
        scaling_study("", ["--run", str(tmp_path / "s"), *arguments])
    assert message in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_all_runs_and_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling_study("", ["--run", str(tmp_path / "s"), "--sizes", "10,20", "--seeds", "0,1", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("2 sources of 20 images, 4 cells") and len(lines) == 7
    assert list(tmp_path.iterdir()) == []


def begun(folder: Path) -> RunDir:
    """A study that was begun with sizes 10 and 20."""
    study, home = study_in(folder, variants={"a": {"dpo.num_steps": {10: 1, 20: 2}}, "b": {"dpo.beta": 0.2}})
    write_record(home, study, {}, None)
    return home


@pytest.mark.parametrize(
    ("arguments", "variants", "message"),
    [
        (["--sizes", "10", "--set", "dpo.beta=0.5"], "{c: {}}", "dpo.beta was 0.1, is now 0.5"),
        (["--sizes", "10,30"], "{c: {}}", "begun with pools of 20 images, now the largest size is 30"),
        (["--sizes", "10"], "{b: {dpo.beta: 0.3}}", "Variant 'b' of study"),
        (["--sizes", "10"], "{b: {}}", "had dpo.beta = 0.2, now 'not set'"),
        (["--sizes", "10"], "{a: {dpo.num_steps: {10: 3}}}", "Variant 'a' of study"),
    ],
)
def test_a_study_is_not_continued_with_another_meaning(
    arguments: list[str], variants: str, message: str, tmp_path: Path
) -> None:
    home = begun(tmp_path)
    (tmp_path / "v.yaml").write_text(variants)
    with pytest.raises(UserError) as refusal:
        scaling_study("", ["--run", home.uri, "--variants", str(tmp_path / "v.yaml"), "--dry-run", *arguments])
    assert message in str(refusal.value)


def test_sizes_seeds_and_variants_may_be_added(tmp_path: Path) -> None:
    home = begun(tmp_path)
    before = read_record(home)
    assert before is not None
    more = plan_study(demo().config, home.uri, (5, 10), (7,), {"a": {"dpo.num_steps": {5: 1, 10: 1}}, "c": {}}, before)
    write_record(home, more, {}, before)
    record = read_record(home)
    assert record is not None
    assert (record.sizes, record.seeds, record.pool_size) == ((5, 10, 20), (0, 7), 20)
    assert record.variants["a"] == {"dpo.num_steps": {5: 1, 10: 1, 20: 2}} and set(record.variants) == {"a", "b", "c"}
    assert {cell.name for cell in record.cells} >= {"a-n20-seed0", "c-n5-seed7"} and len(record.cells) == 8
