"""The nine systems of docs/results/toyworld.md on the model that is shipped today, as the steps of one run.

python -m experiments.toyworld_systems --run studies/toyworld_systems/seed0 --set seed=0
python -m experiments.toyworld_systems_results --runs studies/toyworld_systems/seed0 ...

A run is one seed. The same command goes on.
"""

from functools import partial
from typing import Any

from stic_ray import cli
from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import apply_values
from stic_ray.core.steps import BASE, Recipe, Step
from stic_ray.recipes import demo, stic
from stic_ray.stages.dpo import DPO
from stic_ray.stages.evaluation import EVALUATION
from stic_ray.stages.infusion import INFUSION
from stic_ray.stages.sft import SFT

DAR = "evaluation_dar"
"""Step that describes first and answers then."""
SYSTEMS: dict[str, tuple[str, str]] = {
    "base": ("evaluation", BASE),
    "base_dar": (DAR, BASE),
    "stic_stage1": ("evaluation", "dpo"),
    "stic_stage2": ("evaluation", "sft"),
    "stic_dar": (DAR, "sft"),
    "text_only_dpo": ("evaluation", "text_only_dpo"),
    "shuffled_images": ("evaluation", "shuffled_images"),
    "sft_chosen": ("evaluation", "sft_chosen"),
    "sft_more": ("evaluation", "sft_more"),
}
"""System -> the step that scored it, and its model."""
CONTROLS: dict[str, dict[str, Any]] = {
    "text_only_dpo": {"dpo.image": "blank"},
    "shuffled_images": {"dpo.image": "shuffled"},
    "sft_chosen": {"dpo.objective": "sft"},
}
"""Trainings on STIC's pairs."""
NUM_STEPS_OF_BOTH_STAGES = 79
"""Of STIC on 1,000 pictures and 250 instruction rows."""


def systems(config: RunConfig) -> tuple[Step, ...]:
    """Return STIC's steps, the controls, and the scores of all."""
    *own, _ = stic(config)
    trained = ["dpo", "sft", *CONTROLS, "sft_more"]
    dar = {"evaluation.models": [BASE, "sft"], "evaluation.modes": ["describe_and_respond"]}
    return (
        *own,
        *(Step(DPO, name, {"pairs": "preferences"}, settings) for name, settings in CONTROLS.items()),
        Step(INFUSION, "instructions", settings={"infusion.describe": False}),
        Step(SFT, "sft_more", {"rows": "instructions"}, {"sft.num_steps": NUM_STEPS_OF_BOTH_STAGES}),
        Step(EVALUATION, inputs={name: name for name in trained}),
        Step(EVALUATION, DAR, {"sft": "sft"}, dar),
    )


SETTINGS: dict[str, Any] = {
    "name": "toyworld_systems",
    "dpo.num_held_out": 0,
    "sft.num_held_out": 0,
    "evaluation.models": [BASE, "dpo", "sft", *CONTROLS, "sft_more"],
    "evaluation.modes": ["direct"],
    "evaluation.benchmarks": [
        f"toyworld:toy_{name}" for name in ("describe", "step_by_step", "questions", "pope_adversarial")
    ],
    "toyworld.num_scenes": 300,
}
OWN = Recipe(apply_values(demo().config, SETTINGS), systems)

if __name__ == "__main__":
    cli.main(partial(cli.full_pipeline, own=OWN), __doc__)
