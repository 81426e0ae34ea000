"""The results of experiments/verified.py: the gate before training, and the systems after it, with intervals.

python -m experiments.verified_results --runs studies/verified/seed0 studies/verified/seed1 studies/verified/seed2
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from experiments.comparison import CONFIG, compared, values_of, write_results
from experiments.verified import OWN, SYSTEMS, TRUTH
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import SCORES
from stic_ray.core.steps import BASE
from stic_ray.core.verification import RulesConfig
from stic_ray.method.ratings import combined_scores
from stic_ray.method.statistics import DIFFERENCES, Question, columns, differences, score_of

RULES = OWN.config.rules
"""Of recipe `verified`: its scorers, and how they are put together."""


def results(runs: Sequence[RunDir]) -> dict[str, Any]:
    """Return the table of docs/results/verified.json."""
    names = (BASE, *SYSTEMS)
    by_seed = {name: [values_of(run / "evaluation", name) for run in runs] for name in names}
    return {
        "num_seeds": len(runs),
        "confidence": CONFIG.confidence,
        "gate": gate(runs),
        **compared(by_seed, [("verified", name) for name in names if name != "verified"]),
    }


def gate(runs: Sequence[RunDir]) -> dict[str, Any]:
    """Return by scorer the F1 of its pick of the candidates, and the share of the gap from random to oracle."""
    picks: dict[str, list[dict[Question, float]]] = {}
    for run in runs:
        for name, scores in _picks(run).items():
            picks.setdefault(name, []).append(scores)
    random, oracle = picks["random"], picks["oracle"]
    gap = [differences(best, drawn) for best, drawn in zip(oracle, random, strict=True)]
    mean_gap = fmean(value for each in gap for value in each.values())
    found = {}
    for name, scores in picks.items():
        gain = [differences(own, drawn) for own, drawn in zip(scores, random, strict=True)]
        found[name] = columns(score_of(scores, CONFIG), "f1", "f1_")
        recovered = columns(score_of(gain, CONFIG, span=DIFFERENCES), "recovered", "recovered_")
        found[name] |= {key: value and value / mean_gap for key, value in recovered.items()}
    return found


def _picks(run: RunDir) -> dict[str, dict[Question, float]]:
    """Return by scorer, and by those of the recipe together, the F1 of the candidate that it likes best, by image.

    Candidates that it likes as well count as their mean; of an image without a score, all of them do.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for step in ("scores", TRUTH):
        for row in (run / step).read_table("scores", SCORES).to_pylist():
            rows.setdefault(row["image_id"], []).append(row)
    scorers = sorted({row["scorer"] for own in rows.values() for row in own} - {TRUTH})
    rules = {"oracle": RulesConfig(scorers=((TRUTH, 1.0),)), " + ".join(dict(RULES.scorers)): RULES}
    rules |= {name: RulesConfig(scorers=((name, 1.0),)) for name in scorers}
    found: dict[str, dict[Question, float]] = {name: {} for name in ("random", *rules)}
    for image, own in rows.items():
        truth = {row["number"]: row["value"] for row in own if row["scorer"] == TRUTH}
        found["random"][Question(image)] = fmean(truth.values())
        for name, rule in rules.items():
            scores = combined_scores(own, truth, rule) or dict.fromkeys(truth, 0.0)
            best = max(scores.values())
            found[name][Question(image)] = fmean(truth[n] for n, value in scores.items() if value == best)
    return found


if __name__ == "__main__":
    write_results(results, "docs/results/verified.json", __doc__)
