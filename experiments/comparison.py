"""What several systems of one run scored, over runs of several seeds: measures and differences, with intervals."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.toyworld_results import MEASURES
from stic_ray.core.config import EvaluationConfig
from stic_ray.core.rundir import RunDir
from stic_ray.method.statistics import DIFFERENCES, Scores, columns, differences, score_of
from stic_ray.study.results import DIRECT, Series, read_scores

CONFIG = EvaluationConfig()

Values = Mapping[str, Scores]
"""By measure, what one model scored in one run."""


def values_of(evaluation: RunDir, model: str, mode: str = DIRECT) -> dict[str, Scores]:
    """Return what a model scored in an evaluation, asked in this mode."""
    scores = read_scores(evaluation, [model])
    by_measure = {name: scores.get(Series(model, mode, *place)) for name, place in MEASURES.items()}
    return {name: found for name, found in by_measure.items() if found}


def measures(by_seed: Sequence[Values]) -> dict[str, float | None]:
    """Return the mean of each measure over questions and seeds with its interval, as columns."""
    found: dict[str, float | None] = {}
    for measure in by_seed[0]:
        found |= columns(score_of([values[measure] for values in by_seed], CONFIG), measure, f"{measure}_")
    return found


def differences_of(ours: Sequence[Values], theirs: Sequence[Values]) -> dict[str, float | None]:
    """Return the mean difference of each measure, paired by question and seed, with its interval, as columns."""
    found: dict[str, float | None] = {}
    for measure in ours[0]:
        apart = [differences(own[measure], other[measure]) for own, other in zip(ours, theirs, strict=True)]
        found |= columns(score_of(apart, CONFIG, span=DIFFERENCES), measure, f"{measure}_")
    return found


def compared(
    by_seed: Mapping[str, Sequence[Values]], pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the tables `systems` and `differences` of a page of results; `pairs` are (ours, theirs)."""
    return {
        "systems": {name: measures(values) for name, values in by_seed.items()},
        "differences": {f"{ours} - {theirs}": differences_of(by_seed[ours], by_seed[theirs]) for ours, theirs in pairs},
    }


def table(systems: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return the systems as lines for a terminal."""
    return "\n".join(
        f"{name:<22} F1 {row['f1']:.3f} [{row['f1_low']:.3f}, {row['f1_high']:.3f}]" for name, row in systems.items()
    )


def write_results(results: Callable[[Sequence[RunDir]], dict[str, Any]], out: str, description: str | None) -> None:
    """Write the results of the runs that the command line names, and print them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="run directories of the experiment, one a seed")
    parser.add_argument("--out", type=Path, default=Path(out))
    options = parser.parse_args()
    found = results([RunDir.of(run) for run in options.runs])
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, row in found.get("gate", {}).items():
        print(f"{name:<22} F1 {row['f1']:.3f}  recovered {row['recovered'] or 0:.0%}")
    print(table(found["systems"]))
