"""Does a source of "which answer is right" help? The systems of docs/results/verified.md, as the steps of one run.

python -m experiments.verified --run studies/verified/seed0 --set seed=0

A run is one seed: STIC's pairs; eight candidates an image with their scores, and the truth; pairs by several rules; a
training of each system, all of equal numbers of pairs and steps; and the scores of all. The same command goes on.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from stic_ray import cli
from stic_ray.core import schemas
from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import apply_values
from stic_ray.core.placement import tasks_need
from stic_ray.core.rundir import read_shard, row_counts
from stic_ray.core.steps import Recipe, Stage, Step, StepRun
from stic_ray.core.storage import Location
from stic_ray.method.scoring import object_f1
from stic_ray.recipes import verified
from stic_ray.stages.candidates import CANDIDATES
from stic_ray.stages.dpo import DPO
from stic_ray.stages.evaluation import EVALUATION
from stic_ray.stages.pairs import PAIRS_STAGE
from stic_ray.stages.pool import POOL
from stic_ray.stages.preferences import PREFERENCES
from stic_ray.stages.scores import SCORES
from stic_ray.toyworld.assets import POOL_FIRST_INDEX
from stic_ray.toyworld.language import name_of
from stic_ray.toyworld.scenes import KIND_WEIGHTS, sample_scene

NUM_PAIRS = 750
"""That every system is trained on, of a pool of 1,000 images: of a fifth, all candidates are equally good in truth."""
VOCABULARY = [name_of(kind) for kind in KIND_WEIGHTS]
TRUTH = "truth"
"""Scorer: the object F1 of a candidate."""

RULES: dict[str, dict[str, Any]] = {
    "verified": {},
    "random": {"rules.pairing": "random", "rules.scorers": {}},
    "oracle": {"rules.scorers": {TRUTH: 1.0}, "rules.combine": "value"},
}
"""Pairs that are made of the candidates, and how their rule differs from that of recipe `verified`."""
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "stic": ("preferences", {}),
    "sft_stic": ("preferences", {"dpo.objective": "sft"}),
    "verified": ("pairs_verified", {}),
    "sft_best": ("pairs_verified", {"dpo.objective": "sft"}),
    "random_pairs": ("pairs_random", {}),
    "oracle": ("pairs_oracle", {}),
    "text_only": ("preferences", {"dpo.image": "blank"}),
    "image_contrast": (
        "preferences",
        {"dpo.conditional_weight": 1.0, "dpo.anchor_weight": 1.0, "dpo.rejected_image": "crop"},
    ),
}
"""Trained systems: the step with their pairs, and how their training differs from recipe `verified`'s."""


def score_by_truth(step: StepRun) -> dict[str, Any]:
    """Write the object F1 of every candidate: the scenes of the pool's pictures are known by their numbers."""
    shards = (step.inputs["index"].shards("index"), step.inputs["candidates"].shards("candidates"))
    num_rows = 0
    for number, (index, candidates) in enumerate(zip(*shards, strict=True)):
        rows = [*_truths(step.config.seed, index, candidates)]
        step.output.write_shard("scores", number, schemas.table_of(rows, schemas.SCORES), schemas.SCORES)
        num_rows += len(rows)
    return row_counts(num_rows, num_rows, {})


def _truths(seed: int, index: Location, candidates: Location) -> Iterator[dict[str, Any]]:
    paths = {row["image_id"]: row["path"] for row in read_shard(index, schemas.INDEX).to_pylist()}
    for row in read_shard(candidates, schemas.CANDIDATES).to_pylist():
        scene = sample_scene(seed, POOL_FIRST_INDEX + int(PurePosixPath(paths[row["image_id"]]).stem))
        value = object_f1(row["text"], [name_of(item.kind) for item in scene.objects], VOCABULARY)
        yield {"image_id": row["image_id"], "number": row["number"], "scorer": TRUTH, "value": value}


TRUTHS = Stage(
    name=TRUTH,
    run=score_by_truth,
    settings=("seed",),
    need=tasks_need,
    writes="scores-*.parquet",
    reads=("index", "candidates"),
    loads_model=lambda config: False,
)


def systems(config: RunConfig) -> tuple[Step, ...]:
    """Return all that the page compares."""
    scored = {"index": "pool", "candidates": "candidates"}
    scores = {"scores": "scores", f"scores:{TRUTH}": TRUTH}
    return (
        Step(POOL),
        Step(PREFERENCES, inputs={"index": "pool"}),
        Step(CANDIDATES, inputs={"index": "pool"}),
        Step(SCORES, inputs=scored),
        Step(TRUTHS, inputs=scored),
        *(Step(PAIRS_STAGE, f"pairs_{name}", {**scored, **scores}, settings) for name, settings in RULES.items()),
        *(Step(DPO, name, {"pairs": pairs}, settings) for name, (pairs, settings) in SYSTEMS.items()),
        Step(EVALUATION, inputs={name: name for name in SYSTEMS}),
    )


SETTINGS: dict[str, Any] = {
    "name": "verified",
    "scores.scorers": ["claims", "consistency", "image_logratio", "log_p", "length"],
    "preferences.allow_truncated": True,
    "dpo.num_pairs": NUM_PAIRS,
    "dpo.num_held_out": 0,
    "evaluation.models": ["base", *SYSTEMS],
    "evaluation.modes": ["direct"],
    "evaluation.benchmarks": [f"toyworld:toy_{name}" for name in ("describe", "step_by_step", "pope_adversarial")],
    "toyworld.num_scenes": 1000,
}
OWN = Recipe(apply_values(verified().config, SETTINGS), systems)

if __name__ == "__main__":
    cli.main(partial(cli.full_pipeline, own=OWN), __doc__)
