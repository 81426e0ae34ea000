"""Stage `pairs`: from candidates and their scores, by the rules of `rules.*`, to preference pairs or rows for `sft`.

No weights are loaded: actors hold a tokenizer, which knows how long what is taken will be in training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from stic_ray.core.config import DRAWN, RunConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.placement import Need, actors_need, without_gpus
from stic_ray.core.rundir import REJECTED_FAMILY
from stic_ray.core.schemas import DECISIONS, INFUSED, PAIRS
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.verification import RulesConfig
from stic_ray.core.workload import BYTES_PER_TEXT_TOKEN, Sizes, Work, images_used
from stic_ray.engines.opening import open_counter
from stic_ray.method.images import decode_for_storage
from stic_ray.method.preferences import NO_CANDIDATES
from stic_ray.method.ratings import Cut, RatedAnswer
from stic_ray.method.rules import Choice, Decision, decide
from stic_ray.stages.fetch import fetched, num_drawn
from stic_ray.stages.lengths import check_length, sequence_length
from stic_ray.stages.rated import answers_of, check_scorers, cut_of_the_pool, load_rated, rated_tasks
from stic_ray.stages.shards import ShardJob, check_written, run_shards
from stic_ray.stages.windows import Rows


def build_pairs(step: StepRun) -> dict[str, Any]:
    """Write pairs or rows, decisions and rejected shards, and return the manifest's row accounts.

    A row in is an image, whatever it gives; the number of pairs or rows is accounted for beside. Raises SourceError
    when not one is left, and where no input has scores that the rules need.
    """
    config, output, rules = step.config, step.output, step.config.rules
    tasks = rated_tasks(step)
    check_scorers(step)
    cut = cut_of_the_pool(step.name, tasks, config) if rules.top_share is not None else None
    num_images = num_drawn(step.name, tasks, config)
    job = ShardJob(
        stage=step.name,
        output=output,
        families={rules.makes: PAIRS if rules.makes == "pairs" else INFUSED, "decisions": DECISIONS},
        beside=("decisions",),
        load=partial(load_rated, config=config, cut=cut),
        make_worker=partial(Taker, config, cut),
        max_failed_share=config.cluster.max_failed_share,
    )
    done = run_shards(job, tasks, config.actors.model_copy(update={"num_gpus": 0.0}))
    accounts = done.accounts_by_image(num_images, rules.makes)
    check_written(accounts, output, f"Not one of {num_images} images gave {rules.makes}")
    return accounts if cut is None else {**accounts, "top_share_ends_at": cut.score}


class _Image(NamedTuple):
    """An image whose answers were decided about."""

    row: dict[str, Any]
    decision: Decision
    stored: bytes | None
    """None where it gives nothing."""
    lengths: dict[int, int]
    """Of training sequences in tokens, by candidate; of those that are taken, at least."""


class Taker:
    """Takes answers of an image; owns a tokenizer."""

    engine = None

    def __init__(self, config: RunConfig, cut: Cut | None) -> None:
        """Load what counts the tokens of the run's model."""
        self.config, self.cut = config, cut
        self.counter = open_counter(config.model)

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """Return the image's id and path."""
        return [{"image_id": row["image_id"], "path": row["path"]}]

    def prepare(self, row: dict[str, Any]) -> _Image:
        """Decide, and decode the image where something was taken."""
        candidates = {each["number"]: each for each in row["candidates"]}
        lengths: dict[int, int] = {}
        makes_pairs = self.config.rules.makes == "pairs"
        setting = "dpo.max_length_tokens" if makes_pairs else "sft.max_length_tokens"
        limit = (self.config.dpo if makes_pairs else self.config.sft).max_length_tokens

        def check(answer: RatedAnswer) -> None:
            length = lengths[answer.number] = self._count(candidates[answer.number])
            check_length(length, limit, setting)

        answers = answers_of(row["candidates"], self.config)
        rules, seed = self.config.rules, self.config.seed
        decision = decide(row["image_id"], answers, rules, seed, cut=self.cut, check=check)
        stored = decode_for_storage(fetched(row))[1] if decision.choices else None
        return _Image(row, decision, stored, lengths)

    def answer(self, prepared: Sequence[_Image]) -> Sequence[None]:
        """Ask nobody."""
        return [None] * len(prepared)

    def finish(self, prepared: _Image, answer: None) -> Rows:
        """Return the image's pairs or rows, or its rejected row, and what was decided about each candidate."""
        row, decision = prepared.row, prepared.decision
        decided = [
            {
                "image_id": row["image_id"],
                "number": each["number"],
                "score": each["score"],
                "taken": decision.taken(each["number"]),
                "reason": decision.lost.get(each["number"]),
            }
            for each in row["candidates"]
        ]
        if (why := decision.rejected) is not None:
            rejected = [{**each, "reason": why.reason, "message": why.message} for each in self.identities(row)]
            return {REJECTED_FAMILY: rejected, "decisions": decided}
        make = _pair if self.config.rules.makes == "pairs" else _row
        made = [make(prepared, choice, self.config) for choice in decision.choices]
        return {self.config.rules.makes: made, "decisions": decided}

    def _count(self, candidate: Mapping[str, Any]) -> int:
        return sequence_length(self.counter, _messages(candidate), candidate["num_added_tokens"])


