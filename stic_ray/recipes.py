"""Named runs. A recipe is a function that returns a complete configuration; its docstring says what it costs."""

from collections.abc import Callable

from stic_ray.core.config import (
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


def demo() -> RunConfig:
    """Run every stage on the toy world, where self-training can be seen to work: minutes on 2 CPU cores, no download.

    1,000 drawn pictures and a tiny model whose captions leave objects out and add what is not there. The settings were
    chosen on the toy world's tuning scenes (docs/results/toyworld.md). Answers that reach the token limit are
    kept, which an untrained model of yours may need.
    """
    return RunConfig(
        name="demo",
        pool=PoolConfig(shard_size=128),
        preferences=PreferencesConfig(temperature=0.2, max_new_tokens=64, allow_truncated=True),
        tuning=TuningConfig(lora_rank=16, lora_alpha=32, lora_dropout=0.0),
        dpo=DPOConfig(learning_rate=5e-4, global_batch=16, alpha=0.05),
        infusion=InfusionConfig(temperature=0.2, max_new_tokens=64, allow_truncated=True),
        sft=SFTConfig(learning_rate=5e-4, global_batch=16),
        evaluation=EvaluationConfig(max_answer_tokens=16, max_description_tokens=64),
        actors=ActorsConfig(num_actors=2, batch_size=128),
        workers=WorkersConfig(num_workers=2, micro_batch=4, save_every_steps=50),
    )


def llava16_7b() -> RunConfig:
    """Run STIC's published settings for LLaVA-v1.6-Mistral-7B on a GPU cluster (docs/method.md).

    6,000 images and 5,000 instruction rows, 8 generation actors and 4 training workers with one 80 GB GPU each.
    Give pool.source, infusion.source and evaluation.benchmarks with --set.
    """
    return RunConfig(
        name="llava16_7b",
        seed=42,
        model=ModelConfig(path="llava-hf/llava-v1.6-mistral-7b-hf", dtype="bfloat16"),
        pool=PoolConfig(source="images"),
        preferences=PreferencesConfig(num_images=6000, temperature=0.2, max_new_tokens=1024),
        tuning=TuningConfig(method="lora", lora_rank=128, lora_alpha=256, lora_dropout=0.05),
        dpo=DPOConfig(learning_rate=1e-7, global_batch=8, beta=0.1, alpha=1 / 1024),
        infusion=InfusionConfig(source="instructions.json", num_rows=5000, temperature=0.2, max_new_tokens=1024),
        sft=SFTConfig(learning_rate=2e-5, global_batch=32),
        evaluation=EvaluationConfig(benchmarks=("benchmark.jsonl",)),
        actors=ActorsConfig(num_actors=8, num_gpus=1, num_cpus=4, batch_size=16, timeout_s=1800),
        workers=WorkersConfig(num_workers=4, num_gpus=1, num_cpus=4, zero_stage=2, gradient_checkpointing=True),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {"demo": demo, "llava16_7b": llava16_7b}


def recipe(name: str) -> RunConfig:
    """Return the configuration of a recipe. Raises ConfigError naming the valid ones."""
    if name not in RECIPES:
        raise ConfigError(f"Unknown recipe '{name}'.{nearest(name, RECIPES)} Valid: {', '.join(RECIPES)}.")
    return RECIPES[name]()
