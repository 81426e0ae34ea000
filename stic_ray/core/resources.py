"""With what a run is computed, the processes that generate and those that train, and what that is expected to cost.

No result depends on it but for ANSWER_SETTINGS of core/config.py and the rounding of sums.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from stic_ray.core.devices import find_device
from stic_ray.core.errors import ConfigError
from stic_ray.core.section import Count, NotNegative, Positive, Section

_SELECTED = re.compile(r"!?(in\([\w.-]+(, ?[\w.-]+)*\)|[\w.-]+)")


def _pairs_of(labels: Any) -> Any:
    """Return a mapping of labels, or one as "key=value", as pairs, which nobody can change; the rest is pydantic's."""
    if isinstance(labels, str):
        key, separator, value = labels.partition("=")
        if not separator:
            raise ValueError("write labels as {key: value}, or one of them as key=value")
        labels = {key.strip(): value.strip()}
    if not isinstance(labels, dict):
        return labels
    for key, value in labels.items():
        if not isinstance(value, str) or not _SELECTED.fullmatch(value):
            raise ValueError(f"{key}={value} is none of: value, !value, in(value, value), !in(value, value)")
    return tuple(labels.items())


LabelSelector = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_pairs_of), PlainSerializer(dict)]
"""Labels that a node must have, in Ray's syntax: {group: generation} or {ray.io/market-type: "!spot"}."""


class ActorsConfig(Section):
    """Processes that own a model and generate."""

    num_actors: Count = 1
    """At most so many at once."""
    min_actors: Count | None = None
    """Begin with so many and add others as machines come; `num_actors` when unset."""
    num_cpus: Annotated[float, Field(ge=0.0)] = 1.0
    """CPUs per actor."""
    num_gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs per actor; the vllm engine cuts a model over two or more (tensor parallelism)."""
    label_selector: LabelSelector = ()
    """Nodes that actors may be on; any when empty."""
    gpu_memory_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of an actor's GPU that the vllm engine takes at its start, for weights and cached tokens."""
    max_length_tokens: Count | None = None
    """Image, question and answer together in the vllm engine; the model's own limit when unset."""
    batch_size: Count = 16
    """Requests per forward pass, halved by an actor that runs out of memory; and images per window, the part of a
    shard that is decoded at a time."""
    batch_tokens: Count | None = None
    """Tokens per forward pass: requests times the longest of them, image, padding and the answer's limit included.
    The vllm engine plans its batches itself and has no use for it."""
    merge_adapter: bool = False
    """Merge adapters into the weights before generating: faster, but in bfloat16 small updates are rounded away."""
    windows_in_flight: Count = 2
    """Windows that an actor works on at once: one is decoded while another is answered. An engine that batches
    continuously is kept full by more of them."""
    timeout_s: Positive | None = None
    """Seconds that the answers of a window may take before the actor counts as hanging and is ended; no limit when
    unset."""
    max_retries: Count = 2
    """Deaths of an actor over the same window until its images are tried one by one, and over the same image alone
    until that one is rejected."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "ActorsConfig":
        if self.min_actors is not None and self.min_actors > self.num_actors:
            raise ValueError(f"min_actors={self.min_actors} is more than num_actors={self.num_actors}")
        return self


class WorkersConfig(Section):
    """Processes that train together."""

    num_workers: Count = 1
    num_cpus: Annotated[float, Field(ge=0.0)] = 1.0
    """CPUs per worker."""
    num_gpus: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """GPUs per worker: 1, or a share of one where a single worker trains."""
    accelerator_type: str | None = None
    """Ray's name of the GPU that workers must have, as H100 or A100-80G; any when unset."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Workers on as few nodes as possible or on as many; the strict ones wait until it can be done."""
    label_selector: LabelSelector = ()
    """Nodes that workers may be on; any when empty."""
    micro_batch: Count = 1
    """Rows per worker and forward pass; gradient accumulation follows from the global batch."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage; 0 is plain data parallelism without DeepSpeed."""
    offload_optimizer: bool = False
    """Keep optimiser state, and do its work, in the main memory of the CPUs; needs `zero_stage` of 1 or more."""
    offload_parameters: bool = False
    """Keep the weights in main memory and fetch those of a layer when it is their turn; needs `zero_stage=3`."""
    gradient_checkpointing: bool = False
    """Compute activations a second time for the backward pass instead of keeping them."""
    offload_activations: bool = False
    """Keep what the backward pass needs in main memory; GPUs only."""
    share_prefix: bool = True
    """Encode image and prompt once for both answers of a pair, where the model family allows it: same loss, sooner."""
    num_loaders: NotNegative | None = None
    """Processes per worker that read, decode and collate ahead of it; when unset 4 with a GPU, and none without."""
    evaluate_every_steps: Count | None = None
    """Optimiser steps between two evaluations on the held-out rows; when unset a quarter of all. The last step always
    has one."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl. TensorBoard's files are in the run; the others are extras."""
    save_every_steps: Count = 200
    keep_checkpoints: Count = 1
    """Of an unfinished training; the last of them is what it goes on from."""
    max_failures: NotNegative = 3
    """How often training restarts from its last checkpoint after losing a worker."""

    @model_validator(mode="after")
    def _fit_together(self) -> "WorkersConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer=true is DeepSpeed's and needs zero_stage=1, 2 or 3, not 0")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters=true needs zero_stage=3, not {self.zero_stage}")
        if self.num_gpus == 0 and (self.offload_activations or self.accelerator_type):
            setting = "offload_activations=true" if self.offload_activations else "accelerator_type"
            raise ValueError(f"{setting} is about GPUs and needs num_gpus=1, not 0")
        if 0 < self.num_gpus < 1 and self.num_workers > 1:
            raise ValueError(
                f"num_workers={self.num_workers} with num_gpus={self.num_gpus:g} would put two workers on one GPU, "
                "which NCCL refuses; use num_gpus=1, or one worker"
            )
        return self