def _messages(candidate: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the conversation that a candidate is trained in."""
    return [{"role": "user", "content": candidate["filed_under"]}, *_said(candidate["text"])]


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _pair(image: _Image, choice: Choice, config: RunConfig) -> dict[str, Any]:
    candidates = {each["number"]: each for each in image.row["candidates"]}
    chosen, rejected = candidates[choice.chosen.number], candidates[choice.rejected[0].number]
    taken = [choice.chosen, *choice.rejected]
    has_scores = None not in [each.score for each in taken]
    return {
        "image_id": image.row["image_id"],
        "position": image.row["position"],
        "image": {"bytes": image.stored, "path": image.row["path"]},
        "prompt": _messages(chosen)[:1],
        "chosen": _said(chosen["text"]),
        "rejected": _said(rejected["text"]),
        **NO_CANDIDATES,
        "more_rejected": [_said(each.text) for each in choice.rejected[1:]] or None,
        "chosen_prompt": chosen["prompt"],
        "rejected_prompt": rejected["prompt"],
        "negative": "random_candidate" if config.rules.pairing == "random" else "worse_candidate",
        "corruption": None,
        "chosen_number": choice.chosen.number,
        "rejected_numbers": [each.number for each in choice.rejected],
        "chosen_score": choice.chosen.score,
        "rejected_scores": [each.score for each in choice.rejected] if has_scores else None,
        "pixel_change": None,
        "num_image_tokens": chosen["num_image_tokens"],
        "num_chosen_tokens": chosen["num_tokens"],
        "num_rejected_tokens": rejected["num_tokens"],
        "num_sequence_tokens": max(image.lengths[each.number] for each in taken),
        "chosen_finish_reason": chosen["finish_reason"],
        "rejected_finish_reason": rejected["finish_reason"],
        "reference_chosen_logp": None,
        "reference_rejected_logp": None,
        "model": chosen["model"],
        "model_revision": chosen["model_revision"],
        "seed": config.seed,
    }


def _row(image: _Image, choice: Choice, config: RunConfig) -> dict[str, Any]:
    chosen = next(each for each in image.row["candidates"] if each["number"] == choice.chosen.number)
    return {
        "id": image.row["image_id"],
        "image": {"bytes": image.stored, "path": image.row["path"]},
        "messages": _messages(chosen),
        "description": None,
        "description_prompt": None,
        "finish_reason": None,
        "num_sequence_tokens": image.lengths[choice.chosen.number],
        "model": chosen["model"],
    }


def _need(config: RunConfig) -> Need:
    """Return the actors; without a model a GPU would only be held."""
    return without_gpus(actors_need(config))


def _check(step: StepRun) -> None:
    for role, place in step.inputs.items():
        is_outside = place.location.folder.path != step.output.location.folder.path
        if is_outside and place.manifest is None:
            raise SourceError(f"'{place.uri}' ({role}) has no manifest.json: it must be the folder of a finished step.")


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    num_images = images_used(config, sizes, config.candidates.num_images)
    if not num_images:
        return None
    answers = BYTES_PER_TEXT_TOKEN * 2 * min(sizes.num_answer_tokens, config.candidates.max_new_tokens)
    return Work(num_images, storage_bytes=num_images * config.rules.num_pairs * (sizes.image_bytes + answers))


PAIRS_STAGE = Stage(
    name="pairs",
    run=build_pairs,
    settings=(
        "seed",
        "model",
        "rules",
        "candidates.num_images",
        "candidates.allow_truncated",
        "dpo.max_length_tokens",
        *DRAWN,
    ),
    need=_need,
    writes="pairs-*.parquet",
    section="rules",
    reads=("index", "candidates", "scores"),
    check=_check,
    work=_work,
    amount="num_images",
    grows=True,
)


def pairs_stage(rules: RulesConfig) -> Stage:
    """Return the stage as these rules have it: what it writes, and whether it can go on when its pool has grown.

    A share of a pool is another one when the pool has grown.
    """
    stage = replace(PAIRS_STAGE, grows=rules.top_share is None)
    if rules.makes == "pairs":
        return stage
    settings = tuple(each.replace("dpo.", "sft.") for each in stage.settings)
    return replace(stage, writes="rows-*.parquet", settings=settings)
