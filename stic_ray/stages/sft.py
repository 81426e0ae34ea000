"""Stage `sft`: likelihood fine-tuning on the infused rows (STIC Algorithm 2), going on from the model that it reads."""

from dataclasses import replace
from typing import Any

from stic_ray.core.config import RunConfig
from stic_ray.core.steps import StepRun
from stic_ray.core.workload import SHORT_ANSWER_TOKENS, Sizes, Work, training_work
from stic_ray.stages.dpo import DPO, check_training


def _train(step: StepRun) -> dict[str, Any]:
    from stic_ray.stages.training import index, launch  # Ray Train and torch

    infused = step.inputs["rows"]
    rows = index.index_conversations(step.config, [*infused.shards("rows"), *infused.shards("text")])
    return launch.train("sft", step, rows)


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    if not sizes.num_instructions:
        return None
    described = min(sizes.num_answer_tokens, config.infusion.max_new_tokens) if config.infusion.describe else 0
    tokens = sizes.num_prompt_tokens + described + SHORT_ANSWER_TOKENS
    return training_work(config, sizes, config.sft, sizes.num_instructions, tokens, reference_pass=False)


SFT = replace(
    DPO,
    name="sft",
    run=_train,
    settings=("seed", "model", "tuning", "sft"),
    section="sft",
    reads=("rows", "model"),
    check=lambda step: check_training(step.config, step.config.sft),
    work=_work,
    amount="num_instructions",
)
