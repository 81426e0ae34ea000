"""Stage `pairs`: tables of candidates and scores become pairs, or rows, by the rules; every image ends in one way."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import RunError, SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import CANDIDATES, DECISIONS, INDEX, INFUSED, PAIRS, REJECTED, SCORES, table_of
from stic_ray.core.steps import Step
from stic_ray.pipeline import run_pipeline
from stic_ray.stages.pairs import pairs_stage
from stic_ray.stages.pool import POOL
from tests.stages.builders import draw_pictures, fake_config

WORDS = "one two three four five six seven eight"


def candidate(image: dict[str, Any], number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "image_id": image["image_id"],
        "position": image["position"],
        "number": number,
        "prompt": f"step {number % 2}",
        "filed_under": "Describe it.",
        "text": f"Answer {number} of {image['position']}.",
        "num_tokens": 4,
        "finish_reason": "stop",
        "num_image_tokens": 4,
        "num_added_tokens": 3,
        "model": "/models/that/answered",
        "model_revision": "abc",
        "seed": 3,
    }
    return {**row, **changes}


def scored(image: dict[str, Any], scorer: str, values: Sequence[float | None]) -> list[dict[str, Any]]:
    shared = {"image_id": image["image_id"], "scorer": scorer}
    return [{**shared, "number": n, "value": value} for n, value in enumerate(values) if value is not None]


def write(place: RunDir, family: str, schema: pa.Schema, shards: dict[int, list[dict[str, Any]]]) -> str:
    """Write a finished step's folder and return its address."""
    for number, rows in shards.items():
        if rows:
            place.write_shard(family, number, table_of(rows, schema), schema)
    place.write_manifest({"num_rows_written": 1})
    return place.uri


