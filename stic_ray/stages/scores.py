"""Stage `scores`: what scorers think of the candidates of each image (docs/verification.md)."""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from stic_ray.core import schemas
from stic_ray.core.config import ANSWER_SETTINGS, ModelConfig, RunConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.placement import Need, actors_need, without_gpus
from stic_ray.core.rundir import REJECTED_FAMILY, read_shard
from stic_ray.core.schemas import CANDIDATES, INDEX, STATEMENTS, Reason
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import Sizes, Work, images_used
from stic_ray.engines.guarded import GuardedEngine
from stic_ray.engines.opening import check_engine, named_model, open_trained, with_log_probabilities
from stic_ray.method.images import decode
from stic_ray.stages.fetch import fetch_indexed, fetched, with_images
from stic_ray.stages.ordering import index_shards
from stic_ray.stages.rated import shards_by_number
from stic_ray.stages.scorers import find_scorers
from stic_ray.stages.scorers.base import Answered, Candidate, Needs, Scored, Tools, finite
from stic_ray.stages.shards import ShardJob, ShardTask, check_written, run_shards
from stic_ray.stages.windows import Rows

logger = logging.getLogger(__name__)

_PLACES = ("model", "reference", "similarity_model", "image_text_model", "column_source")
"""Settings that may name a local path, which actors need from the root."""
_ANSWER = ("number", "prompt", "filed_under", "text", "num_tokens", "finish_reason")
_READ = pa.schema([CANDIDATES.field(name) for name in ("image_id", *_ANSWER)])
_ROW = pa.schema(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("answers", pa.list_(pa.struct([CANDIDATES.field(name) for name in _ANSWER]))),
        ("outside", pa.list_(pa.struct([("number", pa.int64()), ("value", pa.float64())]))),
    ]
)
"""An image on its way: its candidates, and what a scorer's `read` found."""
_SCORE_BYTES = 30
"""Of a row of the scores."""


def build_scores(step: StepRun) -> dict[str, Any]:
    """Write scores and statements into the step's folder and return the manifest's row accounts; a row is a score.

    An answer that a scorer gives no score is a rejected row. Raises SourceError when there is not one score.
    """
    config = _with_full_paths(step.config)
    needs = _needs(config)
    if config.model.engine == "vllm" and needs & {"model", "reference"}:
        logger.info("%s: log-probabilities come from the transformers engine, not from vLLM", step.name)
    candidates = shards_by_number(step.inputs["candidates"], "candidates")
    tasks = [
        ShardTask(
            shard.number,
            {"index": shard.location.uri, "candidates": candidates[shard.number].uri},
            shard.num_bytes if "pictures" in needs else 0,
        )
        for shard in index_shards(step.inputs["index"], config.pool.shard_size)
        if shard.number in candidates
    ]
    models = {role: step.model(role) for role in ("model", "reference") if role in needs}
    job = ShardJob(
        stage=step.name,
        output=step.output,
        families={"scores": schemas.SCORES, "statements": STATEMENTS},
        beside=("statements",),
        load=partial(_load_shard, config),
        make_worker=partial(ScoreWorker, config, models),
        max_failed_share=config.cluster.max_failed_share,
    )
    done = run_shards(job, tasks, config.actors.model_copy(update={"num_gpus": _need(config).each["GPU"]}))
    num_rows = sum(done.num_rows.values()) + done.num_failed
    accounts = done.accounts(num_rows)
    check_written(accounts, step.output, f"Not one of {num_rows} answers got a score")
    return accounts


class ScoreWorker:
    """Scores the candidates of an image; owns the models that its scorers need."""

    def __init__(self, config: RunConfig, checkpoints: Mapping[str, Location | None]) -> None:
        """Open the scorers, and by role the models that they ask: what a training left, or None for the base."""
        self.config = config
        self.scorers = find_scorers(config.scores)
        engines = {role: _open_model(config, role, checkpoint) for role, checkpoint in checkpoints.items()}
        self.engine: GuardedEngine | None = engines.get("model")
        tools = Tools(config, self.engine, engines.get("reference"))
        self.score = {name: scorer.open(tools) for name, scorer in self.scorers.items()}

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """Return the image's id and path for each score of each answer."""
        return [{"image_id": row["image_id"], "path": row["path"]}] * (len(row["answers"]) * len(self.scorers))

    def prepare(self, row: dict[str, Any]) -> Answered:
        """Decode the image, where a scorer looks at it."""
        prompt = "prompt" if self.config.scores.prompt == "asked" else "filed_under"
        answers = tuple(
            Candidate(each["number"], each["text"], each[prompt], each["num_tokens"], each["finish_reason"] == "length")
            for each in row["answers"]
        )
        picture = decode(fetched(row)) if "encoded" in row else None
        outside = {each["number"]: each["value"] for each in row["outside"]}
        return Answered(row["image_id"], answers, picture, outside, row["path"])

    def answer(self, prepared: Sequence[Answered]) -> list[dict[str, Scored]]:
        """Return by scorer what it says of each image's answers."""
        found = {name: score(prepared) for name, score in self.score.items()}
        return [{name: scored[place] for name, scored in found.items()} for place in range(len(prepared))]

    def finish(self, prepared: Answered, answer: dict[str, Scored]) -> Rows:
        """Return the scores and statements, and a rejected row for each answer without a score."""
        rows: dict[str, list[dict[str, Any]]] = {"scores": [], "statements": [], REJECTED_FAMILY: []}
        for scorer, scored in answer.items():
            for number, value in scored.values.items():
                score = {"image_id": prepared.image_id, "number": number, "scorer": scorer, "value": finite(value)}
                if score["value"] is not None:
                    rows["scores"].append(score)
                    continue
                message = f"{scorer}, answer {number}: {self.scorers[scorer].none_because}"
                identity = {"image_id": prepared.image_id, "path": prepared.path}
                rows[REJECTED_FAMILY].append({**identity, "reason": Reason.NO_SCORE, "message": message})
            rows["statements"] += [{"image_id": prepared.image_id, **each._asdict()} for each in scored.statements]
        return rows


