"""Stage `evaluation`: benchmarks answered directly and by describe-and-respond (DaR; STIC section 4.3).

The format of a benchmark is described in docs/evaluation.md.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from stic_ray.core.config import ANSWER_SETTINGS, IMAGE_SETTINGS, EvaluationConfig, RunConfig
from stic_ray.core.placement import actors_need
from stic_ray.core.rundir import ROWS_NOW, RunDir, family_name, row_counts
from stic_ray.core.schemas import PREDICTIONS
from stic_ray.core.steps import BASE, Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import NUM_UNITS, SHORT_ANSWER_TOKENS, Sizes, Work
from stic_ray.engines.base import Answer, Request, Sampling
from stic_ray.engines.opening import open_trained
from stic_ray.method.choices import choice_lines, read_choice
from stic_ray.method.images import ImageLimits, decode
from stic_ray.method.prompts import PromptSet, fill, load_prompts
from stic_ray.method.scoring import METRICS
from stic_ray.method.statistics import Question, summary
from stic_ray.stages.benchmarks import load_questions, read_benchmarks
from stic_ray.stages.fetch import fetched
from stic_ray.stages.shards import ShardJob, ShardTask, check_written, run_shards
from stic_ray.stages.windows import Rows

_PREDICTIONS = "predictions"
DIRECT = "direct"
BASELINE = (BASE, DIRECT)
EARLIER = "earlier"
"""Role of an evaluation that has the base model's answers."""
_PREDICTION_BYTES = 400
"""Of a row of the predictions."""


def evaluate(
    config: RunConfig, output: RunDir, models: Mapping[str, Location | None], earlier: RunDir | None = None
) -> dict[str, Any]:
    """Answer all benchmarks with each model (None is the run's base model), keep the answers, write scores.json.

    Differences are to the base model, whose answers an `earlier` evaluation of the same benchmarks may have.

    Returns the manifest's row accounts: a row is a question under a metric in a mode for a model. Raises
    SourceError for a benchmark that is missing or of another format.
    """
    # The questions about an image next to each other: it is described once for all of them.
    questions = sorted(read_benchmarks(config.evaluation.benchmarks), key=lambda q: (q["path"] or "", q["row"] or 0))
    prompts = load_prompts(config.prompts)
    size = config.pool.shard_size
    starts = range(0, len(questions), size)
    tasks = [ShardTask(number, {"rows": questions[start : start + size]}) for number, start in enumerate(starts)]
    done = {}
    for model, checkpoint in models.items():
        job = ShardJob(
            stage=f"evaluation of {model}",
            output=output,
            families={_PREDICTIONS: PREDICTIONS},
            load=partial(load_questions, max_bytes=ImageLimits.of(config.pool).max_bytes),
            make_worker=partial(Respondent, config, prompts, model, checkpoint),
            part=model,
            max_failed_share=config.cluster.max_failed_share,
        )
        done[model] = run_shards(job, tasks, config.actors)
    predictions = [
        row for model in models for row in output.read_table(family_name(_PREDICTIONS, model), PREDICTIONS).to_pylist()
    ]
    reasons = sum((Counter(each.rejected_by_reason) for each in done.values()), Counter())
    num_rows = sum(len(question["metrics"]) for question in questions) * len(config.evaluation.modes) * len(models)
    num_failed = sum(each.num_failed for each in done.values())
    accounts = row_counts(num_rows, len(predictions), dict(sorted(reasons.items())), num_failed)
    check_written(accounts, output, "Not one question could be asked")
    known = earlier.read_table(family_name(_PREDICTIONS, BASE), PREDICTIONS).to_pylist() if earlier else []
    scores = summarise([*predictions, *known], config.evaluation, config.seed)
    output.write_json("scores.json", [row for row in scores if row["model"] in models])
    accounts[ROWS_NOW] = sum(each.num_rows_now for each in done.values())
    accounts[NUM_UNITS] = len(questions) * len(models)
    return {**accounts, "throughput": {model: each.throughput for model, each in done.items()}}


def summarise(predictions: Iterable[Mapping[str, Any]], config: EvaluationConfig, seed: int) -> list[dict[str, Any]]:
    """Return mean score and interval per benchmark, metric, model and mode, paired with the base model."""
    scores: dict[tuple[str, str, str, str], dict[Question, float]] = {}
    for row in predictions:
        key = (row["benchmark"], row["metric"], row["model"], row["mode"])
        scores.setdefault(key, {})[Question(row["id"], row["image"])] = row["score"]
    rows = []
    for (benchmark, metric, model, mode), own in sorted(scores.items()):
        base = scores.get((benchmark, metric, *BASELINE), {}) if (model, mode) != BASELINE else {}
        rows.append(
            {
                "benchmark": benchmark,
                "metric": metric,
                "higher_is_better": METRICS[metric].higher_is_better,
                "model": model,
                "mode": mode,
                "num_questions": len(own),
                **summary([own], [base], config, seed),
            }
        )
    return rows


class _Question(NamedTuple):
    """A question that can be asked."""

    row: dict[str, Any]
    picture: Any


class _Asked(NamedTuple):
    """What the model is asked about a question in a mode."""

    question: _Question
    mode: str
    description: str | None
    prompt: str
    max_new_tokens: int


