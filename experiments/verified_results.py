"""The results of experiments/verified.py: the gate before training, and the systems after it, with intervals.

python -m experiments.verified_results --runs studies/verified/seed0 studies/verified/seed1 studies/verified/seed2
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.verified import SYSTEMS, TRUTH
from stic_ray.core.config import EvaluationConfig
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PREDICTIONS, SCORES
from stic_ray.core.steps import BASE
from stic_ray.method.statistics import DIFFERENCES, Question, Scores, columns, differences, score_of

MEASURES = {
    "f1": ("toy_describe", "object_f1"),
    "hallucination": ("toy_describe", "hallucinated_share"),
    "any_hallucination": ("toy_describe", "any_hallucination"),
    "step_by_step_f1": ("toy_step_by_step", "object_f1"),
    "pope_adversarial": ("toy_pope_adversarial", "yes_no"),
}
"""Measure -> benchmark and metric."""
CONFIG = EvaluationConfig()

Values = Mapping[str, Scores]
"""By measure, what one model scored in one run."""


def results(runs: Sequence[RunDir]) -> dict[str, Any]:
    """Return the table of docs/results/verified.json."""
    by_seed = {name: [_scores(run, name) for run in runs] for name in (BASE, *SYSTEMS)}
    return {
        "num_seeds": len(runs),
        "confidence": CONFIG.confidence,
        "gate": gate(runs),
        "systems": {name: _measures(values) for name, values in by_seed.items()},
        "differences": {
            f"verified - {name}": _differences(by_seed["verified"], values)
            for name, values in by_seed.items()
            if name != "verified"
        },
    }


def gate(runs: Sequence[RunDir]) -> dict[str, Any]:
    """Return by scorer the F1 of its pick of the candidates, and the share of the gap from random to oracle."""
    picks: dict[str, list[dict[Question, float]]] = {}
    for run in runs:
        for name, scores in _picks(run).items():
            picks.setdefault(name, []).append(scores)
    random, oracle = picks["random"], picks["oracle"]
    gap = [differences(best, drawn) for best, drawn in zip(oracle, random, strict=True)]
    mean_gap = float(np.mean([value for each in gap for value in each.values()]))
    found = {}
    for name, scores in picks.items():
        gain = [differences(own, drawn) for own, drawn in zip(scores, random, strict=True)]
        found[name] = columns(score_of(scores, CONFIG), "f1", "f1_")
        recovered = columns(score_of(gain, CONFIG, span=DIFFERENCES), "recovered", "recovered_")
        found[name] |= {key: value and value / mean_gap for key, value in recovered.items()}
    return found


def _picks(run: RunDir) -> dict[str, dict[Question, float]]:
    """Return by scorer the F1 of the candidate that it likes best, by image; ties count as their mean."""
    table: dict[str, dict[str, dict[int, float]]] = {}
    for step in ("scores", TRUTH):
        for row in (run / step).read_table("scores", SCORES).to_pylist():
            table.setdefault(row["scorer"], {}).setdefault(row["image_id"], {})[row["number"]] = row["value"]
    truth = table.pop(TRUTH)
    ranks = {name: {image: _ranks(values) for image, values in images.items()} for name, images in table.items()}
    table["claims + consistency"] = {
        image: {n: ranks["claims"][image].get(n, 0.0) + rank for n, rank in values.items()}
        for image, values in ranks["consistency"].items()
        if image in ranks["claims"]
    }
    found = {name: {} for name in ("random", "oracle", *table)}
    for image, values in truth.items():
        question = Question(image)
        found["random"][question] = float(np.mean([*values.values()]))
        found["oracle"][question] = max(values.values())
        for name, images in table.items():
            scores = images.get(image) or dict.fromkeys(values, 0.0)  # no score says nothing: a random one
            best = max(scores.values())
            found[name][question] = float(np.mean([values[n] for n, value in scores.items() if value == best]))
    return found


def _ranks(values: Mapping[int, float]) -> dict[int, float]:
    """Return the share of the others that are worse, half of those that are equal."""
    others = max(1, len(values) - 1)
    return {
        n: (sum(x < value for x in values.values()) + (sum(x == value for x in values.values()) - 1) / 2) / others
        for n, value in values.items()
    }


def _scores(run: RunDir, model: str) -> dict[str, dict[Question, float]]:
    found: dict[str, dict[Question, float]] = {measure: {} for measure in MEASURES}
    names = {place: measure for measure, place in MEASURES.items()}
    wanted = ["benchmark", "metric", "id", "image", "score"]
    for row in (run / "evaluation").read_table(f"predictions-{model}", PREDICTIONS, wanted).to_pylist():
        measure = names.get((row["benchmark"], row["metric"]))
        if measure:
            found[measure][Question(row["id"], row["image"])] = row["score"]
    return found


def _measures(by_seed: Sequence[Values]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for measure in MEASURES:
        found |= columns(score_of([values[measure] for values in by_seed], CONFIG), measure, f"{measure}_")
    return found


def _differences(ours: Sequence[Values], theirs: Sequence[Values]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for measure in MEASURES:
        apart = [differences(own[measure], other[measure]) for own, other in zip(ours, theirs, strict=True)]
        found |= columns(score_of(apart, CONFIG, span=DIFFERENCES), measure, f"{measure}_")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="run directories of experiments/verified.py")
    parser.add_argument("--out", type=Path, default=Path("docs/results/verified.json"))
    options = parser.parse_args()
    found = results([RunDir.of(run) for run in options.runs])
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, row in found["gate"].items():
        print(f"{name:<22} F1 {row['f1']:.3f}  recovered {row['recovered'] or 0:.0%}")
    for name, row in found["systems"].items():
        print(f"{name:<22} F1 {row['f1']:.3f} [{row['f1_low']:.3f}, {row['f1_high']:.3f}]")
