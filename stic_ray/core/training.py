"""The sections of the configuration about training: which weights, by which objective, in which steps."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from stic_ray.core.preferences import GradedCorruption
from stic_ray.core.section import Count, NotNegative, Positive, Section, Share, Weights

NotNegativeWeight = Annotated[float, Field(ge=0.0)]
Part = Literal["vision_tower", "projector", "language_model"]
ONLY_LANGUAGE: frozenset[Part] = frozenset({"language_model"})


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
    start_learning_rate: Positive | None = None
    """Go on with the decay of a training that stopped at this rate, without a warm-up: from here to 0 along the rest of
    the curve that begins at `learning_rate`."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Positive = 1.0
    max_length_tokens: Count = 4096
    """Image, prompt and answer together; longer rows are rejected when they are written, never cut."""
    num_held_out: NotNegative = 64
    """Rows that are not trained on but evaluated along the way: the first so many of those with 1 in 16 hashes of the
    id, so a pool that has grown holds out the same, and a small one at most about a sixteenth."""

    @model_validator(mode="after")
    def _decay_can_go_on(self) -> Self:
        rate = self.start_learning_rate
        if rate is None:
            return self
        if self.schedule not in ("cosine", "linear"):
            raise ValueError(
                f"start_learning_rate goes on with a decay to 0, schedule=cosine or linear, not {self.schedule}"
            )
        if rate > self.learning_rate:
            raise ValueError(
                f"start_learning_rate={rate:g} is above learning_rate={self.learning_rate:g}, the rate from which it "
                "has decayed"
            )
        return self


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
    reference: Literal["start", "base"] = "start"
    """What the policy is compared with: the model that training starts from, or the run's model, also where training
    goes on from what an earlier one left. Unused by `objective=sft`."""
    text_weight: NotNegativeWeight = 1.0
    """Weight of the preference between answers, the DPO part; of several rejected answers it is the mean over them."""
    conditional_weight: NotNegativeWeight = 0.0
    """Weight of mDPO's conditional preference: the preferred answer is likelier with its image than with the rejected
    one."""
    anchor_weight: NotNegativeWeight = 0.0
    """Weight of mDPO's anchor: the reward of the preferred answer itself is above `anchor_delta`."""
    anchor_delta: float = 0.0
    symmetric_weight: NotNegativeWeight = 0.0
    """Weight of S-VCO's four terms, for pairs whose rejected answer is true of their rejected image."""
    own_tokens_weight: NotNegativeWeight = 0.0
    """Weight of POVID's preference to the tokens that the model itself finds likeliest with the rejected image."""
    rejected_image: Literal["pair", GradedCorruption] = "pair"
    """The picture that the preferred answer does not fit: the one of the pair, or its image corrupted so, anew in each
    epoch."""
    rejected_image_strength: Share = 0.5
    """Of that corruption: 0 leaves the picture nearly as it was, 1 nearly nothing of it."""
    rejected_image_strength_end: Share | None = None
    """Strength at the last step: it goes there evenly from `rejected_image_strength`; constant when unset."""
    pairs: str | None = None
    """Folder with the pairs of another run, its `preferences`; this run's own when unset."""
    num_images: Count | None = None
    """Train on the pairs of the first so many images of the pool's order; all of them when unset."""
    num_pairs: Count | None = None
    """Train on the first so many of these pairs, and refuse fewer: trainings on different pairs can be compared."""
    order: Literal["shuffled", "pool"] = "shuffled"
    """`pool`: every epoch in the pool's order, for a schedule along it (`preferences.strength_end`)."""
    image: Literal["own", "blank", "shuffled"] = "own"
    """`blank` (uniform grey of the same size) and `shuffled` (another pair's picture) are controls."""

    @property
    def image_terms(self) -> dict[str, float]:
        """Return the weights of the terms that need a rejected image, of those that have one."""
        names = ("conditional", "symmetric", "own_tokens")
        weights = {name: float(getattr(self, f"{name}_weight")) for name in names}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def rejected_image_strengths(self) -> tuple[float, float]:
        """Return the strength of made images at the first and at the last step."""
        begin, end = self.rejected_image_strength, self.rejected_image_strength_end
        return begin, begin if end is None else end

    @model_validator(mode="after")
    def _terms_fit_together(self) -> "DPOConfig":
        terms = [f"{name}_weight" for name in self.image_terms]
        added = [*terms, *(["anchor_weight"] if self.anchor_weight else [])]
        if added and self.objective != "paper":
            raise ValueError(f"{added[0]} adds a term to objective=paper; leave it out with objective={self.objective}")
        if self.text_weight != 1 and self.objective == "sft":
            raise ValueError("text_weight is of the DPO part, which objective=sft does not have; leave it out")
        if terms and self.image != "own":
            raise ValueError(
                f"{terms[0]} compares a pair's own image with a rejected one, and image={self.image} takes the own one "
                "away; use image=own"
            )
        if self.symmetric_weight and self.rejected_image != "pair":
            raise ValueError(
                "symmetric_weight needs rejected images that the rejected answers are true of: "
                f"rejected_image=pair, not {self.rejected_image}"
            )
        if self.rejected_image_strength_end is not None and self.rejected_image == "pair":
            raise ValueError(
                "rejected_image_strength_end is for images that training makes; choose how in rejected_image, or leave "
                "it out"
            )
        return self