def _load_shard(config: RunConfig, task: ShardTask) -> pa.Table:
    """Return the images of a shard that have candidates, with the pictures where a scorer needs them."""
    index = {row["image_id"]: row for row in read_shard(Location.of(task.payload["index"]), INDEX).to_pylist()}
    answers: dict[str, list[dict[str, Any]]] = {}
    for row in read_shard(Location.of(task.payload["candidates"]), _READ).to_pylist():
        answers.setdefault(row.pop("image_id"), []).append(row)
    if unknown := answers.keys() - index.keys():
        raise SourceError(f"'{task.payload['candidates']}' has {len(unknown)} images that are not in the pool's shard.")
    scorers = find_scorers(config.scores).values()
    outside: dict[str, list[dict[str, Any]]] = {}
    for read in filter(None, (scorer.read for scorer in scorers)):
        for image_id, values in read(config, list(answers)).items():
            outside.setdefault(image_id, []).extend({"number": n, "value": value} for n, value in values.items())
    rows = [
        {"image_id": each, "path": index[each]["path"], "answers": own, "outside": outside.get(each, [])}
        for each, own in answers.items()
    ]
    table = pa.Table.from_pylist(rows, schema=_ROW)
    if "pictures" not in _needs(config):
        return table
    return with_images(table, fetch_indexed([index[each] for each in answers], config.pool.image_column))


def _open_model(config: RunConfig, role: str, checkpoint: Location | None) -> GuardedEngine:
    is_named = getattr(config.scores, role) is not None
    config = config.model_copy(update={"model": model_of(config, role)})
    return open_trained(config, None if is_named else checkpoint)


def model_of(config: RunConfig, role: str) -> ModelConfig:
    """Return the model of a role: the run's, or the one that the settings name; always with an engine that scores."""
    model, name = with_log_probabilities(config.model), getattr(config.scores, role)
    return named_model(model, name) if name else model


def _with_full_paths(config: RunConfig) -> RunConfig:
    """Return the configuration as actors in any working directory can use it."""
    given = {name: os.path.expanduser(getattr(config.scores, name) or "") for name in _PLACES}
    found = {name: os.path.abspath(path) for name, path in given.items() if os.path.exists(path)}
    return config.model_copy(update={"scores": config.scores.model_copy(update=found)})


def _needs(config: RunConfig) -> frozenset[Needs]:
    return frozenset().union(*(scorer.needs for scorer in find_scorers(config.scores).values()))


def _need(config: RunConfig) -> Need:
    """Return the actors; scorers of texts alone hold no GPU."""
    need, needs = actors_need(config), _needs(config)
    if needs & {"model", "reference", "gpu"}:
        return need
    return without_gpus(need)


def _check(step: StepRun) -> None:
    from stic_ray.stages.cluster import cluster_address  # imports Ray

    config = _with_full_paths(step.config)
    is_here = cluster_address() is None  # else only the machines of the cluster need the models
    for scorer in find_scorers(config.scores).values():
        scorer.check(step)
        if is_here:
            scorer.check_model(config)
    for role in _needs(config) & {"model", "reference"}:
        if is_here and getattr(config.scores, role):
            check_engine(model_of(config, role))


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    """Rows are scores; what all scorers ask the model about an image is spread over them."""
    num_images = images_used(config, sizes, config.candidates.num_images)
    if not num_images:
        return None
    scorers = find_scorers(config.scores).values()
    per_image = config.candidates.num_candidates * len(scorers)
    asked = [request for scorer in scorers for request in scorer.requests(config, sizes)]
    num_rows = num_images * per_image
    requests = tuple((number / per_image, reads, writes) for number, reads, writes in asked)
    return Work(num_rows, requests, storage_bytes=num_rows * _SCORE_BYTES)


SCORES = Stage(
    name="scores",
    run=build_scores,
    settings=("prompts", "model", "scores", "pool.shard_size", *ANSWER_SETTINGS),
    need=_need,
    writes="scores-*.parquet",
    section="scores",
    reads=("index", "candidates", "model", "reference"),
    check=_check,
    loads_model=lambda config: bool(_needs(config) & {"model", "reference"}),
    work=_work,
    amount="num_images",
    grows=True,
)
