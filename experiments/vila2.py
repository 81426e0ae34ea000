"""What do rounds of recaptioning bring? The systems of docs/results/vila2.md, as the steps of one run.

python -m experiments.vila2 --run studies/vila2/seed0 --set seed=0

A run is one seed: pictures whose captions leave objects out; three rounds of captions by the model of the round before
and a training of the base model on both captions in each; the controls of the first round, of equal steps; a
specialist for questions; and the scores of all. The same command goes on.
"""

from functools import partial
from typing import Any

from stic_ray import cli
from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import apply_values
from stic_ray.core.steps import BASE, Recipe, Step
from stic_ray.recipes import vila2
from stic_ray.rounds import recaption_and_retrain
from stic_ray.stages.captions import CAPTIONS_STAGE
from stic_ray.stages.corpus import CORPUS_STAGE
from stic_ray.stages.evaluation import EVALUATION
from stic_ray.stages.sft import SFT_ON_IMAGES

CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "extra_epochs": ("captions", {"corpus.template": "original"}),
    "recaption_alone": ("captions", {"corpus.template": "recaption"}),
    "shuffled": ("captions", {"corpus.shuffle": True}),
    "brief": ("captions_brief", {}),
}
"""Trainings beside the first round's: the captions that they read, and how their corpus differs."""
SPECIALISTS = {
    "counts": {"source": "toyworld", "questions": ["How many shapes are there?\nAnswer in a few words."]},
}
ROUNDS = ("sft", "sft_2", "sft_3")
SYSTEMS = (*ROUNDS, "sft_specialists", "specialist_counts", *CONTROLS)


def systems(config: RunConfig) -> tuple[Step, ...]:
    """Return all that the page compares, each model scored once."""
    rounds = apply_values(config, {"evaluation.models": [BASE, ROUNDS[0]]})
    own = [step for step in recaption_and_retrain(rounds) if step.stage is not EVALUATION]
    brief = Step(CAPTIONS_STAGE, "captions_brief", {"index": "pool"}, {"captions.prompts": ["plain"]})
    controls = [
        step
        for name, (captions, settings) in CONTROLS.items()
        for step in (
            Step(CORPUS_STAGE, f"corpus_{name}", {"index": "pool", "captions": captions}, settings),
            Step(SFT_ON_IMAGES, name, {"rows": f"corpus_{name}"}),
        )
    ]
    return (*own, brief, *controls, Step(EVALUATION, inputs={name: name for name in SYSTEMS}))


SETTINGS: dict[str, Any] = {
    "name": "vila2",
    "rounds.num": len(ROUNDS),
    "rounds.image_share": 1.0,
    "rounds.specialists": SPECIALISTS,
    "sft.num_epochs": 2,
    "sft.num_held_out": 0,
    "evaluation.models": [BASE, *SYSTEMS],
    "evaluation.benchmarks": [
        f"toyworld:toy_{name}" for name in ("describe", "step_by_step", "questions", "pope_adversarial")
    ],
    "toyworld.num_scenes": 600,
}
OWN = Recipe(apply_values(vila2().config, SETTINGS), systems)

if __name__ == "__main__":
    cli.main(partial(cli.full_pipeline, own=OWN), __doc__)
