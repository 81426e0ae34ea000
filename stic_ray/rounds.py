"""Rounds of self-training as steps: describe with the model of the round before, train, score, and go on or stop."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from stic_ray.core.config import RunConfig
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
"""Returns the steps of a round, named as in a run of one round, by its number and the model that is asked in it, as the
input of a step; the last one trains."""


def in_rounds(config: RunConfig, body: Body) -> tuple[Step, ...]:
    """Return the steps of all rounds, the pool before them and the scores of each round's model behind it.

    A run of one round has the names of `body`; of several, "sft_1", "sft_2" and so on. Each round draws anew, from a
    seed of its own. With `rounds.stop_metric` a verdict behind each round decides whether the next one is made.
    """
    settings, num, scored = config.rounds, config.rounds.num, config.evaluation.models
    steps, trained, verdict = [Step(POOL)], BASE, ""
    for number in range(1, num + 1):
        local = body(number, {} if trained == BASE else {"model": trained})
        names = {step.name: in_round(step.name, number, num) for step in local}
        seed = {"seed": seed_of_round(config.seed, number)} if number > 1 else {}
        for step in local:
            inputs = {role: names.get(source, source) for role, source in step.inputs.items()}
            own = {**seed, **step.settings}
            steps.append(replace(step, name=names[step.name], inputs=inputs, settings=own, only_after=verdict))
        before, trained = trained, steps[-1].name
        steps.append(replace(_scoring(config, number, trained), only_after=verdict))
        if settings.stop_metric and (number > 1 or BASE in scored):
            earlier = in_round(EVALUATION.name, max(1, number - 1), num)
            compared = {before: earlier, trained: steps[-1].name}
            steps.append(Step(VERDICT_STAGE, in_round(VERDICT_STAGE.name, number, num), compared, only_after=verdict))
            verdict = steps[-1].name
    return tuple(steps)


def _scoring(config: RunConfig, number: int, trained: str) -> Step:
    """Return the evaluation of a round's model, in the first round of the base model, too."""
    models, num = config.evaluation.models, config.rounds.num
    if num == 1:
        return Step(EVALUATION, inputs={model: model for model in models if model != BASE})
    has_base = BASE in models
    base = [BASE] if has_base and number == 1 else []
    earlier = {EARLIER: in_round(EVALUATION.name, 1, num)} if has_base and number > 1 else {}
    settings = {"evaluation.models": [*base, trained]}
    return Step(EVALUATION, in_round(EVALUATION.name, number, num), {trained: trained, **earlier}, settings)


def in_round(name: str, number: int, num: int) -> str:
    """Return what a step is called in a round of a run with `num` rounds."""
    return name if num == 1 else f"{name}_{number}"


def seed_of_round(seed: int, number: int) -> int:
    """Return what a round draws from: the run's seed in the first, 31 bits of their own in each further one."""
    return seed if number == 1 else seed_for(seed, str(number), "round") % 2**31


def once(config: RunConfig) -> None:
    """Raise ConfigError where a recipe that has no rounds is asked for several."""
    if config.rounds.num > 1:
        raise ConfigError(
            f"rounds.num={config.rounds.num}: recipe '{config.name}' has one round; verified and vila2 have several."
        )


def recaption_and_retrain(config: RunConfig) -> tuple[Step, ...]:
    """Return VILA²'s steps: caption with the model, put captions together, train on them, in rounds (section 3.1).

    Specialists come behind the rounds (section 3.2).
    """
    num = config.rounds.num

    def body(number: int, model: dict[str, str]) -> Sequence[Step]:
        earlier = {f"captions:{n}": in_round("captions", n, num) for n in range(1, number)}
        start = model if config.rounds.restart == "previous" else {}
        return (
            Step(CAPTIONS_STAGE, inputs={"index": "pool", **model}, settings={"captions.round": number}),
            Step(CORPUS_STAGE, inputs={"index": "pool", **earlier, "captions": "captions"}),
            Step(SFT_ON_IMAGES, inputs={**_rows(config, "corpus"), **start}),
        )

    plain = {"infusion.describe": False}
    instructions = [Step(INFUSION, settings=plain)] if config.sft.mix else []
    return (*instructions, *in_rounds(config, body), *_specialists(config))


def _rows(config: RunConfig, corpus: str) -> dict[str, str]:
    """Return what a training reads: a corpus alone, or with `sft.mix` the instruction data beside it."""
    return {"rows:corpus": corpus, f"rows:{INFUSION.name}": INFUSION.name} if config.sft.mix else {"rows": corpus}


def _specialists(config: RunConfig) -> tuple[Step, ...]:
    """Return the steps that train each specialist, ask it about the pool, and train on all captions and its answers."""
    num, specialists = config.rounds.num, config.rounds.specialists
    if not specialists:
        return ()
    rounds = range(num, 0, -1)
    last = "|".join(in_round(SFT.name, number, num) for number in rounds)
    steps: list[Step] = []
    alone = {"sft.mix": {}, "sft.mix_end": {}}
    captions = {f"captions:{number}": in_round(CAPTIONS_STAGE.name, number, num) for number in rounds}
    for name, each in specialists.items():
        task = {"infusion.source": each.source, "infusion.images": each.images, "infusion.describe": False}
        asked = {"kind": f"{SPECIALIST}{name}", "questions": each.questions, "pattern": each.pattern}
        asked |= {"num_answers": each.num_answers}
        steps += [
            Step(INFUSION, f"task_{name}", settings=task),
            Step(SFT, f"specialist_{name}", {"rows": f"task_{name}", "model": last}, alone),
            Step(
                CAPTIONS_STAGE,
                f"answers_{name}",
                {"index": "pool", "model": f"specialist_{name}"},
                {"rounds.image_share": 1.0, **{f"captions.{key}": value for key, value in asked.items()}},
            ),
        ]
        captions[f"captions:{name}"] = f"answers_{name}"
    trained = f"{SFT.name}_specialists"
    earlier = {EARLIER: in_round(EVALUATION.name, 1, num)} if BASE in config.evaluation.models else {}
    return (
        *steps,
        Step(CORPUS_STAGE, "corpus_specialists", {"index": "pool", **captions}),
        Step(SFT_ON_IMAGES, trained, _rows(config, "corpus_specialists")),
        Step(EVALUATION, "evaluation_specialists", {trained: trained, **earlier}, {"evaluation.models": [trained]}),
    )
