"""How much a step has to do, whatever the speed: rows, tokens, operations, bytes that it leaves."""

from dataclasses import dataclass

from stic_ray.core.config import RunConfig
from stic_ray.core.training import OptimisationConfig

BYTES_PER_WEIGHT = 2
"""bfloat16."""
BYTES_PER_TEXT_TOKEN = 4
"""English; what an answer takes in a table."""
SHORT_ANSWER_TOKENS = 16
"""Answer to a question of a benchmark or of instruction data."""
NUM_UNITS = "num_units"
"""Account of a manifest: what the step did in rows as `Work` counts them, where these are not its rows in."""
NUM_ROWS_OUT = "num_rows_out"
"""Account of a manifest: rows that the step left, rejected and failed ones too, where these are not its rows in."""
_LORA_SHARE_PER_RANK = 335.5e6 / 128 / 7.25e9
"""Adapter parameters per parameter and rank: all linear layers of Mistral-7B's language model."""


@dataclass(frozen=True)
class ModelSize:
    """What the costs of a model depend on."""

    num_parameters: float
    num_image_tokens: int
    """Positions that an image takes in the prompt."""
    cache_bytes_per_token: float
    """Keys and values of one token over all layers."""

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights in memory."""
        return self.num_parameters * BYTES_PER_WEIGHT


@dataclass(frozen=True)
class Work:
    """What a stage does, whatever the speed."""

    num_rows: float
    """Images, instruction rows, or questions times models; trained on as often as there are epochs."""
    requests: tuple[tuple[float, float, float], ...] = ()
    """For a row: how many, and of each the tokens that are read and written."""
    row_tokens: float = 0.0
    row_flops: float = 0.0
    """Training only."""
    storage_bytes: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """What is known of the run's parts."""

    model: ModelSize
    num_images: float | None
    """Of the pool; for a training the rows that it is given."""
    num_instructions: float | None
    num_questions: float | None
    num_prompt_tokens: float
    """Image and text."""
    num_answer_tokens: float
    image_bytes: float


def images_used(config: RunConfig, sizes: Sizes, limit: int | None) -> float | None:
    """Return how many images a step asks about: the share that a round draws of the first `limit` (of all when None).

    None where that is not known.
    """
    known = [number for number in (sizes.num_images, limit) if number]
    return min(known) * config.rounds.image_share if known else None


def training_flops(
    num_parameters: float, num_tokens: float, *, full: bool, checkpointing: bool, reference_pass: bool
) -> float:
    """Return the operations of training on so many tokens.

    Per parameter and token: forward 2, backward through activations 2; `full` fine-tuning 2 for the gradients of the
    weights, which LoRA has of its small matrices only; `checkpointing` 2 for a second forward pass; `reference_pass` 2
    for the reference model of DPO. Full fine-tuning alone is the 6ND of Kaplan et al. (2020).
    """
    passes = 2 + full + checkpointing + reference_pass
    return 2.0 * passes * num_parameters * num_tokens


def pair_tokens(num_prompt_tokens: float, num_answer_tokens: float, *, shared_prefix: bool) -> float:
    """Return the tokens of a preference pair as it is trained on: the prompt once, or once for each answer."""
    return (1 if shared_prefix else 2) * num_prompt_tokens + 2 * num_answer_tokens


def training_work(
    config: RunConfig,
    sizes: Sizes,
    stage: OptimisationConfig,
    num_rows: float,
    row_tokens: float,
    *,
    reference_pass: bool,
) -> Work:
    """Return the work of training on so many rows of so many tokens."""
    full, num_parameters = config.tuning.method == "full", sizes.model.num_parameters
    flops = training_flops(
        num_parameters,
        row_tokens,
        full=full,
        checkpointing=config.workers.gradient_checkpointing,
        reference_pass=reference_pass,
    )
    adapter_bytes = 4 * config.tuning.lora_rank * _LORA_SHARE_PER_RANK * num_parameters
    trained = stage.num_steps * stage.global_batch if stage.num_steps else stage.num_epochs * num_rows
    left = sizes.model.weight_bytes if full else adapter_bytes
    return Work(trained, row_tokens=row_tokens, row_flops=flops, storage_bytes=left)
