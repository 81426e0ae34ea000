"""The configuration of a run: frozen, complete, every key known.

A section says *what* is computed and belongs to the identity of the stages that read it, except those of MAY_CHANGE:
`actors`, `workers` and `cluster` say *with what* it is computed, `estimate` what that is expected to cost.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stic_ray.core.cost import EstimateConfig
from stic_ray.core.resources import ActorsConfig, ClusterConfig, WorkersConfig
from stic_ray.core.section import Count, NotNegative, Positive, Section, Share

ScoredModel = Literal["base", "dpo", "sft"]
AnswerMode = Literal["direct", "describe_and_respond"]
Part = Literal["vision_tower", "projector", "language_model"]
ONLY_LANGUAGE: frozenset[Part] = frozenset({"language_model"})
Temperature = Annotated[float, Field(ge=0.0, le=5.0)]

MAY_CHANGE = ("actors", "workers", "cluster", "estimate")
"""Sections that may change between two invocations of the same run."""

TOYWORLD = "toyworld"
"""Value of a source or a model path that stands for the pictures, data and model made on the spot."""


def is_toy(source: str) -> bool:
    """Return whether a source is `toyworld`, or one of its parts as `toyworld:NAME`."""
    return source.split(":")[0] == TOYWORLD


class ModelConfig(Section):
    """The vision-language model that the run starts from."""

    path: str = TOYWORLD
    """Directory or hub id that transformers loads; for the fake engine, its YAML script."""
    revision: str | None = None
    """Revision of a hub id."""
    adapter: str | None = None
    """PEFT adapter on top of `path` that the run starts from: a folder or URI, as a training stage leaves it."""
    engine: Literal["transformers", "vllm", "fake"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations; auto is bfloat16 on a GPU and float32 on a CPU."""
    chat_template: str | None = None
    """Jinja chat template, or a file with one, for a model that has none."""
    trust_remote_code: bool = False


class PoolConfig(Section):
    """Which images are taken, and how the pool is cut."""

    source: Annotated[str, Field(min_length=1)] = TOYWORLD
    """Folder (searched recursively; images, Parquet and tar files in any mixture), one such file, a .txt list of paths
    or URIs, or a folder that `datasets` saved; local, s3:// or gs://."""
    image_column: str = "image"
    """Column of Parquet and Arrow files: bytes, a path or URI, or a struct with `bytes` or `path`."""
    copy_compressed: bool = False
    """Copy images of compressed tables into the run while they are indexed: later each is read by itself and not with
    its row group, for the pool's bytes once more."""
    shard_size: Count = 256
    """Images per shard, the unit of work and of loss."""
    min_side_px: Count = 8
    max_image_pixels: Count = 100_000_000
    """Larger images are rejected from their header, before anything is decoded."""
    max_aspect_ratio: Annotated[float, Field(ge=1.0)] = 20.0
    near_duplicate_bits: Annotated[int, Field(ge=0, le=6)] | None = None
    """Reject an image whose 64-bit perceptual hash differs in at most so many bits from that of an image earlier in
    the order; 4 is a usual value. When unset, only equal bytes are duplicates."""


