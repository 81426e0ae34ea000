"""Scorers that ask a model: against plain forward passes, and with engines that say what they are told to."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import apply_values
from stic_ray.core.rundir import RunDir
from stic_ray.engines.base import Answer, AnsweredPrompt, Request, Sampling
from stic_ray.engines.opening import named_model, open_engine
from stic_ray.engines.similarity import TextEmbedder
from stic_ray.method.prompts import load_prompts
from stic_ray.recipes import demo
from stic_ray.stages.scorers import Answered, Tools, open_scorer
from stic_ray.stages.scorers.base import Candidate
from stic_ray.toyworld.assets import PROMPTS_FILE
from stic_ray.toyworld.scenes import draw_scene, sample_scene
from tests.stages.scoring import make_scene, scores_of, statements_of
from tests.tiny_models import build
from tests.tiny_scorers import build_scorer

PICTURES = [draw_scene(sample_scene(7, index), side_px=64) for index in range(2)]
GREY = Image.new("RGB", PICTURES[0].size, (128, 128, 128))


def config_of(**scores: Any) -> RunConfig:
    values = {"prompts": str(PROMPTS_FILE), **{f"scores.{name}": value for name, value in scores.items()}}
    return apply_values(demo().config, values)


def values_of(name: str, tools: Tools, images: Sequence[Answered]) -> list[list[float | None]]:
    return [list(scored.values.values()) for scored in open_scorer(name, tools)(images)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Two models: LLaVA, and another whose language model has other weights."""
    config, folder = demo().config, tmp_path_factory.mktemp("models")
    model = named_model(config.model, str(build("llava", folder / "llava")))
    trained, reference = (open_engine(model, config.actors) for _ in range(2))
    inside: Any = reference._engine
    with torch.no_grad():
        for weight in inside.model.model.language_model.parameters():
            weight.mul_(1.1)
    return trained, reference


class TestLikelihood:
    """Log-probabilities of a tiny random model, which are those of one sequence in one forward pass."""

    IMAGES = (
        Answered(
            "one",
            (
                Candidate(0, "A red circle.", "What is there?"),
                Candidate(1, "A step", "Describe it.", cut_off=True),
                Candidate(2, "Blue and green squares.", "What is there?"),
            ),
            PICTURES[0],
        ),
        Answered.of(["Step by step.", "Nothing."], PICTURES[1], "What is in it?"),
    )

    @staticmethod
    @torch.no_grad()
    def plain(engine: Any, answer: Candidate, picture: Image.Image) -> tuple[float, int]:
        """Log p of an answer and its number of tokens, in a forward pass of its own."""
        engine = engine._engine
        conversation = [{"role": "user", "content": answer.prompt}, {"role": "assistant", "content": answer.text}]
        sequence = engine.builder.build(conversation, with_image=True, cut_off=answer.cut_off)
        batch = engine.builder.batch([sequence], [picture])
        is_answer = batch.pop("is_answer")[0, 1:]
        logps = engine.model(**batch).logits[0, :-1].log_softmax(-1)
        logps = logps.gather(1, batch["input_ids"][0, 1:, None])[:, 0]
        return float(logps[is_answer].sum()), int(is_answer.sum())

    def expected(self, name: str, engines: tuple[Any, Any], image: Answered, answer: Candidate) -> tuple[float, int]:
        """The value of a scorer, and the tokens of the answer."""
        own, number = self.plain(engines[0], answer, image.picture or GREY)
        other = {
            "log_p": 0.0,
            "image_logratio": self.plain(engines[0], answer, GREY)[0],
            "implicit_reward": self.plain(engines[1], answer, image.picture or GREY)[0],
        }
        return own - other[name], number

    @pytest.mark.parametrize("name", ["log_p", "image_logratio", "implicit_reward"])
    def test_values_are_those_of_plain_forward_passes(self, name: str, engines: tuple[Any, Any]) -> None:
        found = values_of(name, Tools(config_of(per_token=()), *engines), self.fresh())
        expected = [[self.expected(name, engines, image, each)[0] for each in image.answers] for image in self.IMAGES]
        for own, right in zip(found, expected, strict=True):
            assert own == pytest.approx(right, abs=2e-4)
        assert len({round(value, 3) for own in expected for value in own}) == 5

    @pytest.mark.parametrize("name", ["log_p", "image_logratio", "implicit_reward"])
    def test_means_are_over_the_tokens_of_the_answer_and_its_end(self, name: str, engines: tuple[Any, Any]) -> None:
        images = []
        for image in self.IMAGES:
            counts = [self.plain(engines[0], each, GREY)[1] for each in image.answers]
            own = zip(image.answers, counts, strict=True)
            answers = tuple(each._replace(num_tokens=count - (not each.cut_off)) for each, count in own)
            images.append(Answered(image.image_id, answers, image.picture))
        found = values_of(name, Tools(config_of(per_token=(name,)), *engines), images)
        for image, own in zip(images, found, strict=True):
            expected = [self.expected(name, engines, image, each) for each in image.answers]
            assert own == pytest.approx([value / number for value, number in expected], abs=1e-4)

    def test_without_the_number_of_tokens_there_is_no_mean(self, engines: tuple[Any, Any]) -> None:
        with pytest.raises(ValueError, match=r"scores\.per_token divides by the tokens"):
            values_of("log_p", Tools(config_of(), *engines), self.fresh())

    def fresh(self) -> list[Answered]:
        """The images, of which no scorer knows anything."""
        return [Answered(each.image_id, each.answers, each.picture) for each in self.IMAGES]

    def test_scorers_of_a_window_share_what_they_ask(self, engines: tuple[Any, Any]) -> None:
        shown: list[Image.Image | None] = []

        class Counting:
            def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
                raise AssertionError

            def score_answers(self, asked: Sequence[AnsweredPrompt]) -> list[list[float]]:
                shown.extend(each.image for each in asked)
                return engines[0].score_answers(asked)

        tools = Tools(config_of(), Counting())
        image = Answered.of(["A red circle."], PICTURES[0], "q", [9])
        for name in ("log_p", "image_logratio"):
            open_scorer(name, tools)([image])
        own, blank = shown
        assert own is PICTURES[0] and blank and blank.getcolors() == [(64 * 64, (128, 128, 128))]