class ClusterConfig(Section):
    """The cluster as a whole."""

    resource_timeout_s: Positive = 1800.0
    """Seconds that a stage waits without a place for any of its processes until it stops; machines that have to be
    started, or another job's, are waited for as long."""
    max_failed_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of a stage's rows that may fail (storage away, credentials expired) for the stage to be done all the same.
    With more, the stage stops in the end, and the same command tries those rows again."""


class EstimateConfig(Section):
    """What `--dry-run` and the report calculate with (docs/operations.md)."""

    device: str = "H100"
    """GPU that actors and workers hold, by a name of core/devices.py."""
    price_per_gpu_hour: Annotated[float, Field(ge=0.0)] | None = None
    """Money for a GPU and its share of the machine; no cost is estimated when unset."""
    training_price_per_gpu_hour: Annotated[float, Field(ge=0.0)] | None = None
    """The same for `dpo` and `sft`, which run on demand where the rest runs on spot machines; the same when unset."""
    rates_of: str | None = None
    """A finished run, a small pilot for one, whose measured rates are used; this run's own when unset."""
    num_images: Count | None = None
    """Images of the source, where neither the configuration nor a finished stage gives the number."""
    num_instructions: NotNegative | None = None
    """Rows of instruction data, likewise."""
    num_questions: NotNegative | None = None
    """Questions of all benchmarks together, likewise."""
    num_parameters: Positive | None = None
    """Of the model, where neither its files nor its name ("7b") say."""
    num_image_tokens: Count | None = None
    """Positions that an image takes, where neither the model's files nor its family say."""
    num_prompt_tokens: Count = 60
    num_answer_tokens: Count = 175
    """Mean length of a description; published ones have 100 to 250 tokens."""
    image_bytes: Count = 162_000
    """Mean size of an encoded image, where no index says; that of STIC's 6,099 COCO photographs when unset."""
    compute_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """Share of the device's peak FLOP/s that reading prompts and training reach."""
    bandwidth_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    """Share of its memory bandwidth that writing answers reaches."""

    @field_validator("device")
    @classmethod
    def _known(cls, name: str) -> str:
        if find_device(name) is None:
            raise ValueError("no such device in core/devices.py; known are H100, H200, A100 80GB, L40S, A10G, L4, ...")
        return name


def accumulation_steps(global_batch: int, workers: WorkersConfig) -> int:
    """Return how many forward passes make one optimiser step.

    Raises ConfigError when that is no whole number; the error names what would fit.
    """
    at_once = workers.num_workers * workers.micro_batch
    if global_batch % at_once:
        lower = global_batch // at_once * at_once
        batches = " or ".join(str(batch) for batch in (lower, lower + at_once) if batch)
        num_workers = _largest_divisor(global_batch, workers.micro_batch, below=workers.num_workers)
        micro_batch = _largest_divisor(global_batch, workers.num_workers, below=workers.micro_batch)
        ways = [f"global_batch={batches}"]
        ways += [f"workers.num_workers={num_workers}"] if num_workers else []
        ways += [f"workers.micro_batch={micro_batch}"] if micro_batch else []
        raise ConfigError(
            f"global_batch={global_batch} is not divisible by workers.num_workers={workers.num_workers} x "
            f"workers.micro_batch={workers.micro_batch} = {at_once}. The nearest that work: {', or '.join(ways)}."
        )
    return global_batch // at_once


def _largest_divisor(global_batch: int, times: int, *, below: int) -> int | None:
    """Return the largest number under `below` that, `times` so many, divides the global batch."""
    return next((number for number in range(below - 1, 0, -1) if global_batch % (number * times) == 0), None)
