"""Rounds of self-training as steps: describe with the model of the round before, train, score, and go on or stop."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from stic_ray.core.config import RunConfig, is_toy
from stic_ray.core.errors import ConfigError
from stic_ray.core.randomness import seed_for
from stic_ray.core.rounds import SPECIALIST
from stic_ray.core.steps import BASE, Step
from stic_ray.stages.captions import CAPTIONS_STAGE
from stic_ray.stages.corpus import CORPUS_STAGE
from stic_ray.stages.evaluation import EARLIER, EVALUATION
from stic_ray.stages.infusion import INFUSION
from stic_ray.stages.pool import POOL
from stic_ray.stages.sft import SFT, SFT_ON_IMAGES
from stic_ray.stages.verdict import VERDICT_STAGE

Body = Callable[[int, dict[str, str]], Sequence[Step]]
"""Returns the steps of a round, named by `in_round`, from its number and the model that is asked in it, as the input of
a step; the last one trains."""


def in_rounds(config: RunConfig, body: Body) -> tuple[Step, ...]:
    """Return the steps of all rounds, the pool before them and the scores of each round's model behind it.

    The first round has the names of `body`, further ones "sft_2", "sft_3" and so on, and a seed of their own: a run of
    one round can go on to several. With `rounds.stop_metric` a verdict behind each round decides whether the next one
    is made. Raises ConfigError for scores that are asked for and not made, or that a verdict would lack.
    """
    settings = config.rounds
    if settings.stop_metric and BASE not in config.evaluation.models:
        raise ConfigError(
            "rounds.stop_metric compares the first round with the base model; add base to evaluation.models."
        )
    steps, trained, verdict = [Step(POOL)], BASE, ""
    for number in range(1, settings.num + 1):
        own = body(number, {} if trained == BASE else {"model": trained})
        seed = {"seed": seed_of_round(config.seed, number)} if number > 1 else {}
        steps += [replace(step, settings={**seed, **step.settings}, only_after=verdict) for step in own]
        before, trained = trained, steps[-1].name
        steps.append(replace(_scoring(config, number, trained), only_after=verdict))
        if settings.stop_metric:
            compared = {before: in_round(EVALUATION.name, max(1, number - 1)), trained: steps[-1].name}
            steps.append(Step(VERDICT_STAGE, in_round(VERDICT_STAGE.name, number), compared, only_after=verdict))
            verdict = steps[-1].name
    return tuple(steps)


def _scoring(config: RunConfig, number: int, trained: str) -> Step:
    """Return the evaluation of a round's model, in the first round of the base model, too."""
    models = config.evaluation.models
    if number == 1:
        if unknown := [name for name in models if name not in (BASE, trained)]:
            raise ConfigError(
                f"evaluation.models names '{unknown[0]}'; recipe '{config.name}' scores {BASE} and {trained}, of every "
                "round."
            )
        return Step(EVALUATION, inputs={model: model for model in models if model != BASE})
    earlier = {EARLIER: EVALUATION.name} if BASE in models else {}
    name, settings = in_round(EVALUATION.name, number), {"evaluation.models": [trained]}
    return Step(EVALUATION, name, {trained: trained, **earlier}, settings)


def in_round(name: str, number: int) -> str:
    """Return what a step is called in a round."""
    return name if number == 1 else f"{name}_{number}"


def seed_of_round(seed: int, number: int) -> int:
    """Return what a round draws from: the run's seed in the first, 31 bits of their own in each further one."""
    return seed if number == 1 else seed_for(seed, str(number), "round") % 2**31


def once(config: RunConfig) -> None:
    """Raise ConfigError where a recipe that has no rounds is asked for several, or for what comes with them."""
    settings = config.rounds
    if settings.num > 1 or settings.restart != "base":
        raise ConfigError(f"recipe '{config.name}' has one round; leave out rounds.num and rounds.restart here.")
    without_specialists(config)


