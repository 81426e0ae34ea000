"""A recipe of a user's own, with a stage of its own and a second round: nothing of the package is touched.

python tests/pipeline/own_recipe.py --run runs/rounds
"""

from functools import partial
from typing import Any

from stic_ray import cli
from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import apply_values
from stic_ray.core.placement import tasks_need
from stic_ray.core.rundir import row_counts
from stic_ray.core.schemas import PAIRS
from stic_ray.core.steps import Recipe, Stage, Step, StepRun
from stic_ray.core.workload import Work
from stic_ray.recipes import demo, stic
from stic_ray.stages.dpo import DPO
from stic_ray.stages.preferences import PREFERENCES


def count_words(step: StepRun) -> dict[str, Any]:
    """Write how many words the chosen answers have."""
    answers = step.inputs["pairs"].read_table("pairs", PAIRS, ["chosen"])["chosen"].to_pylist()
    step.output.write_json("words.json", [len(answer[0]["content"].split()) for answer in answers])
    return row_counts(len(answers), len(answers), {})


WORDS = Stage(
    name="words",
    run=count_words,
    settings=("seed",),
    need=tasks_need,
    writes="words.json",
    reads=("pairs",),
    loads_model=lambda config: False,
    work=lambda config, sizes: Work(sizes.num_images) if sizes.num_images else None,
    amount="num_images",
    is_result=True,
)


def two_rounds(config: RunConfig) -> tuple[Step, ...]:
    """STIC's first half twice: the model of the first round describes and is trained in the second."""
    pool, preferences, dpo, *_, evaluation = stic(config)
    second = (
        Step(PREFERENCES, "preferences_2", {"index": "pool", "model": "dpo"}, {"preferences.temperature": 0.5}),
        Step(DPO, "dpo_2", {"pairs": "preferences_2", "model": "dpo"}, {"dpo.learning_rate": 2e-4}),
        Step(WORDS, inputs={"pairs": "preferences_2"}),
    )
    return (pool, preferences, dpo, *second, evaluation)


OWN = Recipe(apply_values(demo().config, {"name": "rounds", "evaluation.models": ["base", "dpo", "dpo_2"]}), two_rounds)

if __name__ == "__main__":
    cli.main(partial(cli.full_pipeline, own=OWN), __doc__)
