"""The results of experiments/toyworld_systems.py, with intervals over scenes and seeds.

python -m experiments.toyworld_systems_results --runs studies/toyworld_systems/seed0 ...
"""

from collections.abc import Sequence
from typing import Any

from experiments.comparison import CONFIG, compared, values_of, write_results
from experiments.toyworld_systems import DAR, SYSTEMS
from stic_ray.core.rundir import RunDir
from stic_ray.study.results import DIRECT

EVERY = "base"
OWN = ("stic_stage1", "sft_chosen")


def results(runs: Sequence[RunDir]) -> dict[str, Any]:
    """Return the table of docs/results/toyworld_systems.json: every system, and how far it is from the base model."""
    modes = {name: "describe_and_respond" if step == DAR else DIRECT for name, (step, _) in SYSTEMS.items()}
    by_seed = {
        name: [values_of(run / step, model, modes[name]) for run in runs] for name, (step, model) in SYSTEMS.items()
    }
    pairs = [*((name, EVERY) for name in SYSTEMS if name != EVERY), OWN]
    return {"num_seeds": len(runs), "confidence": CONFIG.confidence, **compared(by_seed, pairs)}


if __name__ == "__main__":
    write_results(results, "docs/results/toyworld_systems.json", __doc__)