class PreferencesConfig(Section):
    """How preference pairs are made (STIC section 4.1, Algorithm 1)."""

    num_images: Count | None = None
    """Use the first so many images of the pool's order; all of them when unset."""
    hallucination_share: Share = 0.5
    """Probability of a hallucination prompt on the clean image; else a plain prompt on a corrupted image."""
    low_resolution_share: Share = 0.5
    """Probability that a corruption is low resolution; else colour jitter."""
    low_resolution_px: Count = 20
    """Shorter side after the low-resolution corruption."""
    jitter_brightness: Share = 0.5
    """Brightness factor is drawn from [1 - x, 1 + x]."""
    jitter_hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.3
    """Hue shift is drawn from [-x, x], in turns of the colour wheel."""
    temperature: Temperature = 0.2
    """0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_new_tokens: Count = 1024
    allow_truncated: bool = False
    """Keep pairs with an answer that was cut off at `max_new_tokens`."""
    reference_logps: bool = False
    """Store the log-probabilities of both answers under the model that gave them: training then needs no pass of its
    reference model, which pays where pairs are trained on more than once."""


class TuningConfig(Section):
    """Which weights `dpo` and `sft` train."""

    method: Literal["lora", "qlora", "full"] = "lora"
    """An adapter, an adapter on weights that are held in 4 bits (extra stic-ray[qlora]), or the weights themselves."""
    lora_rank: Count = 128
    lora_alpha: Count = 256
    lora_dropout: Share = 0.05
    freeze: tuple[Part, ...] | None = None
    """Parts that stay as they are; an adapter has matrices in all linear layers of the others. When unset: the vision
    tower, and with an adapter the projector too, unless it has a learning rate of its own."""
    projector_learning_rate: Positive | None = None
    """Train the projector whole, beside an adapter too, with this learning rate of its own."""

    @property
    def trained(self) -> frozenset[Part]:
        """The parts that are trained."""
        return frozenset(get_args(Part)) - self.frozen

    @property
    def frozen(self) -> frozenset[Part]:
        """The parts that stay as they are."""
        if self.freeze is not None:
            return frozenset(self.freeze)
        keeps_projector = self.method != "full" and self.projector_learning_rate is None
        return frozenset({"vision_tower", "projector"} if keeps_projector else {"vision_tower"})

    @model_validator(mode="after")
    def _something_is_trained(self) -> "TuningConfig":
        if not self.trained:
            raise ValueError("freeze names all parts of the model and leaves nothing to train")
        if self.projector_learning_rate is not None and "projector" in self.frozen:
            raise ValueError("freeze names the projector, and projector_learning_rate trains it: leave one of them out")
        return self


class OptimisationConfig(Section):
    """What `dpo` and `sft` share: AdamW, warm-up, and a schedule behind it."""

    learning_rate: Positive
    num_epochs: Count = 1
    """Passes over the rows; unused where `num_steps` is set."""
    num_steps: Count | None = None
    """Stop after so many optimiser steps, repeating the rows as needed; `num_epochs` passes when unset."""
    global_batch: Count
    """Rows per optimiser step, over all workers and accumulation steps."""
    warmup_share: Share = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    """How the learning rate goes on behind the warm-up; cosine and linear end at 0."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Positive = 1.0
    max_length_tokens: Count = 4096
    """Image, prompt and answer together; longer rows are rejected when they are written, never cut."""
    num_held_out: NotNegative = 64
    """Rows that are not trained on but evaluated along the way: the first so many of those with 1 in 16 hashes of the
    id, so a pool that has grown holds out the same, and a small one at most about a sixteenth."""


class DPOConfig(OptimisationConfig):
    """Regularised DPO (STIC Algorithm 1), and its controls."""

    learning_rate: Positive = 1e-7
    global_batch: Count = 8
    objective: Literal["paper", "released_code", "sft"] = "paper"
    """`sft` is the control without dispreferred answers: likelihood of the preferred ones, mean over tokens."""
    beta: Positive = 0.1
    """Strength of the pull to the reference model; lambda in the paper. Unused by `objective=sft`."""
    alpha: Annotated[float, Field(ge=0.0)] = 1 / 1024
    """Weight of the summed log-probability of the preferred answer. Unused by `objective=sft`."""
    pairs: str | None = None
    """Folder with the pairs of another run, its `preferences`; this run's own when unset."""
    num_images: Count | None = None
    """Train on the pairs of the first so many images of the pool's order; all of them when unset."""
    image: Literal["own", "blank", "shuffled"] = "own"
    """`blank` (uniform grey of the same size) and `shuffled` (another pair's picture) are controls."""


class InfusionConfig(Section):
    """Instruction data, and how it is described by the model that `sft` starts from (STIC Algorithm 2)."""

    source: str = TOYWORLD
    """JSON file in the LLaVA format, or Parquet with the same columns."""
    images: str | None = None
    """Folder that the image paths are relative to; the folder of `source` when unset."""
    num_rows: Count | None = None
    """Take a seeded sample of so many rows; all of them when unset."""
    describe: bool = True
    """false is a control: the questions stay as they are, without a description."""
    temperature: Temperature = 0.2
    max_new_tokens: Count = 1024
    allow_truncated: bool = False