class Respondent:
    """Answers questions in both modes; owns a model."""

    def __init__(self, config: RunConfig, prompts: PromptSet, name: str, checkpoint: Location | None) -> None:
        """Load the base model, or what a training stage left in `checkpoint`."""
        self.config = config
        self.name = name
        self.prompts = prompts
        self.engine = open_trained(config, checkpoint)
        self.limits = ImageLimits.of(config.pool)

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """Return the question's id, and the path of its image, for each mode and metric."""
        times = len(self.config.evaluation.modes) * len(row["metrics"])
        return [{"image_id": row["id"], "path": row["path"] or ""}] * times

    def prepare(self, row: dict[str, Any]) -> _Question:
        """Decode the image, where there is one."""
        return _Question(row, None if row["path"] is None else decode(fetched(row), self.limits))

    def answer(self, prepared: Sequence[_Question]) -> list[list[tuple[_Asked, Answer]]]:
        """Answer each question in each mode; an image is described once for all of its questions."""
        modes, limit = self.config.evaluation.modes, self.config.evaluation.max_description_tokens
        pictured = [each for each in prepared if each.picture is not None and modes != (DIRECT,)]
        texts = self._generate([_Asked(each, "", None, self.prompts.describe, limit) for each in pictured])
        descriptions = {id(each): text.text for each, text in zip(pictured, texts, strict=True)}
        asked = [
            self._ask(question, mode, descriptions.get(id(question)) if mode != DIRECT else None)
            for question in prepared
            for mode in modes
        ]
        answered = zip(asked, self._generate(asked), strict=True)
        return [list(islice(answered, len(modes))) for _ in prepared]

    def finish(self, prepared: _Question, answer: list[tuple[_Asked, Answer]]) -> Rows:
        """Return a prediction per mode and metric."""
        return {
            _PREDICTIONS: [self._prediction(*each, metric) for each in answer for metric in prepared.row["metrics"]]
        }

    def _ask(self, question: _Question, mode: str, description: str | None) -> _Asked:
        """Put a question into words; one without an image has no description."""
        row, settings = question.row, self.config.evaluation
        is_open = METRICS[row["metrics"][0]].is_open  # asked as it stands and answered at length, under all its metrics
        if is_open:
            prompt = row["question"]
        elif row["choices"]:
            prompt = fill(self.prompts.choose, question=row["question"], choices=choice_lines(row["choices"]))
        else:
            prompt = fill(self.prompts.answer_briefly, question=row["question"])
        if description is not None:
            prompt = self.prompts.infused(description, prompt)
        limit = settings.max_description_tokens if is_open else settings.max_answer_tokens
        return _Asked(question, mode, description, prompt, limit)

    def _generate(self, asked: Sequence[_Asked]) -> list[Answer]:
        """Answer greedily, and only once what is asked several times of a picture."""
        keys = [
            (each.question.row["path"], each.question.row["row"], each.prompt, each.max_new_tokens) for each in asked
        ]
        distinct = dict(zip(keys, asked, strict=True))
        answers: dict[tuple[Any, ...], Answer] = {}
        for limit in sorted({each.max_new_tokens for each in asked}):
            some = {
                key: Request(each.prompt, each.question.picture) for key, each in distinct.items() if key[-1] == limit
            }
            answers.update(zip(some, self.engine.generate(list(some.values()), Sampling(limit)), strict=True))
        return [answers[key] for key in keys]

    def _prediction(self, asked: _Asked, answer: Answer, metric: str) -> dict[str, Any]:
        row = asked.question.row
        vocabulary = row["vocabulary"] or ()
        chosen = read_choice(answer.text, row["choices"]) if row["choices"] else None
        prediction = METRICS[metric].read(answer.text, vocabulary) if chosen is None else chosen
        return {
            "benchmark": row["benchmark"],
            "id": row["id"],
            "image": row["path"] if row["row"] is None else f"{row['path']}#{row['row']}",
            "model": self.name,
            "mode": asked.mode,
            "prompt": asked.prompt,
            "description": asked.description,
            "response": answer.text,
            "prediction": prediction,
            "answers": row["answers"],
            "metric": metric,
            "score": METRICS[metric].score(prediction, row["answers"], vocabulary),
            "finish_reason": answer.finish_reason,
        }


def _run(step: StepRun) -> dict[str, Any]:
    """Score the base model where `evaluation.models` names it, and every model that the step reads."""
    base = {BASE: step.model(BASE)} if BASE in step.config.evaluation.models else {}
    trained = {name: step.model(name) for name in step.inputs if name != EARLIER}
    return evaluate(step.config, step.output, {**base, **trained}, step.inputs.get(EARLIER))


def _check(step: StepRun) -> None:
    read_benchmarks(step.config.evaluation.benchmarks)


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    if not sizes.num_questions:
        return None
    asked, evaluation = sizes.num_prompt_tokens, config.evaluation
    short = min(SHORT_ANSWER_TOKENS, evaluation.max_answer_tokens)
    described = min(sizes.num_answer_tokens, evaluation.max_description_tokens)
    requests = ((1, asked, short),) if DIRECT in evaluation.modes else ()
    if "describe_and_respond" in evaluation.modes:
        requests += ((1, asked, described), (1, asked + described, short))
    rows = sizes.num_questions * len(evaluation.models)
    return Work(rows, requests, storage_bytes=rows * len(evaluation.modes) * _PREDICTION_BYTES)


EVALUATION = Stage(
    name="evaluation",
    run=_run,
    settings=("seed", "prompts", "model", "evaluation", *IMAGE_SETTINGS, *ANSWER_SETTINGS),
    need=actors_need,
    writes="scores.json",
    section="evaluation",
    reads=None,
    sources=("evaluation.benchmarks",),
    check=_check,
    work=_work,
    amount="num_questions",
    is_result=True,
)
