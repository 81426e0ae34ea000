"""Images with their candidates and what these are worth: the shards that stage `pairs` reads, put side by side."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.rundir import RunDir, numbered, read_shard
from stic_ray.core.schemas import CANDIDATES, SCORES
from stic_ray.core.steps import StepRun
from stic_ray.core.storage import Location
from stic_ray.core.verification import RulesConfig
from stic_ray.method.ratings import Cut, RatedAnswer, best_score, combined_scores, cut_at, rank_of
from stic_ray.method.rules import decide
from stic_ray.stages.fetch import drawn, fetch_indexed, indexed_tasks, read_indexed, with_images
from stic_ray.stages.shards import ShardTask
from stic_ray.stages.tasks import map_tasks

_CANDIDATE = pa.struct([*CANDIDATES, pa.field("score", pa.float64())])
"""A candidate with the score that all scorers that count give it together."""


def rated_tasks(step: StepRun) -> list[ShardTask]:
    """Return a task for each shard of the index with what there is of it in the other inputs."""
    inputs = {"candidates": [step.inputs["candidates"]], "scores": step.all("scores")}
    found = {family: [shards_by_number(place, family) for place in places] for family, places in inputs.items()}

    def payload(number: int) -> dict[str, list[str]]:
        return {
            family: [shards[number].uri for shards in places if number in shards] for family, places in found.items()
        }

    tasks = indexed_tasks(step.inputs["index"], step.config.pool.shard_size, step.config.candidates.num_images)
    return [replace(task, payload={**task.payload, **payload(task.number)}) for task in tasks]


def shards_by_number(place: RunDir, family: str) -> dict[int, Location]:
    """Return the shards of a family that are published, by their number."""
    names = numbered([shard.name for shard in place.shards(family)], family, "parquet")
    return {number: place.location / name for number, name in names.items()}


def check_scorers(step: StepRun) -> None:
    """Raise SourceError for a scorer that no input has, which would cost every image."""
    missing, known = {name for name, _ in step.config.rules.scorers}, set()
    scorer = pa.schema([SCORES.field("scorer")])
    for shard in [shard for place in step.all("scores") for shard in place.shards("scores")]:
        if not missing:
            return
        known |= set(read_shard(shard, scorer)["scorer"].unique().to_pylist())
        missing -= known
    if missing:
        raise SourceError(
            f"rules.scorers names {', '.join(sorted(missing))}, which no scores of '{step.output.uri}' are by; "
            f"they are by {', '.join(sorted(known)) or 'none'}."
        )


def cut_of_the_pool(stage: str, tasks: Sequence[ShardTask], config: RunConfig) -> Cut | None:
    """Return where the top share of the pool ends; None where no image has a score."""
    found = map_tasks(stage, _best_scores, [(task.payload, config) for task in tasks])
    scores, ranks = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return cut_at(config.rules.top_share or 1.0, scores, ranks) if len(scores) else None


def _best_scores(payload: Mapping[str, Any], config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the best score of each image of a shard that has one, and its rank among equal ones."""
    by_image = {image: best_score(answers_of(rows, config)) for image, rows in _rated(payload, config.rules).items()}
    found = [(score, rank_of(image)) for image, score in by_image.items() if score is not None]
    return np.array([s for s, _ in found], np.float64), np.array([rank for _, rank in found], np.int64)


def _rated(payload: Mapping[str, Any], rules: RulesConfig) -> dict[str, list[dict[str, Any]]]:
    """Return the candidates of a shard's images, each with its score."""
    candidates, scores = defaultdict(list), defaultdict(list)
    for family, schema, by_image in (("candidates", CANDIDATES, candidates), ("scores", SCORES, scores)):
        for uri in payload[family]:
            for row in read_shard(Location.of(uri), schema).to_pylist():
                by_image[row["image_id"]].append(row)
    _check_each_once(scores, payload["scores"])
    for image, rows in candidates.items():
        rated = combined_scores(scores[image], [row["number"] for row in rows], rules)
        for row in rows:
            row["score"] = rated.get(row["number"])
    return candidates


def _check_each_once(scores: Mapping[str, Sequence[Mapping[str, Any]]], files: Sequence[str]) -> None:
    """Raise SourceError for a candidate with two scores by one scorer: nobody said which one counts."""
    for rows in scores.values():
        [(most, number)] = Counter((row["scorer"], row["number"]) for row in rows).most_common(1)
        if number > 1:
            raise SourceError(f"Scorer {most[0]} has scores for the same candidates in {' and '.join(files)}.")


def answers_of(candidates: Sequence[Mapping[str, Any]], config: RunConfig) -> list[RatedAnswer]:
    """Return candidates as the rules take them."""
    return [
        RatedAnswer(
            row["number"],
            row["text"],
            row["num_tokens"],
            row["finish_reason"] == "length" and not config.candidates.allow_truncated,
            row["score"],
        )
        for row in candidates
    ]


def load_rated(task: ShardTask, config: RunConfig, cut: Cut | None) -> pa.Table:
    """Return the images of a shard with their candidates, and the bytes of those that can give something."""
    index = drawn(read_indexed(task), config)
    candidates = _rated(task.payload, config.rules)
    rows = index.to_pylist()
    wanted = [
        row
        for row in rows
        if decide(
            row["image_id"], answers_of(candidates.get(row["image_id"], []), config), config.rules, config.seed, cut=cut
        ).choices
    ]
    images = dict(zip([r["image_id"] for r in wanted], fetch_indexed(wanted, config.pool.image_column), strict=True))
    column = pa.array([candidates.get(row["image_id"], []) for row in rows], pa.list_(_CANDIDATE))
    return with_images(index, [images.get(row["image_id"]) for row in rows]).append_column("candidates", column)
