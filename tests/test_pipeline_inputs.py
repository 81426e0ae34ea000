"""Which stages a run needs follows from its configuration; no Ray, no model."""

from pathlib import Path
from typing import Any

import pytest

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, RunError, SourceError
from stic_ray.core.overrides import apply_overrides
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import check_steps, identity
from stic_ray.pipeline import REPORT, names_of, run_pipeline
from stic_ray.recipes import demo, stic
from stic_ray.status import plan

FACTS = {"recipe": "test", "overrides": []}
NAMES = (*(step.name for step in stic(demo().config)), REPORT)


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ([], NAMES),
        (["evaluation.models=[dpo]", "dpo.pairs=other"], ("dpo", "evaluation", "report")),
        (["evaluation.models=[base, dpo]"], ("pool", "preferences", "dpo", "evaluation", "report")),
        (["evaluation.models=[base]"], ("evaluation", "report")),
        (["dpo.pairs=other"], ("dpo", "infusion", "sft", "evaluation", "report")),
        (["sft.start=base", "evaluation.models=[sft]"], ("infusion", "sft", "evaluation", "report")),
        (
            ["sft.start=base", "infusion.describe=false", "evaluation.models=[sft]"],
            ("infusion", "sft", "evaluation", "report"),
        ),
        (["infusion.describe=false"], NAMES),
        (["sft.start=base"], NAMES),
    ],
)
def test_a_run_makes_what_its_scores_need(settings: list[str], stages: tuple[str, ...]) -> None:
    config = apply_overrides(demo().config, settings)
    assert names_of(stic(config)) == stages
    assert [line.split()[0] for line in plan(config, stic(config), None, stages)] == list(stages)


def test_the_plan_names_what_a_stage_reads() -> None:
    config = apply_overrides(demo().config, ["sft.start=base", "dpo.pairs=other"])
    lines = {line.split()[0]: line for line in plan(config, stic(config), None, NAMES)}
    assert f"reads {Path.cwd()}/other;" in lines["dpo"] and "reads toyworld;" in lines["infusion"]
    assert "reads infusion;" in lines["sft"] and "reads dpo, sft;" in lines["evaluation"]


def test_models_are_named_once_and_their_order_makes_no_other_run() -> None:
    def scores(config: RunConfig) -> dict[str, Any]:
        return identity(stic(config)[-1], config)

    one, other = (apply_overrides(demo().config, [f"evaluation.models=[{m}]"]) for m in ("sft, base", "base, sft"))
    assert scores(one) == scores(other)
    controls = apply_overrides(demo().config, ["dpo.image=blank", "infusion.describe=false", "sft.num_steps=3"])
    assert scores(controls) == scores(demo().config)
    for models in ("[dpo, dpo]", "[]", "[best]"):
        with pytest.raises(ConfigError, match="evaluation.models"):
            check_steps(stic(apply_overrides(demo().config, [f"evaluation.models={models}"])))


def test_pairs_that_are_not_there_are_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "run" / "preferences").mkdir(parents=True)
    config = apply_overrides(demo().config, [f"dpo.pairs={tmp_path}/run/preferences"])
    with pytest.raises(SourceError, match=r"dpo.pairs='.*' must hold .*manifest.json"):
        run_pipeline(config, stic(config), RunDir.of(str(tmp_path / "mine")), ["dpo"], FACTS)


def test_a_stage_that_would_now_be_made_from_others_is_refused(tmp_path: Path) -> None:
    """sft.start is no setting of infusion, but decides who describes."""
    run, infusion = RunDir.of(str(tmp_path)), next(s for s in stic(demo().config) if s.name == "infusion")
    inputs = {"model": {"from": "dpo", "manifest": "x"}}
    (run / "infusion").write_manifest({"config": identity(infusion, demo().config), "inputs": inputs})
    config = apply_overrides(demo().config, ["sft.start=base"])
    with pytest.raises(RunError, match="infusion of .* was finished from dpo, .* from no other"):
        run_pipeline(config, stic(config), run, ["infusion"], FACTS)


def test_settings_of_actors_that_change_answers_belong_to_what_was_made() -> None:
    changed = apply_overrides(demo().config, ["actors.merge_adapter=true", "actors.num_actors=7"])
    different = [step.name for step in stic(changed) if identity(step, changed) != identity(step, demo().config)]
    assert different == ["preferences", "infusion", "evaluation"]
