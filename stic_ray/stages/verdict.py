"""Stage `verdict`: whether a round of self-training has brought enough for another one.

Gains from self-made data flatten (VILA² Table 1: after three rounds), and every further round costs as much.
"""

from typing import Any

from stic_ray.core.errors import ConfigError, SourceError, nearest
from stic_ray.core.placement import tasks_need
from stic_ray.core.rundir import RunDir, row_counts
from stic_ray.core.schemas import PREDICTIONS
from stic_ray.core.steps import GOES_ON, Stage, StepRun
from stic_ray.core.workload import Work
from stic_ray.method.scoring import METRICS
from stic_ray.method.statistics import DIFFERENCES, Question, columns, differences, score_of
from stic_ray.stages.benchmarks import read_benchmarks
from stic_ray.stages.evaluation import DIRECT

_COLUMNS = ("benchmark", "metric", "mode", "id", "image", "score")


def judge(step: StepRun) -> dict[str, Any]:
    """Write verdict.json and return the manifest's row accounts with GOES_ON.

    The inputs are two evaluations, each under the name of the model that it scored: the second model is compared with
    the first. A row is a question that both answered. Raises SourceError where there is none.
    """
    config, metric = step.config, step.config.rounds.stop_metric or ""
    [(before_name, before), (after_name, after)] = step.inputs.items()
    apart = differences(_scores(after, after_name, metric), _scores(before, before_name, metric))
    score = score_of([apart], config.evaluation, config.seed, DIFFERENCES)
    if score is None:
        raise SourceError(
            f"rounds.stop_metric='{metric}': {after_name} and {before_name} have no question of it in common; "
            "see scores.json for the benchmarks and metrics that there are."
        )
    is_up = METRICS[metric.split()[1]].higher_is_better
    goes_on = score.low > 0 if is_up else score.high < 0
    found = {"metric": metric, "before": before_name, "after": after_name, GOES_ON: goes_on}
    step.output.write_json("verdict.json", {**found, **columns(score, "difference", "difference_")})
    return {**row_counts(len(apart), len(apart), {}), GOES_ON: goes_on}


def _scores(evaluation: RunDir, model: str, metric: str) -> dict[Question, float]:
    rows = evaluation.read_table(f"predictions-{model}", PREDICTIONS, list(_COLUMNS)).to_pylist()
    wanted = (*metric.split(), DIRECT)
    return {
        Question(row["id"], row["image"]): row["score"]
        for row in rows
        if (row["benchmark"], row["metric"], row["mode"]) == wanted
    }


def _check(step: StepRun) -> None:
    metric = step.config.rounds.stop_metric
    if metric is None:
        raise ConfigError("Stage verdict needs rounds.stop_metric, a benchmark and its metric.")
    questions = read_benchmarks(step.config.evaluation.benchmarks)
    known = dict.fromkeys(f"{each['benchmark']} {name}" for each in questions for name in each["metrics"])
    if metric not in known:
        raise ConfigError(
            f"rounds.stop_metric='{metric}' is scored by no benchmark.{nearest(metric, known)} "
            f"Valid: {', '.join(known)}."
        )
    if DIRECT not in step.config.evaluation.modes:
        raise ConfigError("rounds.stop_metric looks at direct answers; add `direct` to evaluation.modes.")


VERDICT_STAGE = Stage(
    name="verdict",
    run=judge,
    settings=("seed", "rounds.stop_metric", "evaluation.confidence", "evaluation.num_resamples"),
    need=tasks_need,
    writes="verdict.json",
    section="rounds",
    reads=None,
    sources=("evaluation.benchmarks",),
    check=_check,
    work=lambda config, sizes: Work(sizes.num_questions or 1),
    loads_model=lambda config: False,
    is_result=True,
)