class Oracle:
    """Splits "x and y" into "Is there x?" and "Is there y?", and believes what it was told; keeps what it was asked."""

    def __init__(self, believed: dict[str, float], cut_off: bool = False) -> None:
        self.believed, self.cut_off = believed, cut_off
        self.split: list[str] = []
        self.asked: list[str] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        assert sampling.temperature == 0 and all(request.image is not None for request in requests)
        self.split += [request.prompt for request in requests]
        texts = [request.prompt.rsplit("\n", 1)[-1] for request in requests]
        lines = ["\n".join(f"{n}. Is there {part}?" for n, part in enumerate(t.split(" and "))) for t in texts]
        lines = [text if "nothing" not in text else "" for text in lines]
        return [Answer(text, 9, "length" if self.cut_off else "stop", 16, 15) for text in lines]

    def score_answers(self, asked: Sequence[AnsweredPrompt]) -> list[list[float]]:
        found = []
        for each in asked:
            assert each.image is not None and all(each.cut_off)
            self.asked.append(each.prompt)
            p = next(p for name, p in self.believed.items() if name in each.prompt)
            by_answer = {"yes": p / 4, "Yes": 3 * p / 4, "no": (1 - p) / 2, "No": (1 - p) / 2}
            found.append([math.log(by_answer[answer] / 2) for answer in each.answers])
        return found


class TestClaims:
    """Statements of answers, each asked once."""

    TEXTS = ("a dog and a cat", "a dog and a train", "nothing", "a dog and a cat")
    BELIEVED = {"dog": 0.9, "cat": 0.4, "train": 0.1}

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("denied", [-1.0, -1.0, None, -1.0]),
            ("expected_denied", [-0.7, -1.0, None, -0.7]),
            ("confirmed_minus_denied", [0.0, 0.0, None, 0.0]),
        ],
    )
    def test_values_and_statements(self, value: str, expected: list[float | None]) -> None:
        tools = Tools(config_of(claims=value), Oracle(self.BELIEVED))
        [scored] = open_scorer("claims", tools)([Answered.of(self.TEXTS, PICTURES[0])])
        assert list(scored.values) == [0, 1, 2, 3]
        for found, right in zip(scored.values.values(), expected, strict=True):
            assert found == (None if right is None else pytest.approx(right, abs=1e-6))
        of_first = [("Is there a dog?", 0.9), ("Is there a cat?", 0.4)]
        of_second = [("Is there a dog?", 0.9), ("Is there a train?", 0.1)]
        rows = (
            [(0, *each) for each in of_first] + [(1, *each) for each in of_second] + [(3, *each) for each in of_first]
        )
        assert [each[:2] for each in scored.statements] == [row[:2] for row in rows]
        assert [each.p_yes for each in scored.statements] == pytest.approx([row[2] for row in rows], abs=1e-6)

    def test_equal_answers_are_split_once_and_equal_questions_asked_once_for_each_image(self) -> None:
        oracle = Oracle(self.BELIEVED)
        images = [Answered.of(self.TEXTS, picture) for picture in PICTURES]
        open_scorer("claims", Tools(config_of(), oracle))(images)
        prompts = load_prompts(str(PROMPTS_FILE))
        assert oracle.split == [prompts.split.replace("{answer}", text) for text in self.TEXTS[:3]] * 2
        questions = [prompts.confirm.replace("{question}", f"Is there a {name}?") for name in ("dog", "cat", "train")]
        assert sorted(oracle.asked) == sorted(questions * 2)

    def test_there_are_limits(self) -> None:
        image = Answered.of(["a dog and a cat and a train"], PICTURES[0])
        [first] = open_scorer("claims", Tools(config_of(max_claims=1), Oracle(self.BELIEVED)))([image])
        assert [each.question for each in first.statements] == ["Is there a dog?"]

        class Limited(Oracle):
            def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
                assert sampling.max_new_tokens == 5
                return [Answer("Is there a dog?\nIs there a c", 5, "length", 16, 15) for _ in requests]

        [cut] = open_scorer("claims", Tools(config_of(max_split_tokens=5), Limited(self.BELIEVED)))([image])
        assert [each.question for each in cut.statements] == ["Is there a dog?"]


