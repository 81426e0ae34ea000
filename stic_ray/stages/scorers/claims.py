"""Scorer `claims`: the model turns an answer into questions, and says yes or no to each (RLAIF-V, arXiv 2405.17220)."""

from collections.abc import Iterable, Sequence

from stic_ray.core.config import RunConfig
from stic_ray.core.verification import ScoresConfig
from stic_ray.core.workload import Sizes
from stic_ray.engines.base import AnsweredPrompt, Request, Sampling
from stic_ray.method.claims import YES_NO, claims_score, read_questions, same_question, yes_probability
from stic_ray.method.prompts import fill
from stic_ray.stages.scorers.base import Answered, Requests, Score, Scored, Scorer, Statement, Tools, by_answer

TOKENS_PER_STATEMENT = 15
"""Of an answer, for the estimate: a statement is about ten words."""


def claims(settings: ScoresConfig) -> Scorer:
    """Return the score of an answer by its statements, which are kept with what the model thinks of each."""
    none_because = "the model made no question of the answer"
    return Scorer(_open, frozenset({"model", "pictures"}), requests=_requests, none_because=none_because)


def _open(tools: Tools) -> Score:
    settings = tools.config.scores

    def score(images: Sequence[Answered]) -> list[Scored]:
        questions = split(tools, images)
        of_images = [[question for own in found for question in own] for found in questions]
        p_yes = confirm(tools, zip(images, of_images, strict=True))
        scored = []
        for image, found, known in zip(images, questions, p_yes, strict=True):
            values = [claims_score([known[same_question(q)] for q in own], settings.claims) for own in found]
            statements = [
                Statement(answer.number, question, known[same_question(question)])
                for answer, own in zip(image.answers, found, strict=True)
                for question in own
            ]
            scored.append(by_answer(image, values, statements))
        return scored

    return score


def split(tools: Tools, images: Sequence[Answered]) -> list[list[list[str]]]:
    """Return the questions of each answer of each image; equal answers of an image are split once, greedily."""
    assert tools.engine is not None, "the stage opens what its scorers need"
    settings = tools.config.scores
    wanted = [(place, text) for place, image in enumerate(images) for text in dict.fromkeys(image.texts)]
    requests = [
        Request(fill(tools.prompts.split, answer=text), images[place].picture, image_id=f"{place}")
        for place, text in wanted
    ]
    answers = tools.engine.generate(requests, Sampling(settings.max_split_tokens))
    found = {
        key: read_questions(answer.text, settings.max_claims, cut_off=answer.finish_reason == "length")
        for key, answer in zip(wanted, answers, strict=True)
    }
    return [[found[place, text] for text in image.texts] for place, image in enumerate(images)]


def confirm(tools: Tools, asked: Iterable[tuple[Answered, Sequence[str]]]) -> list[dict[str, float]]:
    """Return the probability of yes for the questions about each image, by `same_question`; each is asked once.

    It is the share of "yes" and "Yes" among the probabilities with which an answer begins with one of YES_NO.
    """
    assert tools.engine is not None, "the stage opens what its scorers need"
    prompts, owners = [], []
    found: list[dict[str, float]] = []
    for image, questions in asked:
        found.append({})
        for question in {same_question(question): question for question in reversed(questions)}.values():
            prompt = fill(tools.prompts.confirm, question=question)
            prompts.append(AnsweredPrompt(prompt, image.picture, YES_NO, (True,) * len(YES_NO)))
            owners.append((found[-1], same_question(question)))
    for (known, question), logps in zip(owners, tools.engine.score_answers(prompts), strict=True):
        known[question] = yes_probability(logps)
    return found


def _requests(config: RunConfig, sizes: Sizes) -> Requests:
    candidates, settings = config.candidates, config.scores
    answer_tokens = min(sizes.num_answer_tokens, candidates.max_new_tokens)
    num_statements = min(settings.max_claims, max(1.0, answer_tokens / TOKENS_PER_STATEMENT))
    written = min(settings.max_split_tokens, num_statements * TOKENS_PER_STATEMENT)
    return (
        (candidates.num_candidates, sizes.num_prompt_tokens + answer_tokens, written),
        (candidates.num_candidates * num_statements, sizes.num_prompt_tokens, 0),
    )
