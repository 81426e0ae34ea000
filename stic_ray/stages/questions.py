"""Stage `questions`: questions that the model asks itself about an image, kept where most of its answers agree.

The kept ones go to rows-*.parquet, which stage `sft` reads as it reads infused rows. questions-*.parquet has all of
them, with their answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from stic_ray.core.config import ANSWER_SETTINGS, DRAWN, RunConfig
from stic_ray.core.errors import Rejected
from stic_ray.core.placement import actors_need
from stic_ray.core.randomness import random_for, seed_for
from stic_ray.core.rundir import REJECTED_FAMILY
from stic_ray.core.schemas import EXPORTED_QUESTIONS, INFUSED, QUESTIONS, Reason
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import BYTES_PER_TEXT_TOKEN, SHORT_ANSWER_TOKENS, Sizes, Work, images_used
from stic_ray.engines.base import Answer, Request, Sampling
from stic_ray.engines.opening import open_trained
from stic_ray.method.images import decode_for_storage
from stic_ray.method.media import PLACEHOLDER
from stic_ray.method.prompts import PromptSet, fill, load_prompts
from stic_ray.method.questions import Majority, check_majority, majority_of, read_questions
from stic_ray.stages.fetch import fetched, indexed_tasks, load_drawn, num_drawn
from stic_ray.stages.lengths import check_length
from stic_ray.stages.shards import ShardJob, check_written, run_shards
from stic_ray.stages.windows import Rows


def build_questions(step: StepRun) -> dict[str, Any]:
    """Write rows, questions and rejected shards into the step's folder and return the manifest's row accounts.

    A row is a question. Raises SourceError when not one is kept.
    """
    config, output = step.config, step.output
    tasks = indexed_tasks(step.inputs["index"], config.pool.shard_size, config.questions.num_images)
    num_questions = config.questions.num_questions * num_drawn(step.name, tasks, config)
    job = ShardJob(
        stage=step.name,
        output=output,
        families={"rows": INFUSED, "questions": QUESTIONS, "export": EXPORTED_QUESTIONS},
        beside=("questions", "export"),
        load=partial(load_drawn, config=config),
        make_worker=partial(Questioner, config, load_prompts(config.prompts), step.model()),
        max_failed_share=config.cluster.max_failed_share,
    )
    accounts = run_shards(job, tasks, config.actors).accounts(num_questions)
    check_written(accounts, output, f"Not one of {num_questions} questions was kept")
    return accounts


@dataclass(frozen=True)
class _Seen:
    """An image that is asked about."""

    row: dict[str, Any]
    picture: Image.Image
    stored: bytes


@dataclass
class _Asked:
    """One of the questions about an image."""

    asked_with: str
    written: Answer
    question: str | Rejected
    answers: list[Answer] = field(default_factory=list)


class Questioner:
    """Asks and answers; owns the model."""

    def __init__(self, config: RunConfig, prompts: PromptSet, checkpoint: Location | None) -> None:
        """Load the base model of the run, or what a training step left in `checkpoint`."""
        self.config = config
        self.prompts = prompts
        self.engine = open_trained(config, checkpoint)

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """Return the image's id and path, for each of its questions."""
        return [{"image_id": row["image_id"], "path": row["path"]}] * self.config.questions.num_questions

    def prepare(self, row: dict[str, Any]) -> _Seen:
        """Decode the image."""
        return _Seen(row, *decode_for_storage(fetched(row)))

    def answer(self, prepared: Sequence[_Seen]) -> list[list[_Asked]]:
        """Return the questions about each image with their answers; what is no question has none."""
        settings = self.config.questions
        asked_with = [[self._asking(image, n) for n in range(settings.num_questions)] for image in prepared]
        requests = [
            self._request(prompt, image, f"question {n}")
            for image, prompts in zip(prepared, asked_with, strict=True)
            for n, prompt in enumerate(prompts)
        ]
        written = iter(self._generate(requests, settings.max_question_tokens))
        found: list[list[_Asked]] = []
        for prompts in asked_with:
            texts = [next(written) for _ in prompts]
            questions = read_questions([text.text for text in texts])
            found.append([_Asked(*each) for each in zip(prompts, texts, questions, strict=True)])
        self._answer_all(prepared, found)
        return found

    def finish(self, prepared: _Seen, answer: list[_Asked]) -> Rows:
        """Return the rows of the kept questions, the rejections of the others, and what became of all."""
        kept: dict[str, list[dict[str, Any]]] = {"rows": [], "questions": [], "export": [], REJECTED_FAMILY: []}
        for number, asked in enumerate(answer):
            majority = majority_of([a.text if a.finish_reason == "stop" else None for a in asked.answers])
            reason = None
            try:
                kept["rows"].append(self._row(prepared, number, asked, majority))
                if self.config.questions.export:
                    kept["export"].append(self._exported(prepared, number, asked, majority))
            except Rejected as error:
                reason = error.reason
                where = self.identities(prepared.row)[0]
                kept[REJECTED_FAMILY].append({**where, "reason": error.reason, "message": error.message})
            kept["questions"].append(self._record(prepared, number, asked, majority, reason))
        return {family: rows for family, rows in kept.items() if rows}

    def _asking(self, image: _Seen, number: int) -> str:
        purpose = f"prompt of question {number}"
        return random_for(self.config.seed, image.row["image_id"], purpose).choice(self.prompts.ask)

    def _request(self, prompt: str, image: _Seen, purpose: str) -> Request:
        image_id = image.row["image_id"]
        return Request(prompt, image.picture, seed_for(self.config.seed, image_id, purpose), image_id)

    def _generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Answer]:
        settings = self.config.questions
        return self.engine.generate(requests, Sampling(max_new_tokens, settings.temperature, settings.top_p))

    def _answer_all(self, images: Sequence[_Seen], found: Sequence[Sequence[_Asked]]) -> None:
        """Answer all questions of a window in one call; those of one question are neighbours with one prompt."""
        settings = self.config.questions
        open_questions: list[_Asked] = []
        requests: list[Request] = []
        for image, questions in zip(images, found, strict=True):
            for number, asked in enumerate(questions):
                if isinstance(asked.question, Rejected):
                    continue
                prompt, purpose = self._brief(asked.question), f"to question {number}, answer"
                requests += [self._request(prompt, image, f"{purpose} {n}") for n in range(settings.num_answers)]
                open_questions.append(asked)
        answers = iter(self._generate(requests, settings.max_new_tokens) if requests else [])
        for asked in open_questions:
            asked.answers = [next(answers) for _ in range(settings.num_answers)]

    def _brief(self, question: str) -> str:
        return fill(self.prompts.answer_briefly, question=question)

    def _row(self, image: _Seen, number: int, asked: _Asked, majority: Majority) -> dict[str, Any]:
        """Return a kept question as `sft` trains on it. Raises Rejected for any other."""
        if isinstance(asked.question, Rejected):
            raise asked.question
        settings = self.config.questions
        check_majority(majority, settings.majority, settings.max_share)
        messages = [
            {"role": "user", "content": self._brief(asked.question)},
            {"role": "assistant", "content": majority.answer or ""},
        ]
        length = self.engine.count_text_tokens(messages, with_image=True) + asked.written.num_added_tokens
        check_length(length, self.config.sft.max_length_tokens, "sft.max_length_tokens")
        return {
            "id": f"{image.row['image_id']}-{number}",
            "image": {"bytes": image.stored, "path": image.row["path"]},
            "messages": messages,
            "description": None,
            "description_prompt": None,
            "finish_reason": None,
            "num_sequence_tokens": length,
            "model": self.engine.name,
        }

    def _record(
        self, image: _Seen, number: int, asked: _Asked, majority: Majority, reason: Reason | None
    ) -> dict[str, Any]:
        return {
            "image_id": image.row["image_id"],
            "position": image.row["position"],
            "number": number,
            "asked_with": asked.asked_with,
            "question": asked.written.text if isinstance(asked.question, Rejected) else asked.question,
            "answers": [each.text for each in asked.answers],
            "answer": majority.answer,
            "share": majority.share,
            "reason": reason,
            "model": self.engine.name,
            "model_revision": self.engine.revision,
            "seed": self.config.seed,
        }

    def _exported(self, image: _Seen, number: int, asked: _Asked, majority: Majority) -> dict[str, Any]:
        assert isinstance(asked.question, str), "a kept question"
        problem = f"{PLACEHOLDER}\n{self._brief(asked.question)}"
        index = image.row["position"] * self.config.questions.num_questions + number
        return {
            "data_source": "stic_ray/questions",
            "prompt": [{"role": "user", "content": problem}],
            "images": [{"bytes": image.stored, "path": image.row["path"]}],
            "ability": "visual_question_answering",
            "reward_model": {"style": "rule", "ground_truth": majority.answer},
            "extra_info": {"split": "train", "index": index, "question": asked.question, "share": majority.share},
            "problem": problem,
            "answer": majority.answer,
        }


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    settings = config.questions
    num_images = images_used(config, sizes, settings.num_images)
    if not num_images:
        return None
    num_rows, num_answers = num_images * settings.num_questions, settings.num_answers
    asking = (1.0, sizes.num_prompt_tokens, float(min(SHORT_ANSWER_TOKENS, settings.max_question_tokens)))
    # The answers to a question share its prompt, which engines read once for all of them.
    writes = float(min(SHORT_ANSWER_TOKENS, settings.max_new_tokens))
    answering = (num_answers, sizes.num_prompt_tokens / num_answers, writes)
    stored = sizes.image_bytes * (2 if settings.export else 1) + BYTES_PER_TEXT_TOKEN * writes * num_answers
    return Work(num_rows, (asking, answering), storage_bytes=num_rows * stored)


QUESTIONS_STAGE = Stage(
    name="questions",
    run=build_questions,
    settings=("seed", "prompts", "model", "questions", "sft.max_length_tokens", *DRAWN, *ANSWER_SETTINGS),
    need=actors_need,
    writes="rows-*.parquet",
    section="questions",
    reads=("index", "model"),
    work=_work,
    amount="num_images",
    grows=True,
)
