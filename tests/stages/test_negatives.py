"""Stage `preferences` with other kinds of dispreferred answers than STIC's."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stic_ray.core.errors import ConfigError
from stic_ray.core.rundir import RunDir
from stic_ray.method.corruption import corrupt, pixel_change
from tests.stages.builders import draw_pictures, fake_config, pairs_of, rejected_of, run_stages

SCRIPT = """
rules: [{prompt: step, answer: 'It has a red circle of {colour} and a small square of {seed}.'}]
default: 'Seen {size} in {colour}.'
journal: JOURNAL
"""


def made(folder: Path, pictures: Path, script: str = SCRIPT, **preferences: Any) -> RunDir:
    folder.mkdir(exist_ok=True)
    script = script.replace("JOURNAL", str(folder / "journal"))
    return run_stages(
        fake_config(folder, pictures, script, preferences=preferences), folder / "run", "pool", "preferences"
    )


def num_requests(folder: Path) -> int:
    return sum(map(int, (folder / "journal").read_text().split()))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("drawn") / "pictures", 12)


@pytest.mark.usefixtures("ray_session")
def test_graded_corruptions_are_what_the_rejected_answer_saw(tmp_path: Path, pictures: Path) -> None:
    kinds = {"diffusion_noise": 1.0, "crop": 1.0, "mask": 1.0, "blur": 1.0}
    run = made(tmp_path, pictures, negatives=kinds, strength=0.4, strength_end=0.9, num_images=12)
    rows = pairs_of(run).to_pylist()
    assert len(rows) == 12 and {row["corruption"]["kind"] for row in rows} == {*kinds}
    for row in rows:
        clean = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        corrupted = corrupt(clean, row["corruption"])
        assert row["negative"] == "corrupted_image"
        assert row["pixel_change"] == pixel_change(clean, corrupted) > 0
        assert row["corruption"]["strength"] == pytest.approx(0.4 + 0.5 * row["position"] / 11)
        assert row["rejected"][0]["content"].startswith("Seen 64x64 in #")


@pytest.mark.usefixtures("ray_session")
def test_text_negatives_take_no_request_of_their_own(tmp_path: Path, pictures: Path) -> None:
    run = made(tmp_path, pictures, negatives={"text_swap": 1.0, "other_image": 1.0})
    rows = pairs_of(run).to_pylist()
    assert num_requests(tmp_path) == len(rows) == 12
    answers = {row["image_id"]: row["chosen"][0]["content"] for row in rows}
    assert {row["negative"] for row in rows} == {"text_swap", "other_image"}
    for row in rows:
        chosen, rejected = answers[row["image_id"]], row["rejected"][0]["content"]
        assert row["corruption"] is None and row["pixel_change"] is None
        assert (row["num_rejected_tokens"], row["rejected_finish_reason"]) == (13, "stop")
        if row["negative"] == "text_swap":
            assert rejected != chosen and sorted(rejected.split()) == sorted(chosen.split())
            continue
        shard = [other for other in rows if other["position"] // 4 == row["position"] // 4]
        assert rejected in [answers[other["image_id"]] for other in shard if other is not row]


@pytest.mark.usefixtures("ray_session")
def test_other_images_answers_do_not_depend_on_windows(tmp_path: Path, pictures: Path) -> None:
    tables = []
    for batch_size in (1, 4):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        config = fake_config(
            folder,
            pictures,
            SCRIPT.replace("JOURNAL", str(tmp_path / "journal")),
            preferences={"negatives": {"other_image": 3.0, "crop": 1.0}},
            actors={"batch_size": batch_size},
            model={"path": str(tmp_path / "script.yaml")},
        )
        (tmp_path / "script.yaml").write_text(SCRIPT.replace("JOURNAL", str(tmp_path / "journal")))
        tables.append(pairs_of(run_stages(config, folder / "run", "pool", "preferences")))
    assert tables[0].num_rows == 12 and tables[0].equals(tables[1])


@pytest.mark.usefixtures("ray_session")
def test_an_image_whose_shard_says_the_same_is_rejected(tmp_path: Path, pictures: Path) -> None:
    script = "rules: [{prompt: step, answer: A picture.}]\ndefault: 'Seen {size} in {colour}.'"
    run = made(tmp_path, pictures, script, negatives={"other_image": 1.0, "text_swap": 1.0, "crop": 1.0}, strength=1.0)
    rejected = rejected_of(run, "preferences")
    assert {row["negative"] for row in pairs_of(run).to_pylist()} == {"corrupted_image"}
    assert {row["reason"] for row in rejected} == {"identical_answers"}
    manifest = (run / "preferences").manifest
    assert manifest and manifest["rejected_by_reason"] == {"identical_answers": len(rejected)}
    assert len(rejected) + pairs_of(run).num_rows == 12


def test_settings_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    for preferences, why in (
        ({"negatives": {"other_image": 1.0}, "reference_logps": True}, "leave one of them out"),
        ({"strength_end": 1.0}, "strength_end needs num_images"),
        ({"negatives": {"blurr": 1.0}}, "Did you mean 'blur'.*Valid: hallucination_prompt, low_resolution"),
        ({"negatives": {"blur": 0.0}}, "greater than 0"),
    ):
        with pytest.raises(ConfigError, match=why):
            fake_config(tmp_path, tmp_path, preferences=preferences)
