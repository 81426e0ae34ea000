"""The results of experiments/vila2.py: rounds, controls and the specialist, with intervals.

python -m experiments.vila2_results --runs studies/vila2/seed0 studies/vila2/seed1 studies/vila2/seed2
"""

from collections.abc import Sequence
from typing import Any

from experiments.comparison import CONFIG, Values, compared, values_of, write_results
from experiments.vila2 import CONTROLS, ROUNDS, SYSTEMS
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PREDICTIONS
from stic_ray.core.steps import BASE

PAIRS = [
    ("sft", BASE),
    *(("sft", name) for name in CONTROLS),
    ("sft_2", "sft"),
    ("sft_3", "sft_2"),
    ("sft_specialists", "sft_3"),
    ("specialist_counts", "sft_3"),
]
_CORPORA = {"sft": "corpus", "sft_2": "corpus_2", "sft_3": "corpus_3", "sft_specialists": "corpus_specialists"}


def results(runs: Sequence[RunDir]) -> dict[str, Any]:
    """Return the table of docs/results/vila2.json."""
    by_seed = {name: [_values(run, name) for run in runs] for name in (BASE, *SYSTEMS)}
    corpora = {**_CORPORA, **{name: f"corpus_{name}" for name in CONTROLS}}
    manifests = {name: [(run / folder).manifest or {} for run in runs] for name, folder in corpora.items()}
    words = {name: [each["num_words_per_text"] for each in found] for name, found in manifests.items()}
    return {
        "num_seeds": len(runs),
        "confidence": CONFIG.confidence,
        "rounds": list(ROUNDS),
        "num_words_per_text": {name: sum(found) / len(found) for name, found in words.items()},
        **compared(by_seed, PAIRS),
    }


def _values(run: RunDir, model: str) -> Values:
    """Return what a model scored, the questions about numbers apart from the others."""
    evaluation = run / "evaluation"
    found = values_of(evaluation, model)
    rows = evaluation.read_table(f"predictions-{model}", PREDICTIONS, ["benchmark", "id", "prompt"]).to_pylist()
    counts = {row["id"] for row in rows if row["benchmark"] == "toy_questions" and "How many" in row["prompt"]}
    questions = found["questions"]
    return found | {
        "questions_counts": {each: value for each, value in questions.items() if each.id in counts},
        "questions_others": {each: value for each, value in questions.items() if each.id not in counts},
    }


if __name__ == "__main__":
    write_results(results, "docs/results/vila2.json", __doc__)
