"""Settings of the estimate: what a run is reckoned with before it is made. They change nothing that is computed."""

from typing import Annotated

from pydantic import Field, field_validator

from stic_ray.core.devices import find_device
from stic_ray.core.section import Count, NotNegative, Positive, Section

ReachedShare = Annotated[float, Field(gt=0.0, le=1.0)]


class EstimateConfig(Section):
    """What `--dry-run` and the report reckon with (docs/operations.md)."""

    device: str = "H100"
    """GPU that actors and workers hold, by a name of core/devices.py."""
    price_per_gpu_hour: Annotated[float, Field(ge=0.0)] | None = None
    """Money for a GPU and its share of the machine; no money is told when unset."""
    training_price_per_gpu_hour: Annotated[float, Field(ge=0.0)] | None = None
    """The same for `dpo` and `sft`, which run on demand where the rest runs on spot machines; the same when unset."""
    rates_of: str | None = None
    """A finished run, a small pilot for one, whose measured rates are used; this run's own when unset."""
    num_images: Count | None = None
    """Images of the source, where neither the configuration nor a finished stage says."""
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
    compute_share: ReachedShare = 0.4
    """Share of the device's peak FLOP/s that reading prompts and training reach."""
    bandwidth_share: ReachedShare = 0.6
    """Share of its memory bandwidth that writing answers reaches."""

    @field_validator("device")
    @classmethod
    def _known(cls, name: str) -> str:
        if find_device(name) is None:
            raise ValueError("no such device in core/devices.py; known are H100, H200, A100 80GB, L40S, A10G, L4, ...")
        return name