def without_specialists(config: RunConfig) -> None:
    """Raise ConfigError where a recipe that trains no specialists is asked for some."""
    if config.rounds.specialists:
        raise ConfigError(f"rounds.specialists are trained by recipe vila2, and not by '{config.name}'.")


def recaption_and_retrain(config: RunConfig) -> tuple[Step, ...]:
    """Return VILA²'s steps: caption with the model, put captions together, train on them, in rounds (section 3.1).

    Specialists come behind the rounds (section 3.2).
    """
    toy = [field for field in ("infusion.source", "pool.source") if any(map(is_toy, config.sources(field)))]
    if INFUSION.name in dict(config.sft.mix) and toy == ["infusion.source"]:
        raise ConfigError(
            "sft.mix names infusion, whose infusion.source is the toy world's; set your own, or leave it out."
        )

    def body(number: int, model: dict[str, str]) -> Sequence[Step]:
        captions, corpus, sft = (in_round(stage.name, number) for stage in (CAPTIONS_STAGE, CORPUS_STAGE, SFT))
        all_captions = {f"captions:{n}": in_round(CAPTIONS_STAGE.name, n) for n in range(1, number + 1)}
        start = model if config.rounds.restart == "previous" else {}
        return (
            Step(CAPTIONS_STAGE, captions, {"index": POOL.name, **model}, {"captions.round": number}),
            Step(CORPUS_STAGE, corpus, {"index": POOL.name, **all_captions}),
            Step(SFT_ON_IMAGES, sft, {**_rows(config, corpus), **start}),
        )

    plain = {"infusion.describe": False}
    instructions = [Step(INFUSION, settings=plain)] if config.sft.mix else []
    return (*instructions, *in_rounds(config, body), *_specialists(config))


def _rows(config: RunConfig, corpus: str) -> dict[str, str]:
    """Return what a training reads: a corpus alone, or with `sft.mix` the instruction data beside it."""
    return {"rows:corpus": corpus, f"rows:{INFUSION.name}": INFUSION.name} if config.sft.mix else {"rows": corpus}


def _specialists(config: RunConfig) -> tuple[Step, ...]:
    """Return the steps that train each specialist, ask it about the pool, and train on all captions and its answers."""
    specialists = config.rounds.specialists
    if not specialists:
        return ()
    rounds = range(config.rounds.num, 0, -1)
    last = "|".join(in_round(SFT.name, number) for number in rounds)
    steps: list[Step] = []
    alone = {"sft.mix": {}, "sft.mix_end": {}, "sft.mix_unit": "rows", "sft.num_steps": None, "sft.num_tokens": None}
    captions = {f"captions:{number}": in_round(CAPTIONS_STAGE.name, number) for number in rounds}
    for name, each in specialists:
        task = {"infusion.source": each.source, "infusion.images": each.images}
        task |= {"infusion.num_rows": None, "infusion.describe": False}
        asked = {"kind": f"{SPECIALIST}{name}", "questions": each.questions, "pattern": each.pattern}
        asked |= {"num_answers": each.num_answers}
        steps += [
            Step(INFUSION, f"task_{name}", settings=task),
            Step(SFT, f"specialist_{name}", {"rows": f"task_{name}", "model": last}, alone),
            Step(
                CAPTIONS_STAGE,
                f"answers_{name}",
                {"index": POOL.name, "model": f"specialist_{name}"},
                {"rounds.image_share": 1.0, **{f"captions.{key}": value for key, value in asked.items()}},
            ),
        ]
        captions[f"captions:{name}"] = f"answers_{name}"
    trained = f"{SFT.name}_specialists"
    earlier = {EARLIER: EVALUATION.name} if BASE in config.evaluation.models else {}
    return (
        *steps,
        Step(CORPUS_STAGE, "corpus_specialists", {"index": POOL.name, **captions}),
        Step(SFT_ON_IMAGES, trained, _rows(config, "corpus_specialists")),
        Step(EVALUATION, "evaluation_specialists", {trained: trained, **earlier}, {"evaluation.models": [trained]}),
    )