class Rated:
    """A pool with candidates and scores beside it."""

    def __init__(self, run: RunDir, pictures: Path, folder: Path) -> None:
        """`folder` is for the tables of a test, whose name it has; the pool may be shared."""
        self.run_dir, self.pictures, self.folder = run, pictures, folder
        self.images = (run / "pool").read_table("index", INDEX).to_pylist()
        self.shards = {n: self.images[4 * n : 4 * n + 4] for n in range(-(-len(self.images) // 4))}

    def config(self, rules: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
        return fake_config(self.pictures.parent, self.pictures, rules=rules or {}, **sections)

    def candidates(self, make: Any = candidate, name: str = "candidates") -> str:
        rows = {n: [make(image, c) for image in shard for c in range(4)] for n, shard in self.shards.items()}
        kept = {n: [row for row in shard if row is not None] for n, shard in rows.items()}
        return write(RunDir.of(str(self.folder / name)), "candidates", CANDIDATES, kept)

    def scores(self, values: Any, scorer: str = "consistency") -> str:
        rows = {
            n: [row for image in shard for row in scored(image, scorer, values(image))]
            for n, shard in self.shards.items()
        }
        return write(RunDir.of(str(self.folder / f"scores_{scorer}")), "scores", SCORES, rows)

    def run(self, config: RunConfig, *scores: str, candidates: str | None = None, name: str = "") -> RunDir:
        """Run the stage and return its folder."""
        inputs = {"index": "pool", "candidates": candidates or self.candidates()}
        inputs |= {f"scores:{n}" if n else "scores": each for n, each in enumerate(scores)}
        step = Step(pairs_stage(config.rules), f"pairs_{self.folder.name}{name}", inputs)
        run_pipeline(config, [Step(POOL), step], self.run_dir, [step.name], {"recipe": "test", "overrides": []})
        return self.run_dir / step.name


def make_pool(folder: Path) -> tuple[RunDir, Path]:
    """Index ten pictures in shards of four."""
    pictures, run = draw_pictures(folder / "pictures", 10), RunDir.of(str(folder / "run"))
    run_pipeline(fake_config(folder, pictures), [Step(POOL)], run, ["pool"], {})
    return run, pictures


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[RunDir, Path]:
    return make_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def rated(pool: tuple[RunDir, Path], tmp_path: Path) -> Rated:
    return Rated(*pool, tmp_path)


def by_position(image: dict[str, Any]) -> list[float]:
    """Number 2 is the best everywhere, number 1 the worst."""
    return [0.5, 0.1, 0.9 - image["position"] / 100, 0.4]


def test_pairs_hold_what_was_chosen_and_where_it_came_from(rated: Rated) -> None:
    output = rated.run(rated.config({"num_rejected": 2}), rated.scores(by_position))
    rows = output.read_table("pairs", PAIRS).to_pylist()
    assert [row["position"] for row in rows] == list(range(10))
    for row, image in zip(rows, rated.images, strict=True):
        position = image["position"]
        assert row["image_id"] == image["image_id"] and row["image"]["path"] == image["path"]
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (64, 64)
        assert row["prompt"] == [{"role": "user", "content": "Describe it."}]
        assert row["chosen"] == [{"role": "assistant", "content": f"Answer 2 of {position}."}]
        assert row["rejected"] == [{"role": "assistant", "content": f"Answer 1 of {position}."}]
        assert row["more_rejected"] == [[{"role": "assistant", "content": f"Answer 3 of {position}."}]]
        assert (row["chosen_number"], row["rejected_numbers"]) == (2, [1, 3])
        assert row["chosen_score"] == 0.9 - position / 100 and row["rejected_scores"] == [0.1, 0.4]
        assert (row["chosen_prompt"], row["rejected_prompt"]) == ("step 0", "step 1")
        assert row["negative"] == "worse_candidate" and row["model"] == "/models/that/answered"
        assert row["num_sequence_tokens"] == 3 + 6  # what the image adds, and the words of prompt and answer
    manifest = output.manifest
    assert manifest is not None and manifest["num_pairs"] == 10
    assert (manifest["num_rows_in"], manifest["num_rows_written"], manifest["num_rows_rejected"]) == (10, 10, 0)


def test_decisions_say_of_every_candidate_what_became_of_it(rated: Rated) -> None:
    config = rated.config({"max_rejected_score": 0.2, "min_chosen_score": 0.85})
    output = rated.run(config, rated.scores(by_position))
    rows = output.read_table("decisions", DECISIONS).to_pylist()
    assert len(rows) == 40
    kept = [(row["number"], row["taken"], row["reason"]) for row in rows[:4]]
    assert kept == [
        (0, None, "below_threshold"),
        (1, "rejected", None),
        (2, "chosen", None),
        (3, None, "below_threshold"),
    ]
    assert {(row["taken"], row["reason"]) for row in rows[-16:]} == {(None, "below_threshold")}
    manifest = output.manifest
    assert manifest is not None and manifest["rejected_by_reason"] == {"below_threshold": 4}
    assert manifest["num_rows_in"] == 10 == manifest["num_rows_written"] + 4


def test_each_image_ends_in_one_way_with_its_reason(rated: Rated) -> None:
    def make(image: dict[str, Any], number: int) -> dict[str, Any] | None:
        place = image["position"]
        if place == 0 or (place == 1 and number):
            return None
        changes: dict[int, dict[str, Any]] = {2: {"text": "The same."}, 3: {"finish_reason": "length"}}
        return candidate(image, number, **changes.get(place, {"text": f"{WORDS} {number}"} if place == 4 else {}))

    def values(image: dict[str, Any]) -> list[float | None]:
        return {5: [0.5, 0.5, 0.5, 0.5], 6: [None, 1.0, None, None]}.get(image["position"], [3.0, 2.0, 1.0, 0.0])

    candidates = rated.candidates(make)
    config = rated.config(dpo={"max_length_tokens": 12})
    output = rated.run(config, rated.scores(values), candidates=candidates)
    rejected = {row["image_id"]: row for row in output.read_table("rejected", REJECTED).to_pylist()}
    reasons = [
        rejected[image["image_id"]]["reason"] if image["image_id"] in rejected else None for image in rated.images
    ]
    assert reasons == [
        "no_score",
        "no_score",
        "identical_answers",
        "truncated_answer",
        "too_long",
        "gap_too_small",
        "no_score",
        *[None] * 3,
    ]
    assert "more than dpo.max_length_tokens=12" in rejected[rated.images[4]["image_id"]]["message"]
    written = output.read_table("pairs", PAIRS)["image_id"].to_pylist()
    assert sorted([*written, *rejected]) == sorted(image["image_id"] for image in rated.images)
    manifest = output.manifest
    assert manifest is not None and manifest["rejected_by_reason"]["no_score"] == 3


def test_rows_for_sft_have_the_best_answer_under_the_plain_prompt(rated: Rated) -> None:
    output = rated.run(rated.config({"makes": "rows", "num_pairs": 2}), rated.scores(by_position))
    rows = output.read_table("rows", INFUSED).to_pylist()
    assert len(rows) == 20 and not output.shards("pairs")
    assert [row["id"] for row in rows[:3]] == [rated.images[n]["image_id"] for n in (0, 0, 1)]
    assert rows[1]["messages"] == [
        {"role": "user", "content": "Describe it."},
        {"role": "assistant", "content": "Answer 0 of 0."},
    ]
    manifest = output.manifest
    assert manifest is not None and (manifest["num_rows"], manifest["num_rows_written"]) == (20, 10)


def test_scores_of_several_inputs_are_put_together(rated: Rated) -> None:
    def against(image: dict[str, Any]) -> list[float]:
        return [-value for value in by_position(image)]

    several = (rated.scores(by_position), rated.scores(against, "outside"))
    config = rated.config({"scorers": {"consistency": 1.0, "outside": 2.0}, "combine": "rank"})
    rows = rated.run(config, *several).read_table("pairs", PAIRS).to_pylist()
    assert all((row["chosen_number"], row["rejected_numbers"]) == (1, [2]) for row in rows)
    assert rows[0]["chosen_score"] == pytest.approx(2 / 3) and rows[0]["rejected_scores"] == pytest.approx([1 / 3])
    with pytest.raises(SourceError, match="has scores for the same candidates in .*scores-00000[01].parquet and"):
        rated.run(config, several[0], several[1], several[1], name="twice")
    config = rated.config({"scorers": "claims"})
    with pytest.raises(SourceError, match="names claims, which no scores .* are by; they are by consistency, outside"):
        rated.run(config, *several, name="unknown")


def test_the_top_share_is_one_of_the_pool_and_does_not_grow(rated: Rated) -> None:
    config = rated.config({"top_share": 0.3})
    output = rated.run(config, rated.scores(by_position))
    assert output.read_table("pairs", PAIRS)["position"].to_pylist() == [0, 1, 2]
    manifest = output.manifest
    assert manifest is not None and manifest["rejected_by_reason"] == {"not_in_top_share": 7}
    assert manifest["top_share_ends_at"] == pytest.approx(0.88)
    assert not pairs_stage(config.rules).grows and pairs_stage(rated.config().rules).grows


def test_a_rerun_and_a_resume_give_the_same_bytes(rated: Rated) -> None:
    scores = rated.scores(lambda image: [0.1, 0.2, 0.3, 0.4])
    config = rated.config({"pairing": "any", "num_pairs": 3})
    candidates = rated.candidates()
    output = rated.run(config, scores, candidates=candidates)
    files = {path.name: path.read_bytes() for path in Path(output.location.path).glob("*.parquet")}
    assert len(files) == 6
    (output.location / "manifest.json").delete()
    output.shards("pairs")[1].delete()
    rated.run(config, scores, candidates=candidates)
    again = rated.run(config, scores, candidates=candidates, name="again")
    for place in (output, again):
        assert {path.name: path.read_bytes() for path in Path(place.location.path).glob("*.parquet")} == files


@pytest.mark.usefixtures("ray_session")
def test_only_pictures_of_which_something_is_made_are_read(tmp_path: Path) -> None:
    """The picture of the last image is gone, and its scores are equal: it is rejected for these."""
    rated = Rated(*make_pool(tmp_path / "own"), tmp_path)
    last = rated.images[-1]
    Path(last["path"]).unlink()
    output = rated.run(rated.config(), rated.scores(lambda image: [0.5] * 4 if image is last else [0.5, 0.1, 0.9, 0.4]))
    assert output.read_table("pairs", PAIRS).num_rows == 9
    [row] = output.read_table("rejected", REJECTED).to_pylist()
    assert (row["reason"], row["image_id"]) == ("gap_too_small", last["image_id"])


def test_an_input_from_outside_must_be_finished(rated: Rated) -> None:
    place = RunDir.of(str(rated.folder / "unfinished"))
    place.write_shard("scores", 0, table_of([], SCORES), SCORES)
    with pytest.raises(SourceError, match=r"unfinished' \(scores\) has no manifest.json"):
        rated.run(rated.config(), place.uri)


def test_other_rules_are_refused_in_the_same_folder(rated: Rated) -> None:
    scores, candidates = rated.scores(by_position), rated.candidates()
    rated.run(rated.config(), scores, candidates=candidates)
    with pytest.raises(RunError, match="rules.min_gap was None, is now 0.2"):
        rated.run(rated.config({"min_gap": 0.2}), scores, candidates=candidates)
