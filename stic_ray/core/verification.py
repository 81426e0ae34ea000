"""The sections of the configuration about which answer is right: candidates, scores, and rules over them."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from stic_ray.core.section import Count, Pattern, Positive, Section, Share, Temperature, Weights

PromptPart = Literal["step_by_step", "plain", "hallucination"]
Likelihood = Literal["log_p", "image_logratio", "implicit_reward"]
"""Scorers that are made of log-probabilities."""
ClaimsValue = Literal["denied", "expected_denied", "confirmed_minus_denied"]


class CandidatesConfig(Section):
    """Several answers for each image, to choose from."""

    num_images: Count | None = None
    """Use the first so many images of the pool's order; all of them when unset."""
    num_candidates: Annotated[int, Field(ge=2)] = 8
    """Answers per image."""
    prompts: Annotated[tuple[PromptPart, ...], Field(min_length=1)] = ("step_by_step",)
    """Parts of the prompt set that are asked in turn: answer n gets one of part n, modulo their number."""
    temperature: Temperature = 0.7
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_new_tokens: Count = 1024
    allow_truncated: bool = False
    """Keep answers that were cut off at `max_new_tokens`."""


class ScoresConfig(Section):
    """How good each candidate is, in the eyes of one scorer or several (docs/verification.md)."""

    scorers: Annotated[tuple[str, ...], Field(min_length=1)] = ("consistency",)
    """Names of scorers, or `package.module:name` of your own."""
    model: str | None = None
    """Model that is asked: a folder with an adapter or a model, or a hub id; when unset what the role `model` holds,
    else the run's."""
    reference: str | None = None
    """Model that `implicit_reward` compares with, likewise; when unset what the role `reference` holds, else the
    run's."""
    prompt: Literal["asked", "filed_under"] = "asked"
    """The prompt under which log-probabilities are taken: what the candidate answers, or what it is trained under."""
    per_token: tuple[Likelihood, ...] = ("log_p",)
    """Scorers whose log-probabilities are divided by the tokens of the answer."""
    consistency_ngram: Count = 2
    """Words in a run, by which `consistency` compares answers."""
    similarity_model: str | None = None
    """Sentence-embedding model by whose cosine `consistency` compares them instead: a folder or a hub id."""
    claims: ClaimsValue = "denied"
    """What `claims` makes of an answer's statements: minus the number that is denied, minus the number to be expected
    by their probabilities, or the confirmed ones minus the denied ones."""
    max_claims: Count = 32
    """Statements of an answer that are asked about; further ones are left out."""
    max_split_tokens: Count = 512
    """Limit of the text with an answer's statements."""
    image_text_model: str | None = None
    """CLIP, SigLIP or the like, for `image_text`: a folder or a hub id."""
    image_text_value: Literal["cosine", "logit"] = "cosine"
    image_text_unit: Literal["answer", "sentence"] = "answer"
    """What is compared with the picture: the answer up to the model's limit, or each sentence, then their mean."""
    repetition_ngram: Count = 3
    """Words in a run that `repetition` looks for again."""
    pattern: Pattern | None = None
    """Regular expression of which `pattern` counts the matches; each is one less."""
    column_source: str | None = None
    """Parquet file, or folder of such files, for `column`: with `image_id`, and `number` for scores of answers."""
    column: str = "score"
    """Column of `column_source` with the scores; higher is better."""

    @field_validator("scorers", "per_token")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("name each of them once")
        return names


