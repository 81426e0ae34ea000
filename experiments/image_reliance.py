"""How much a model's answers depend on the picture: log p of answers with their own image and with a blank one.

Scores the answers of pairs that a run has not trained on (its held-out rows, or with --pairs all of another run) under
the model that the run began with, and under what its training left. `own_minus_blank` is the mean of
log p(chosen | own image) - log p(chosen | blank image) of each, the blank one uniform grey of the same size, and by how
much training changed it. `told_apart` is the share of pairs whose chosen answer has gained more than the rejected one,
with the own images and with blank ones: what is told apart without seeing is learned from text alone. Intervals are
over pairs, by bootstrap.

    python -m experiments.image_reliance --run runs/a
    python -m experiments.image_reliance --run runs/a --step dpo2 --pairs runs/b/preferences
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stic_ray.core.config import EvaluationConfig, RunConfig
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import CHECKPOINT, read_record
from stic_ray.engines.base import AnsweredPrompt
from stic_ray.engines.opening import open_trained
from stic_ray.method.images import blank_like
from stic_ray.method.statistics import SCORES, Question, score_of
from stic_ray.preparation import resolve
from stic_ray.stages.training.data import ParquetRows
from stic_ray.stages.training.index import Rows, index_pairs

Logps = Sequence[Sequence[float]]
"""Of the chosen and the rejected answer of each pair."""
_SIDES = ("chosen", "rejected")
_COLUMNS = ("image", "prompt", "chosen", "rejected", "chosen_finish_reason", "rejected_finish_reason")
_UNBOUNDED = (float("-inf"), float("inf"))


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder or URI of a run")
    parser.add_argument("--step", default="dpo", help="the training whose model is compared with the run's first one")
    parser.add_argument("--pairs", help="folder of a stage with pairs that were not trained on; all of them are used")
    options = parser.parse_args()
    print(json.dumps(measure(RunDir.of(options.run), options.step, options.pairs), indent=1))


def measure(run: RunDir, step: str, pairs: str | None = None) -> dict[str, Any]:
    """Return the figures of a training step of a run."""
    config = resolve(RunConfig.model_validate(read_record(run).config), run)
    examples = [*pairs_of(config, run, pairs)]
    checkpoint = (run / step).location / CHECKPOINT
    before, after = (score(config, examples, place) for place in (None, checkpoint))
    return {"run": run.uri, "step": step, "num_pairs": len(examples), **figures(before, after, config.evaluation)}


def pairs_of(config: RunConfig, run: RunDir, pairs: str | None) -> ParquetRows:
    """Return the pairs that a run held out, or all of another folder."""
    if pairs is not None:
        everything = config.dpo.model_copy(update={"num_held_out": 0, "num_images": None, "num_pairs": None})
        return ParquetRows(_index(config, everything, RunDir.of(pairs)).trained, _COLUMNS)
    folder = RunDir.of(config.dpo.pairs) if config.dpo.pairs else run / "preferences"
    return ParquetRows(_index(config, config.dpo, folder).held_out, _COLUMNS)


def _index(config: RunConfig, dpo: Any, folder: RunDir) -> Rows:
    plain = dpo.model_copy(
        update={"rejected_image": "blur"}
    )  # whether pairs bring rejected images does not matter here
    return index_pairs(config.model_copy(update={"dpo": plain}), folder.shards("pairs"))


def score(config: RunConfig, examples: Sequence[Mapping[str, Any]], checkpoint: Any) -> dict[str, Logps]:
    """Return what a model says of the pairs with their own and with blank images."""
    engine = open_trained(config, checkpoint)
    own = [
        AnsweredPrompt(
            each["prompt"][0]["content"],
            each["image"],
            tuple(each[side][0]["content"] for side in _SIDES),
            tuple(each[f"{side}_finish_reason"] == "length" for side in _SIDES),
        )
        for each in examples
    ]
    blank = [replace(asked, image=blank_like(each["image"])) for asked, each in zip(own, examples, strict=True)]
    return {"own": engine.score_answers(own), "blank": engine.score_answers(blank)}


def figures(before: Mapping[str, Logps], after: Mapping[str, Logps], config: EvaluationConfig) -> dict[str, Any]:
    """Return the measures of both models and what has changed, each with its interval over pairs."""

    def mean(values: Sequence[float], span: tuple[float, float] = _UNBOUNDED) -> dict[str, float]:
        found = score_of([{Question(str(number)): value for number, value in enumerate(values)}], config, span=span)
        return vars(found) if found else {}

    gaps = {
        name: [own[0] - blank[0] for own, blank in zip(scores["own"], scores["blank"], strict=True)]
        for name, scores in (("before", before), ("after", after))
    }
    gaps["change"] = [last - first for first, last in zip(gaps["before"], gaps["after"], strict=True)]
    is_better = {
        image: [float(b[0] - a[0] > b[1] - a[1]) for a, b in zip(before[image], after[image], strict=True)]
        for image in ("own", "blank")
    }
    return {
        "own_minus_blank": {name: mean(values) for name, values in gaps.items()},
        "told_apart": {image: mean(values, SCORES) for image, values in is_better.items()},
    }


if __name__ == "__main__":
    main()
