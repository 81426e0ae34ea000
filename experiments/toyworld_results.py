"""The toy experiment's results: the systems that it compares, as numbers for machines and plots for people.

A system is a way of getting an answer: a model of a variant, in a mode. The experiment is a study
(`jobs/scaling_study.py`); docs/results/toyworld.md describes how it was made and what it says.

python -m experiments.toyworld_results --study studies/toyworld
"""

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stic_ray.core.config import EvaluationConfig
from stic_ray.core.errors import RunError
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import BASE
from stic_ray.method.statistics import columns, score_of
from stic_ray.study.analysis import spread
from stic_ray.study.plan import read_record
from stic_ray.study.results import DIRECT, Result, Series, read_results

DAR = "describe_and_respond"
SYSTEMS: dict[str, tuple[str, str, str]] = {
    "base": (BASE, "base", DIRECT),
    "base_dar": (BASE, "base", DAR),
    "stic_stage1": ("stic", "dpo", DIRECT),
    "stic_stage2": ("stic", "sft", DIRECT),
    "stic_dar": ("stic", "sft", DAR),
    "text_only_dpo": ("text_only_dpo", "dpo", DIRECT),
    "shuffled_images": ("shuffled_images", "dpo", DIRECT),
    "sft_chosen": ("sft_chosen", "dpo", DIRECT),
    "sft_more": ("sft_more", "sft", DIRECT),
}
"""System -> variant of the study, model and mode."""
MEASURES: dict[str, tuple[str, str]] = {
    "f1": ("toy_describe", "object_f1"),
    "hallucination": ("toy_describe", "hallucinated_share"),
    "any_hallucination": ("toy_describe", "any_hallucination"),
    "step_by_step_f1": ("toy_step_by_step", "object_f1"),
    "pope_random": ("toy_pope_random", "yes_no"),
    "pope_popular": ("toy_pope_popular", "yes_no"),
    "pope_adversarial": ("toy_pope_adversarial", "yes_no"),
    "questions": ("toy_questions", "exact_match"),
}
"""Measure -> benchmark and metric."""
_FAR_OFF = ("text_only_dpo", "shuffled_images")
_PLOTTED = {"f1": "object F1 of plain descriptions", "hallucination": "share of named objects that are not there"}


def write_systems(home: RunDir, folder: Path, command: str) -> None:
    """Write toyworld.json and toyworld.png into `folder`, from the study at `home`.

    Raises RunError when there is no study, or it lacks a system.
    """
    record = read_record(home)
    if record is None:
        raise RunError(f"No study at '{home.uri}': make it with jobs/scaling_study.py first.")
    results = read_results(record, home)
    compared = _size_to_compare(results, len(record.seeds))
    table = {
        "command": command,
        "seeds": list(record.seeds),
        "sizes": list(record.sizes),
        "num_scenes": record.base.toyworld.num_scenes,
        "confidence": record.base.evaluation.confidence,
        "systems": {name: _system(name, results, record.base.evaluation, compared) for name in SYSTEMS},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toyworld.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    _plot(table, folder / "toyworld.png")


def _system(name: str, results: Sequence[Result], config: EvaluationConfig, compared: int) -> dict[str, Any]:
    """Return the measures of a system at the size at which systems are compared, and at every size."""
    variant, _, _ = SYSTEMS[name]
    if variant == BASE:
        return {"size": None, **_measures(name, 0, results, config), "by_size": {}}
    sizes = sorted({result.run.size for result in results if result.run.variant == variant and result.scores})
    by_size = {str(size): _measures(name, size, results, config) for size in sizes}
    return {"size": compared, **by_size[str(compared)], "by_size": by_size}


def _size_to_compare(results: Sequence[Result], num_seeds: int) -> int:
    """Return the largest size that every system has with every seed. Raises RunError when there is none."""
    variants = sorted({variant for variant, _, _ in SYSTEMS.values()} - {BASE})
    done = {each: Counter(r.run.size for r in results if r.run.variant == each and r.scores) for each in variants}
    complete = set.intersection(*({size for size, n in done[each].items() if n == num_seeds} for each in variants))
    if not complete:
        told = "; ".join(f"{each}: {dict(sorted(done[each].items())) or 'none'}" for each in variants)
        raise RunError(f"No size is finished by all systems with all {num_seeds} seeds. Finished runs by size: {told}.")
    return max(complete)


def _measures(name: str, size: int, results: Sequence[Result], config: EvaluationConfig) -> dict[str, Any]:
    """Return mean, interval over scenes and spread over seeds of every measure."""
    variant, model, mode = SYSTEMS[name]
    runs = [r for r in results if (r.run.variant, r.run.size) == (variant, size) and r.scores]
    found: dict[str, Any] = {"seeds": [run.run.seed for run in runs]}
    for measure, (benchmark, metric) in MEASURES.items():
        series = Series(model, mode, benchmark, metric)
        scores = [run.scores[series] for run in runs if series in run.scores]
        if not scores:  # a study may ask fewer benchmarks
            continue
        found |= columns(score_of(scores, config), measure, f"{measure}_")
        found[f"{measure}_spread"] = spread(scores)
    return found


def _plot(table: Mapping[str, Any], path: Path) -> None:
    """Draw both main measures against the pool size: all systems, and below those that share a scale."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for row, left_out in enumerate(((), _FAR_OFF)):
        for column, (measure, title) in enumerate(_PLOTTED.items(), 1):
            axes = figure.add_subplot(2, 2, 2 * row + column)
            for place, (name, system) in enumerate(table["systems"].items()):
                if name not in left_out:
                    _draw(axes, measure, name, system, place)
            sizes = sorted({int(size) for system in table["systems"].values() for size in system["by_size"]})
            axes.set_xscale("log")
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.minorticks_off()
            axes.set(title=title if row == 0 else f"without {', '.join(left_out)}", xlabel="images in the pool")
            axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)


def _draw(axes: Axes, measure: str, name: str, system: Mapping[str, Any], place: int) -> None:
    """Draw a system: a line with intervals, or a level with a band where there is no pool."""
    colour, style = f"C{place}", "--" if name.endswith("dar") else "-"
    if not system["by_size"]:
        axes.axhline(system[measure], color=colour, linestyle=style, linewidth=1.2, label=name)
        axes.axhspan(system[f"{measure}_low"], system[f"{measure}_high"], color=colour, alpha=0.08)
        return
    sizes = [int(size) * 1.04 ** (place - 5) for size in system["by_size"]]  # or intervals would hide each other
    rows = list(system["by_size"].values())
    middle = np.array([row[measure] for row in rows])
    ends = np.abs(np.array([[row[f"{measure}_{end}"] for row in rows] for end in ("low", "high")]) - middle)
    axes.errorbar(sizes, middle, ends, color=colour, linestyle=style, marker="o", markersize=4, label=name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, help="folder or URI of the study")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    options = parser.parse_args()
    write_systems(RunDir.of(options.study), options.out, shlex.join(["python", *sys.argv]))