class RulesConfig(Section):
    """Which answers of an image are taken, by their scores. Rules compose: an answer, or a pair, must pass them all."""

    makes: Literal["pairs", "rows"] = "pairs"
    """Preference pairs for stage `dpo`, or rows with the chosen answer alone for stage `sft`."""
    scorers: Weights = (("consistency", 1.0),)
    """Which scores count, each with its weight; a negative one turns a score around. May be empty where no rule needs
    one: answers have the share of their group then (`majority`), or no score (`pairing=random`)."""
    combine: Literal["value", "rank"] = "value"
    """How several scores become one: `value` adds weight times value, in the scorers' own units; `rank` takes the
    weighted mean of the ranks among the image's answers, 0 for the worst to 1 for the best (CSR), which scorers of
    different units need."""
    pairing: Literal["best_worst", "worse_half", "any", "random"] = "best_worst"
    """`best_worst`: the best answer against the worst; `worse_half`: against one drawn from the worse half (SIcog);
    `any`: two that are drawn, the better one chosen (RLAIF-V); `random`: drawn, whatever their scores, a control."""
    min_gap: Positive | None = None
    """By how much the chosen answer's score is above the rejected one's at least; by anything when unset."""
    min_chosen_score: float | None = None
    """No answer below it is chosen."""
    max_rejected_score: float | None = None
    """No answer above it is rejected."""
    top_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Use this share of the images: those whose best answers have the highest scores of the whole pool."""
    majority: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Only the largest group of answers that agree (case, punctuation and articles aside) are chosen, and none of them
    is rejected; an image whose largest group has a smaller share of its answers gives nothing."""
    max_length_difference: Share | None = None
    """Largest difference between the tokens of the two answers of a pair, as a share of the longer one."""
    num_pairs: Count = 1
    """Pairs, or rows, of an image at most; none repeats another's texts."""
    num_rejected: Count = 1
    """Rejected answers of a pair at most."""

    @model_validator(mode="after")
    def _rules_fit_together(self) -> Self:
        if 0.0 in dict(self.scorers).values():
            raise ValueError("a scorer of weight 0 does nothing; leave it out of rules.scorers")
        values = self.model_dump(exclude_defaults=True)
        of_scores = ("min_gap", "min_chosen_score", "max_rejected_score")
        of_pairs = ("min_gap", "max_rejected_score", "max_length_difference", "num_rejected")
        if self.pairing == "random" and (given := [name for name in of_scores if name in values]):
            raise ValueError(f"pairing=random looks at no score, so it cannot be used with {' and '.join(given)}")
        if self.makes == "rows":
            if given := [name for name in of_pairs if name in values]:
                raise ValueError(f"makes=rows has no rejected answers, so it cannot be used with {' and '.join(given)}")
            if self.pairing in ("worse_half", "any"):
                raise ValueError(
                    f"makes=rows takes the best answer, or one at random; pairing={self.pairing} is for pairs"
                )
        if not self.scorers and (self.top_share is not None or (self.majority is None and self.pairing != "random")):
            raise ValueError("these rules need a score; name at least one in scorers, as {consistency: 1}")
        if self.combine == "rank" and self.top_share is not None:
            raise ValueError("top_share compares images, and ranks say nothing between them; use combine=value")
        return self


class QuestionsConfig(Section):
    """Questions that the model asks itself about each image, and which of them are kept (V-Zero, VisPlay, EvoLMM)."""

    num_images: Count | None = None
    """Use the first so many images of the pool's order; all of them when unset."""
    num_questions: Count = 2
    """Questions asked about each image."""
    num_answers: Annotated[int, Field(ge=2)] = 8
    """Answers to each question."""
    majority: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    """Keep a question where at least this share of its answers is the same."""
    max_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Drop a question where more than this share is: what the model always answers alike teaches it nothing."""
    temperature: Annotated[float, Field(gt=0.0, le=5.0)] = 1.0
    """Of questions and answers; without any, all answers would agree."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_question_tokens: Count = 64
    """A question that does not end before is dropped."""
    max_new_tokens: Count = 32
    """Of an answer; one that is cut off counts for no answer."""
    export: bool = False
    """Write the kept questions for frameworks of reinforcement learning, too: export-*.parquet."""

    @model_validator(mode="after")
    def _something_is_kept(self) -> Self:
        if self.max_share < self.majority:
            raise ValueError(f"max_share={self.max_share:g} is below majority={self.majority:g} and leaves no question")
        return self