class SFTConfig(OptimisationConfig):
    """Likelihood fine-tuning on conversations: the infused rows, and those of further sources."""

    start: Literal["dpo", "base"] = "dpo"
    """Which model it goes on from; the same one describes the images of the rows."""

    learning_rate: Positive = 2e-5
    global_batch: Count = 32
    image: Literal["own", "none"] = "own"
    """`none` reads the text of every row alone: a model that guesses answers without seeing (PRIOR), or a control."""
    prior_alpha: NotNegativeWeight = 0.0
    """Weigh each token of the answers to an image by (1 - p)^prior_alpha, p its probability without the image (column
    text_logps, of stage text_logps); PRIOR has 1, and 0 weighs all alike."""
    num_tokens: Count | None = None
    """Stop after the first step by which the model has read so many tokens, those of images included; `num_steps` or
    `num_epochs` when unset."""
    mix: Weights = ()
    """How much of each source is read, {infusion: 3, text: 1}: weights by the names of the inputs `rows:NAME`, or of
    the step or folder that an input `rows` is. When empty, every row of all of them once an epoch."""
    mix_unit: Literal["rows", "tokens"] = "rows"
    """What the weights share out: rows, or tokens that the model reads."""
    mix_end: Weights = ()
    """Weights at the last step: the shares go there evenly from `mix`; constant when empty."""

    @model_validator(mode="after")
    def _mix_fits_together(self) -> Self:
        if self.num_tokens is not None and (self.num_steps is not None or self.num_epochs != 1):
            other = "num_epochs" if self.num_steps is None else "num_steps"
            raise ValueError(f"num_tokens and {other} both say when to stop; leave one of them out")
        if self.image == "none":
            for name in (name for name in ("prior_alpha", "num_tokens") if getattr(self, name)):
                raise ValueError(f"{name} counts what images bring, and image=none leaves them out; use one of the two")
            if self.mix_unit == "tokens":
                raise ValueError("mix_unit=tokens counts those of images, and image=none leaves them out; use rows")
        mix, end = dict(self.mix), dict(self.mix_end)
        if not mix and (end or self.mix_unit != "rows"):
            raise ValueError(f"{'mix_end' if end else 'mix_unit'} needs mix, the weight of each source")
        if len(mix) == 1:
            raise ValueError(f"mix has one source, {next(iter(mix))}; name at least two, or leave it out")
        if end and end.keys() != mix.keys():
            names = ", ".join(sorted(end.keys() ^ mix.keys()))
            raise ValueError(f"mix and mix_end must name the same sources; only one of them has {names}")
        for name, weight in self.mix:
            if weight < 0 or end.get(name, weight) < 0 or (weight == 0 and not end.get(name, 0)):
                raise ValueError(
                    f"mix gives {name} the weight {min(weight, end.get(name, weight)):g}; it must be above 0, and may "
                    "be 0 at one end of mix_end"
                )
        if mix and not (sum(mix.values()) and (not end or sum(end.values()))):
            raise ValueError("mix and mix_end must each give some source a weight above 0")
        return self
