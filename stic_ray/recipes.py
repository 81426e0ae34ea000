"""Named runs: a recipe returns a configuration, and the steps that follow from it; its docstring says what it costs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from stic_ray.core.config import (
    MISSING,
    ActorsConfig,
    DPOConfig,
    EvaluationConfig,
    InfusionConfig,
    ModelConfig,
    PoolConfig,
    PreferencesConfig,
    RunConfig,
    SFTConfig,
    TuningConfig,
    WorkersConfig,
)
from stic_ray.core.errors import ConfigError, nearest
from stic_ray.core.rounds import CaptionsConfig, RoundsConfig
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import BASE, Recipe, Step
from stic_ray.core.verification import CandidatesConfig, QuestionsConfig, RulesConfig, ScoresConfig
from stic_ray.rounds import in_round, in_rounds, once, recaption_and_retrain, without_specialists
from stic_ray.stages.candidates import CANDIDATES
from stic_ray.stages.dpo import DPO
from stic_ray.stages.evaluation import EVALUATION
from stic_ray.stages.infusion import INFUSION
from stic_ray.stages.pairs import pairs_stage
from stic_ray.stages.pool import POOL
from stic_ray.stages.preferences import PREFERENCES
from stic_ray.stages.questions import QUESTIONS_STAGE
from stic_ray.stages.scores import SCORES
from stic_ray.stages.sft import SFT, SFT_ON_IMAGES


def stic(config: RunConfig) -> tuple[Step, ...]:
    """Return the steps of STIC: describe well and badly, prefer, infuse a little instruction data, fine-tune, score."""
    once(config)
    pairs = RunDir.of(config.dpo.pairs).uri if config.dpo.pairs else "preferences"
    start = {"model": "dpo"} if config.sft.start == "dpo" else {}
    return (
        Step(POOL),
        Step(PREFERENCES, inputs={"index": "pool"}),
        Step(DPO, inputs={"pairs": pairs}),
        Step(INFUSION, inputs=start if config.infusion.describe else {}),
        Step(SFT, inputs={**start, "rows": "infusion"}),
        Step(EVALUATION, inputs={model: model for model in config.evaluation.models if model != BASE}),
    )


def demo() -> Recipe:
    """Run every stage on the toy world, where self-training can be seen to work: minutes on 2 CPU cores, no download.

    1,000 drawn pictures and a tiny model whose captions leave objects out and add what is not there. The settings were
    chosen on the toy world's tuning scenes (docs/results/toyworld.md). Answers that reach the token limit are
    kept, which an untrained model of yours may need.
    """
    config = RunConfig(
        name="demo",
        pool=PoolConfig(shard_size=128),
        preferences=PreferencesConfig(temperature=0.2, max_new_tokens=64, allow_truncated=True),
        tuning=TuningConfig(lora_rank=16, lora_alpha=32, lora_dropout=0.0),
        dpo=DPOConfig(learning_rate=5e-4, global_batch=16, alpha=0.05),
        infusion=InfusionConfig(prompt="describe", temperature=0.2, max_new_tokens=64, allow_truncated=True),
        sft=SFTConfig(learning_rate=5e-4, global_batch=16),
        evaluation=EvaluationConfig(max_answer_tokens=16, max_description_tokens=64),
        actors=ActorsConfig(num_actors=2, batch_size=128),
        workers=WorkersConfig(num_workers=2, micro_batch=4, save_every_steps=50),
    )
    return Recipe(config, stic)


def any_model() -> Recipe:
    """Run STIC on a model, images and instruction data of your own, on one GPU unless you ask for more.

    The published settings of STIC (docs/method.md), with nothing of the toy world: give model.path, pool.source,
    infusion.source and evaluation.benchmarks with --set, and actors.* and workers.* for the GPUs that you have.
    """
    config = RunConfig(
        name="any_model",
        model=ModelConfig(path=MISSING),
        pool=PoolConfig(source=MISSING),
        infusion=InfusionConfig(source=MISSING),
        evaluation=EvaluationConfig(benchmarks=(MISSING,)),
        actors=ActorsConfig(num_gpus=1, num_cpus=2, batch_size=16, timeout_s=1800),
        workers=WorkersConfig(num_gpus=1, num_cpus=2, gradient_checkpointing=True),
    )
    return Recipe(config, stic)


def llava16_7b() -> Recipe:
    """Run STIC's published settings for LLaVA-v1.6-Mistral-7B on a GPU cluster (docs/method.md).

    6,000 images and 5,000 instruction rows, 8 generation actors and 4 training workers with one 80 GB GPU each.
    Give pool.source, infusion.source and evaluation.benchmarks with --set.
    """
    config = RunConfig(
        name="llava16_7b",
        seed=42,
        model=ModelConfig(path="llava-hf/llava-v1.6-mistral-7b-hf", dtype="bfloat16"),
        pool=PoolConfig(source=MISSING),
        preferences=PreferencesConfig(num_images=6000, temperature=0.2, max_new_tokens=1024),
        tuning=TuningConfig(method="lora", lora_rank=128, lora_alpha=256, lora_dropout=0.05),
        dpo=DPOConfig(learning_rate=1e-7, global_batch=8, beta=0.1, alpha=1 / 1024),
        infusion=InfusionConfig(source=MISSING, num_rows=5000, temperature=0.2, max_new_tokens=1024),
        sft=SFTConfig(learning_rate=2e-5, global_batch=32),
        evaluation=EvaluationConfig(benchmarks=(MISSING,)),
        actors=ActorsConfig(num_actors=8, num_gpus=1, num_cpus=4, batch_size=64, batch_tokens=65_536, timeout_s=1800),
        workers=WorkersConfig(num_workers=4, num_gpus=1, num_cpus=4, zero_stage=2, gradient_checkpointing=True),
    )
    return Recipe(config, stic)


def choose_among_candidates(config: RunConfig) -> tuple[Step, ...]:
    """Return the steps of verified self-training: candidates, their scores, rules over them, training, scores.

    Without scorers among the rules there is no step `scores`; `rules.makes=rows` ends in `sft`. With rounds.num=2 and
    more, the model of each round answers in the next one. Where candidates are scored by `implicit_reward` and no model
    is named for it, STIC's preferences train one first: it answers, its reward against the base is the score, and what
    is learnt from that is `dpo_2`. Raises ConfigError for a rule about a score that nothing gives.
    """
    given = {name.rpartition(":")[2] for name in config.scores.scorers}
    if missing := [name for name, _ in config.rules.scorers if name not in given]:
        raise ConfigError(
            f"rules.scorers names {', '.join(missing)}, and scores.scorers gives {', '.join(sorted(given))}; "
            "name it there, too."
        )
    named = config.scores.model or config.scores.reference
    without_specialists(config)
    if config.rounds.num > 1 and config.dpo.pairs:
        raise ConfigError("dpo.pairs are the same in every round; leave it out, or set rounds.num=1.")
    if "implicit_reward" not in given or not config.rules.scorers or named:
        return in_rounds(config, partial(_choose_and_train, config))
    if config.rounds.num > 1:
        raise ConfigError(
            "Scorer implicit_reward has a model trained first, and goes through one round; name one with scores.model, "
            "or set rounds.num=1."
        )
    start = {"model": "dpo"}
    *chosen, trained = _choose_and_train(config, 1, start)
    second = replace(
        trained, name="dpo_2" if trained.name == "dpo" else trained.name, inputs={**trained.inputs, **start}
    )
    return (
        Step(POOL),
        Step(PREFERENCES, inputs={"index": "pool"}),
        Step(DPO, inputs={"pairs": "preferences"}),
        *chosen,
        second,
        Step(EVALUATION, inputs={model: model for model in config.evaluation.models if model != BASE}),
    )


def _choose_and_train(config: RunConfig, number: int, model: dict[str, str]) -> tuple[Step, ...]:
    """Return a round: candidates of a model, their scores, what the rules take, and a training on that."""
    names = {name: in_round(name, number) for name in ("candidates", "scores", "pairs", "dpo", "sft")}
    answers = {"index": "pool", "candidates": names["candidates"]}
    scores = [Step(SCORES, names["scores"], {**answers, **model})] if config.rules.scorers else []
    scored = {**answers, "scores": names["scores"]} if scores else answers
    pairs = RunDir.of(config.dpo.pairs).uri if config.dpo.pairs else names["pairs"]
    start = model if config.rounds.restart == "previous" else {}
    learns = {
        "pairs": Step(DPO, names["dpo"], {"pairs": pairs, **start}),
        "rows": Step(SFT_ON_IMAGES, names["sft"], {"rows": names["pairs"], **start}),
    }
    return (
        Step(CANDIDATES, names["candidates"], {"index": "pool", **model}),
        *scores,
        Step(pairs_stage(config.rules), names["pairs"], scored),
        learns[config.rules.makes],
    )


def verified() -> Recipe:
    """Learn from the best of several answers against the worst, as the model itself can tell: the toy world, minutes.

    Eight step-by-step candidates an image at temperature 0.7, each scored by its statements, which the model confirms
    or denies one by one, and by its agreement with the others; the ranks of both decide, and DPO goes through the pairs
    twice (docs/results/verified.md). `rules.pairing=random` is the control with the same candidates. recipes/ has
    settings of papers on these steps.

    With a model of yours on GPUs: set what `any_model` sets but infusion.source; candidates.max_new_tokens=512 and
    candidates.allow_truncated=false, a learning rate and an alpha as in `llava16_7b`, and actors.batch_tokens.
    Where candidates agree too much to differ, raise candidates.temperature; where the model's own judgement is
    weak, name a better one: scores.model, or scorers image_text or column.
    """
    config = demo().config
    scorers = ("claims", "consistency")
    changed = {
        "name": "verified",
        "candidates": CandidatesConfig(max_new_tokens=64, allow_truncated=True),
        "scores": ScoresConfig(scorers=scorers, claims="confirmed_minus_denied", max_claims=16, max_split_tokens=192),
        "rules": RulesConfig(scorers=tuple((name, 1.0) for name in scorers), combine="rank"),
        "dpo": config.dpo.model_copy(update={"num_epochs": 2}),
        "evaluation": config.evaluation.model_copy(update={"models": ("base", "dpo")}),
    }
    return Recipe(config.model_copy(update=changed), choose_among_candidates)


def with_own_questions(config: RunConfig) -> tuple[Step, ...]:
    """Return the steps of fine-tuning on questions that the model asked and answered itself."""
    once(config)
    return (
        Step(POOL),
        Step(QUESTIONS_STAGE, inputs={"index": "pool"}),
        Step(SFT_ON_IMAGES, inputs={"rows": "questions"}),
        Step(EVALUATION, inputs={model: model for model in config.evaluation.models if model != BASE}),
    )


def preferences_alone(config: RunConfig) -> tuple[Step, ...]:
    """Return the steps of DPO without instruction data behind it: pairs, training, scores."""
    named = ("pool", "preferences", "dpo", "evaluation")
    return tuple(step for step in stic(config) if step.name in named)


def image_contrast() -> Recipe:
    """Train the toy world's model by mDPO: the chosen answer is to be likelier with its image than with a crop of it.

    The pairs are STIC's; the crops, of a tenth of the picture's area, are made while training. Minutes on 2 CPU cores,
    about 1.8 times those of plain DPO. docs/training.md has S-VCO's and POVID's settings.
    """
    config = demo().config
    terms = {"conditional_weight": 1.0, "anchor_weight": 1.0, "rejected_image": "crop"}
    evaluation = config.evaluation.model_copy(update={"models": ("base", "dpo"), "modes": ("direct",)})
    changed = {"name": "image_contrast", "dpo": config.dpo.model_copy(update=terms), "evaluation": evaluation}
    return Recipe(config.model_copy(update=changed), preferences_alone)


def self_questions() -> Recipe:
    """Fine-tune the toy world's model on its own questions and majority answers (V-Zero, VisPlay, without their RL).

    No instruction data is needed. On a model of yours, set what `any_model` sets but infusion.source.
    """
    config = demo().config
    evaluation = config.evaluation.model_copy(update={"models": ("base", "sft")})
    questions = QuestionsConfig(num_questions=2, num_answers=8, max_question_tokens=48, max_new_tokens=24)
    changed = {"name": "self_questions", "questions": questions, "evaluation": evaluation}
    return Recipe(config.model_copy(update=changed), with_own_questions)


def vila2() -> Recipe:
    """Caption the toy world's pictures anew in two rounds, and train the base model on both captions each time (VILA²).

    The pictures come with captions that leave objects out. Each round writes its own beside those of half of the
    pictures, with the model of the round before. Controls: corpus.template=original (the same steps on the old
    captions) or recaption, captions.prompts=plain (briefer ones), corpus.shuffle=true (of other pictures). Minutes on
    2 CPU cores; rounds.stop_metric="toy_describe object_f1" ends the rounds once they bring nothing, and
    sft.mix={corpus: 3, infusion: 1} trains on instruction data, too.

    With a model of yours on GPUs: set what `any_model` sets (infusion.source with sft.mix only), pool.caption_column or
    pool.caption_member, captions.max_new_tokens=512 and captions.allow_truncated=false, and rounds.num=3.
    """
    config = demo().config
    changed = {
        "name": "vila2",
        "pool": config.pool.model_copy(update={"caption_member": "txt"}),
        "captions": CaptionsConfig(max_new_tokens=64, allow_truncated=True),
        "rounds": RoundsConfig(num=2, image_share=0.5),
        "evaluation": config.evaluation.model_copy(update={"models": ("base", "sft"), "modes": ("direct",)}),
    }
    return Recipe(config.model_copy(update=changed), recaption_and_retrain)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "any_model": any_model,
    "llava16_7b": llava16_7b,
    "verified": verified,
    "self_questions": self_questions,
    "image_contrast": image_contrast,
    "vila2": vila2,
}


def recipe(name: str) -> Recipe:
    """Return a recipe. Raises ConfigError naming the valid ones."""
    if name not in RECIPES:
        raise ConfigError(f"Unknown recipe '{name}'.{nearest(name, RECIPES)} Valid: {', '.join(RECIPES)}.")
    return RECIPES[name]()
