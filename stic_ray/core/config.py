"""The configuration of a run: frozen, complete, every key known.

A section says *what* is computed and belongs to the identity of the stages that read it, except those of MAY_CHANGE:
`actors`, `workers` and `cluster` say *with what* it is computed, `estimate` what that is expected to cost.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from stic_ray.core.preferences import PreferencesConfig
from stic_ray.core.resources import ActorsConfig, ClusterConfig, EstimateConfig, WorkersConfig
from stic_ray.core.rounds import CaptionsConfig, CorpusConfig, RoundsConfig
from stic_ray.core.section import Count, NotNegative, Section, Temperature
from stic_ray.core.training import ONLY_LANGUAGE, DPOConfig, SFTConfig, TuningConfig
from stic_ray.core.verification import CandidatesConfig, QuestionsConfig, RulesConfig, ScoresConfig

AnswerMode = Literal["direct", "describe_and_respond"]

MAY_CHANGE = ("actors", "workers", "cluster", "estimate")
"""Sections that may change between two invocations of the same run."""

ANSWER_SETTINGS = ("actors.merge_adapter", "actors.max_length_tokens")
"""Settings of the actors that may change an answer: they belong to what was made with them."""
CAPTION_MEMBER = re.compile(r"(?P<ending>txt|text|caption)|json:(?P<key>.+)", re.DOTALL)
"""What pool.caption_member may be."""
DRAWN = ("pool.shard_size", "rounds.image_share")
"""Settings that say which images a step asks about, and in what shards."""
IMAGE_SETTINGS = ("pool.shard_size", "pool.min_side_px", "pool.max_image_pixels", "pool.max_aspect_ratio")
"""Settings of the pool that also hold for images of instruction data and benchmarks."""

TOYWORLD = "toyworld"
"""Value of a source or a model path that stands for the pictures, data and model made on the spot."""
TOY_SETTINGS = {
    "pool.source": ("toyworld.num_pictures",),
    "infusion.source": ("toyworld.num_instructions",),
    "evaluation.benchmarks": ("toyworld.num_scenes", "toyworld.split"),
}
"""Fields that may name the toy world, and the settings that say what is made of it there."""
MISSING = "???"
"""Stands in a recipe where its user must say what to read."""


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
    """Column of Parquet and Arrow files: bytes, a path or URI, or a struct with `bytes` or `path`; or a list of one."""
    caption_column: str | None = None
    """Column of Parquet and Arrow files with the caption that the source gives each image, as text."""
    caption_member: str | None = None
    """Where tars and folders have an image's caption, beside it and under its name: `txt`, `text` or `caption` is the
    ending of a text file or member, `json:KEY` a key of the .json one."""
    captions: Literal["required", "optional"] = "required"
    """What becomes of an image without a caption where a caption source is named: a rejected row, or an image with
    null."""
    allow_outside: bool = False
    """Take images that addresses in tables name outside of the source, too: any path or bucket that can be read."""
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

    @model_validator(mode="after")
    def _captions_have_a_source(self) -> "PoolConfig":
        member = self.caption_member
        if member is not None and not CAPTION_MEMBER.fullmatch(member):
            raise ValueError(
                f"pool.caption_member={member} is no place of a caption; it is txt, text or caption (the ending of a "
                "file or member beside the image), or json:KEY (a key of the .json one), such as json:caption"
            )
        if self.caption_column == self.image_column:
            raise ValueError(
                f"pool.caption_column={self.caption_column} is the column of the images; name the one with text, or "
                "leave it out"
            )
        if self.captions == "optional" and not self.has_captions:
            raise ValueError(
                "pool.captions=optional needs to know where captions are: set pool.caption_column (tables) or "
                "pool.caption_member (tars, folders), or leave it out"
            )
        return self

    @property
    def has_captions(self) -> bool:
        """Whether a source of captions is named."""
        return self.caption_column is not None or self.caption_member is not None


class InfusionConfig(Section):
    """Instruction data, and how it is described by the model that `sft` starts from (STIC Algorithm 2)."""

    source: str = TOYWORLD
    """A JSON list or JSON Lines in the LLaVA format, or Parquet with the same columns."""
    images: str | None = None
    """Folder that the image paths are relative to; the folder of `source` when unset."""
    num_rows: Count | None = None
    """Take a seeded sample of so many rows; all of them when unset."""
    describe: bool = True
    """false is a control: the questions stay as they are, without a description."""
    prompt: Literal["plain", "describe"] = "plain"
    """What describes: one of the plain prompts, drawn for each row as in Algorithm 2, or the prompt `describe`."""
    temperature: Temperature = 0.2
    max_new_tokens: Count = 1024
    allow_truncated: bool = False


class EvaluationConfig(Section):
    """Benchmarks, answered directly and by describe-and-respond, greedily."""

    benchmarks: Annotated[tuple[str, ...], Field(min_length=1)] = (TOYWORLD,)
    """JSONL or Parquet files in the format of docs/evaluation.md; `toyworld` is all of the toy world's, `toyworld:NAME`
    one of them."""
    models: Annotated[tuple[str, ...], Field(min_length=1)] = ("base", "dpo", "sft")
    """Which models are scored: `base`, and the steps that leave one. Differences are to `base`, unknown without it."""
    modes: Annotated[tuple[AnswerMode, ...], Field(min_length=1)] = get_args(AnswerMode)
    """How they are asked; describing every image first is most of the work."""
    max_answer_tokens: Count = 128
    max_description_tokens: Count = 1024
    num_resamples: Count = 2000
    """Bootstrap resamples behind each interval."""
    confidence: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95

    @field_validator("models", "modes")
    @classmethod
    def _each_once_in_order(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Order changes no score, so it must not make another run either."""
        if len(set(names)) < len(names):
            raise ValueError("name each of them once")
        first = ("base", "direct")
        return tuple(sorted(names, key=lambda name: (name not in first, name)))