class TestModelsOfTheirOwn:
    """`image_text` and `consistency` with a tiny CLIP and sentence model."""

    TEXTS = ("A red circle. A blue square.", "  ", "It.")

    def test_an_answer_or_each_of_its_sentences(self, tmp_path: Path) -> None:
        clip = {"image_text_model": str(build_scorer("clip", tmp_path))}
        image = Answered.of(self.TEXTS, PICTURES[0])
        by_text = {}
        for text in ("A red circle. A blue square.", "A red circle.", "A blue square.", "It."):
            [[by_text[text]]] = values_of("image_text", Tools(config_of(**clip)), [Answered.of([text], PICTURES[0])])
        [whole] = values_of("image_text", Tools(config_of(**clip)), [image])
        assert whole == [pytest.approx(by_text[self.TEXTS[0]], abs=1e-5), None, pytest.approx(by_text["It."], abs=1e-5)]
        [parts] = values_of("image_text", Tools(config_of(**clip, image_text_unit="sentence")), [image])
        mean = (by_text["A red circle."] + by_text["A blue square."]) / 2
        assert parts == [pytest.approx(mean, abs=1e-5), None, pytest.approx(by_text["It."], abs=1e-5)]
        [logits] = values_of("image_text", Tools(config_of(**clip, image_text_value="logit")), [image])
        assert logits[2] and whole[2] and logits[2] / whole[2] == pytest.approx(1 / 0.07, rel=1e-3)

    def test_consistency_by_a_sentence_model(self, tmp_path: Path) -> None:
        checkpoint = str(build_scorer("bert", tmp_path))
        texts = ["A red circle.", "A red square.", "Nothing."]
        [found] = values_of("consistency", Tools(config_of(similarity_model=checkpoint)), [Answered.of(texts)])
        vectors = TextEmbedder(checkpoint, "x", on_gpu=False).embed(texts)
        cosines = torch.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
        expected = [(cosines[row].sum() - 1) / 2 for row in range(3)]
        assert found == pytest.approx([float(value) for value in expected], abs=1e-5)


@pytest.mark.usefixtures("ray_session")
def test_a_run_with_models_in_actors(tmp_path: Path, tiny_llava: Path) -> None:
    """Several scorers at once, with a reference that a training left."""
    scene = make_scene(tmp_path, 2)
    names = ["claims", "image_logratio", "log_p", "implicit_reward", "image_text"]
    config = scene.config(
        tmp_path,
        scorers=names,
        image_text_model=str(build_scorer("siglip", tmp_path / "siglip")),
        max_split_tokens=24,
    )
    model = {"model.engine": "transformers", "model.path": str(tiny_llava), "prompts": str(PROMPTS_FILE)}
    config = apply_values(config, {**model, "actors.num_actors": 1})
    training = RunDir.of(str(tmp_path / "training"))
    shutil.copytree(tiny_llava, tmp_path / "training" / "checkpoint")
    training.write_manifest({"stage": "sft"})
    run = scene.run(config, tmp_path / "run", reference=training.uri)
    rows = scores_of(run)
    rewards = [row["value"] for row in rows if row["scorer"] == "implicit_reward"]
    assert rewards == pytest.approx([0.0] * 6, abs=1e-4), "both are the same model"
    for name in ("image_logratio", "log_p", "image_text"):
        assert len({row["value"] for row in rows if row["scorer"] == name}) > 3
    asked = statements_of(run)
    assert asked and all(0 <= row["p_yes"] <= 1 for row in asked)
    denied = {(row["image_id"], row["number"]): 0 for row in asked}
    for row in asked:
        denied[row["image_id"], row["number"]] -= row["p_yes"] < 0.5
    assert denied == {(row["image_id"], row["number"]): row["value"] for row in rows if row["scorer"] == "claims"}
