"""Candidates and steps that the tests of stage `scores` share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stic_ray.core import schemas
from stic_ray.core.config import RunConfig
from stic_ray.core.rundir import RunDir, read_shard
from stic_ray.core.schemas import CANDIDATES, INDEX, STATEMENTS, table_of
from stic_ray.core.steps import Step
from stic_ray.pipeline import run_pipeline
from stic_ray.stages.pool import POOL
from stic_ray.stages.scores import SCORES
from tests.stages.builders import draw_pictures, fake_config

TEXTS = ("a red circle and a blue square", "A red circle, and a green square.", "the blue square")


def candidate(image: dict[str, Any], number: int, text: str, prompt: str = "What is there?") -> dict[str, Any]:
    """A row of the candidates."""
    return {
        "image_id": image["image_id"],
        "position": image["position"],
        "number": number,
        "prompt": prompt,
        "filed_under": "Describe this picture.",
        "text": text,
        "num_tokens": len(text.split()),
        "finish_reason": "stop",
        "num_image_tokens": 16,
        "num_added_tokens": 15,
        "model": "m",
        "model_revision": "r",
        "seed": 3,
    }


def write_candidates(
    run: RunDir, folder: Path, answers: Callable[[dict[str, Any]], Sequence[str]] = lambda image: TEXTS
) -> RunDir:
    """Write candidates for the images of a finished pool, in its shards."""
    output = RunDir.of(str(folder / "candidates"))
    for number, shard in enumerate((run / "pool").shards("index")):
        images = read_shard(shard, INDEX).to_pylist()
        rows = [candidate(image, place, text) for image in images for place, text in enumerate(answers(image))]
        if rows:
            output.write_shard("candidates", number, table_of(rows, CANDIDATES), CANDIDATES)
    output.write_manifest({"stage": "candidates"})
    return output


@dataclass(frozen=True)
class Scene:
    """A finished pool and its candidates, from which runs of scores alone are made."""

    folder: Path

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def candidates(self) -> RunDir:
        return RunDir.of(str(self.folder / "candidates"))

    @property
    def image_ids(self) -> list[str]:
        return (RunDir.of(str(self.folder)) / "pool").read_table("index", INDEX, ["image_id"])["image_id"].to_pylist()

    def config(self, folder: Path, script: str = "", **scores: Any) -> RunConfig:
        """Return a run's configuration with the fake engine."""
        return fake_config(folder, self.pictures, script, scores=scores)

    def step(self, candidates: RunDir | None = None, **more_inputs: str) -> Step:
        """Return the step that scores."""
        places = {"index": str(self.folder / "pool"), "candidates": (candidates or self.candidates).uri}
        return Step(SCORES, inputs={**places, **more_inputs})

    def run(self, config: RunConfig, folder: Path, candidates: RunDir | None = None, **more_inputs: str) -> RunDir:
        """Score into a folder and return the run."""
        run, step = RunDir.of(str(folder)), self.step(candidates, **more_inputs)
        run_pipeline(config, (step,), run, ("scores",), {"recipe": "test", "overrides": []})
        return run


def make_scene(folder: Path, num_pictures: int) -> Scene:
    """Build a pool of pictures, in shards of four, and write candidates that are equal for all images."""
    run = RunDir.of(str(folder))
    config = fake_config(folder, draw_pictures(folder / "pictures", num_pictures))
    run_pipeline(config, (Step(POOL),), run, ("pool",), {"recipe": "test", "overrides": []})
    write_candidates(run, folder)
    return Scene(folder)


def scores_of(run: RunDir) -> list[dict[str, Any]]:
    """Return all scores of a run, in their order."""
    return (run / "scores").read_table("scores", schemas.SCORES).to_pylist()


def statements_of(run: RunDir) -> list[dict[str, Any]]:
    """Return all statements of a run, in their order."""
    return (run / "scores").read_table("statements", STATEMENTS).to_pylist()


def values_by_image(run: RunDir, scorer: str) -> dict[str, list[float]]:
    """Return the values of a scorer by image, in the order of the answers."""
    found: dict[str, list[float]] = {}
    for row in scores_of(run):
        if row["scorer"] == scorer:
            found.setdefault(row["image_id"], []).append(row["value"])
    return found