class ToyworldConfig(Section):
    """What is made on the spot where a source is `toyworld`."""

    num_pictures: Count = 1000
    """Unlabeled pictures of the pool."""
    num_instructions: Count = 250
    """Rows of instruction data."""
    num_scenes: Count = 200
    """Questions of each benchmark."""
    split: Literal["test", "tuning"] = "test"
    """Which held-out scenes the benchmarks ask about: `tuning` to choose settings, `test` for results."""


class RunConfig(Section):
    """A whole run."""

    name: str
    seed: NotNegative = 0
    prompts: str | None = None
    """YAML file with a prompt set; when unset the built-in set, or the toy world's own with its model."""
    model: ModelConfig = ModelConfig()
    pool: PoolConfig = PoolConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    candidates: CandidatesConfig = CandidatesConfig()
    scores: ScoresConfig = ScoresConfig()
    rules: RulesConfig = RulesConfig()
    questions: QuestionsConfig = QuestionsConfig()
    captions: CaptionsConfig = CaptionsConfig()
    corpus: CorpusConfig = CorpusConfig()
    rounds: RoundsConfig = RoundsConfig()
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
        passes = [name for name in ("conditional", "symmetric") if name in self.dpo.image_terms]
        workers = self.workers
        if passes and tuning.method != "full" and workers.zero_stage == 3 and workers.gradient_checkpointing:
            raise ValueError(
                f"dpo.{passes[0]}_weight learns from two passes in a step, whose gradients DeepSpeed cannot add up for "
                "an adapter with workers.zero_stage=3 and gradient_checkpointing=true; use zero_stage=2, or no "
                "checkpointing"
            )
        own_rate = tuning.projector_learning_rate is not None
        if self.model.engine == "vllm" and tuning.method != "full" and (own_rate or tuning.trained != ONLY_LANGUAGE):
            raise ValueError(
                "model.engine=vllm applies adapters to the language model alone, and these tuning settings train "
                f"{' and '.join(sorted(tuning.trained))}; use model.engine=transformers or tuning.method=full"
            )
        if self.model.engine == "vllm" and self.actors.merge_adapter:
            raise ValueError("model.engine=vllm applies adapters unmerged; leave out actors.merge_adapter=true")
        return self

    def flat(self) -> dict[str, Any]:
        """Return all settings as "section.field" -> value in JSON's own types."""
        flat: dict[str, Any] = {}
        for key, value in self.model_dump(mode="json").items():
            flat |= (
                {f"{key}.{field}": inner for field, inner in value.items()} if isinstance(value, dict) else {key: value}
            )
        return flat

    def identifying(self) -> dict[str, Any]:
        """Return `flat`, of files with prompts and templates a hash of their text: that counts, not where it is."""
        flat = self.flat()
        for key in ("prompts", "model.chat_template"):
            if flat[key] and os.path.isfile(flat[key]):
                flat[key] = hashlib.blake2b(Path(flat[key]).read_bytes(), digest_size=8).hexdigest()
        return flat

    def sources(self, name: str) -> tuple[str, ...]:
        """Return the sources that a field names, one or several; none when it is unset."""
        section, field = name.split(".")
        value = getattr(getattr(self, section), field)
        return (value,) if isinstance(value, str) else tuple(value or ())

    def toy_settings(self, name: str) -> tuple[str, ...]:
        """Return the settings of the toy world that decide what is read where a field names it."""
        return TOY_SETTINGS.get(name, ()) if any(map(is_toy, self.sources(name))) else ()