class SFTConfig(OptimisationConfig):
    """Likelihood fine-tuning on the infused rows."""

    start: Literal["dpo", "base"] = "dpo"
    """Which model it goes on from; the same one describes the images of the rows."""

    learning_rate: Positive = 2e-5
    global_batch: Count = 32


class EvaluationConfig(Section):
    """Benchmarks, answered directly and by describe-and-respond, greedily."""

    benchmarks: Annotated[tuple[str, ...], Field(min_length=1)] = (TOYWORLD,)
    """JSONL or Parquet files in the format of docs/evaluation.md; `toyworld` is all of the toy world's, `toyworld:NAME`
    one of them."""
    models: Annotated[tuple[ScoredModel, ...], Field(min_length=1)] = ("base", "dpo", "sft")
    """Which models are scored; differences are to `base`, and unknown without it."""
    modes: Annotated[tuple[AnswerMode, ...], Field(min_length=1)] = get_args(AnswerMode)
    """How they are asked; describing every image first is most of the work."""
    max_answer_tokens: Count = 128
    max_description_tokens: Count = 1024
    num_resamples: Count = 2000
    """Bootstrap resamples behind each interval."""
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95

    @field_validator("models", "modes")
    @classmethod
    def _each_once_in_order(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Order changes no score, so it must not make another run either."""
        if len(set(names)) < len(names):
            raise ValueError(f"name each of the {info.field_name} once")
        known = ScoredModel if info.field_name == "models" else AnswerMode
        return tuple(name for name in get_args(known) if name in names)


class ToyworldConfig(Section):
    """What is made on the spot where a source is `toyworld`."""

    num_pictures: Count = 1000
    """Unlabeled pictures of the pool."""
    num_instructions: Count = 250
    """Rows of instruction data."""
    num_scenes: Count = 200
    """Questions of each benchmark."""
    split: Literal["test", "tuning"] = "test"
    """Which held-out scenes the benchmarks ask about: settings are chosen on `tuning`, results are told on `test`."""


class RunConfig(Section):
    """A whole run."""

    name: str
    seed: NotNegative = 0
    prompts: str | None = None
    """YAML file with a prompt set; when unset the built-in set, or the toy world's own with its model."""
    model: ModelConfig = ModelConfig()
    pool: PoolConfig = PoolConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    tuning: TuningConfig = TuningConfig()
    dpo: DPOConfig = DPOConfig()
    infusion: InfusionConfig = InfusionConfig()
    sft: SFTConfig = SFTConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    toyworld: ToyworldConfig = ToyworldConfig()
    actors: ActorsConfig = ActorsConfig()
    workers: WorkersConfig = WorkersConfig()
    cluster: ClusterConfig = ClusterConfig()
    estimate: EstimateConfig = EstimateConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> "RunConfig":
        tuning = self.tuning
        if tuning.method == "qlora" and self.workers.zero_stage == 3:
            raise ValueError(
                "tuning.method=qlora cannot be trained with workers.zero_stage=3, which does not cut weights of 4 bits "
                "over workers; use zero_stage=2"
            )
        own_rate = tuning.projector_learning_rate is not None
        if self.model.engine == "vllm" and tuning.method != "full" and (own_rate or tuning.trained != ONLY_LANGUAGE):
            raise ValueError(
                "model.engine=vllm applies adapters to the language model alone, and these tuning settings train "
                f"{' and '.join(sorted(tuning.trained))}; use model.engine=transformers or tuning.method=full"
            )
        return self


def sources_of(stage: str, config: RunConfig) -> tuple[str, ...]:
    """Return the sources from outside the run that a stage reads."""
    sources = {
        "pool": (config.pool.source,),
        "dpo": (config.dpo.pairs,) if config.dpo.pairs else (),
        "infusion": (config.infusion.source,),
        "evaluation": config.evaluation.benchmarks,
    }
    return sources.get(stage, ())
