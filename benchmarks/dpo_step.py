"""A DPO step on image preference pairs: ours against TRL's own DPOTrainer, on the same model, pairs and batches.

TRL encodes the image and the prompt for the chosen answer, for the rejected one, and both again for the reference. Ours
encodes them once for both answers, and reads the reference's log-probabilities from the pairs. Each trainer runs in a
process of its own, so that its memory is its own; the log-probabilities of both kinds of batch are compared. The model
has random weights, which cost as much as others.

    python benchmarks/dpo_step.py --quick
    python benchmarks/dpo_step.py --gpu --size 7b --pairs-per-step 4
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from random_llava import SIDES_PX, save_random_llava
from transformers import TrainerCallback
from trl.trainer.dpo_config import DPOConfig as TRLDPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import build_config
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PAIRS, table_of
from stic_ray.core.storage import Location
from stic_ray.method.images import encode_png
from stic_ray.stages.training.building import make_dpo_trainer
from stic_ray.stages.training.collators import PLACES, PreferenceCollator
from stic_ray.stages.training.index import REFERENCE_LOGPS, index_pairs
from stic_ray.stages.training.models import model_of
from stic_ray.stages.training.scores import score_answers

PROMISE = 1.8
SIDES = ("trl", "shared_prefix", "shared_prefix_and_stored_reference")
WARMUP_STEPS = 2


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIDES_PX, default="small", help="7b: LLaVA-1.6's, needs a GPU")
    parser.add_argument("--gpu", action="store_true", help="run on the first GPU, in bfloat16")
    parser.add_argument("--pairs-per-step", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=20, help="timed, after two that are not")
    parser.add_argument("--answer-tokens", type=int, default=58, help="of each answer, about; fewer make more prefix")
    parser.add_argument("--full", action="store_true", help="full fine-tuning instead of LoRA")
    parser.add_argument("--quick", action="store_true", help="6 timed steps")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options)))
        return
    if options.quick:
        options.num_steps = 6
    with tempfile.TemporaryDirectory() as folder:
        save_random_llava(options.size, Path(folder) / "model", on_gpu=options.gpu)
        measured = {}
        for side in SIDES:
            measured[side] = run_in_process(options, side, folder)
            print(f"{side}: {measured[side]['pairs_per_s']:.2f} pairs/s, {measured[side]['peak_gib']:.2f} GiB at most")
    ours, theirs = measured[SIDES[2]], measured[SIDES[0]]
    facts = {name: getattr(options, name) for name in ("size", "gpu", "pairs_per_step", "num_steps", "full")}
    result = {
        "name": "dpo_step",
        "ratio": ours["pairs_per_s"] / theirs["pairs_per_s"],
        "promise": PROMISE,
        "ratio_without_stored_reference": measured[SIDES[1]]["pairs_per_s"] / theirs["pairs_per_s"],
        "max_abs_logp_diff": ours["max_abs_logp_diff"],
        "prefix_share": ours["prefix_share"],
        **facts,
        **{side: {name: each[name] for name in ("pairs_per_s", "peak_gib")} for side, each in measured.items()},
    }
    print(json.dumps(result))


def run_in_process(options: argparse.Namespace, side: str, folder: str) -> dict[str, Any]:
    """Run one trainer in a fresh process and return what it measured."""
    command = [sys.executable, __file__, "--side", side, "--folder", folder, "--size", options.size]
    for name in ("pairs_per_step", "num_steps", "answer_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += [f"--{name}" for name in ("gpu", "full") if getattr(options, name)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    """Train with one of the trainers and return its speed, memory and losses."""
    config = configuration(options)
    pairs = write_pairs(options, options.folder / f"pairs-{options.side}")
    out = options.folder / options.side
    trainer: Any = make_dpo_trainer(config, index_pairs(config, [Location.of(str(pairs))]), out)
    facts = {}
    if options.side == "trl":
        trainer = trls_trainer(trainer, config, pairs)
    elif options.side == SIDES[2]:
        facts = compare(trainer, options.pairs_per_step)
        trainer.train_dataset = WithReference(trainer, options.pairs_per_step)
    clock = Clock(options.gpu)
    trainer.add_callback(clock)
    if options.gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = float(np.median(clock.seconds[WARMUP_STEPS:]))
    peak = (
        torch.cuda.max_memory_allocated() if options.gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    )
    return {"pairs_per_s": options.pairs_per_step / seconds, "peak_gib": peak / 2**30, **facts}


def configuration(options: argparse.Namespace, **dpo: Any) -> RunConfig:
    """Return the run that trainers are made from, with further settings of `dpo`."""
    size = options.pairs_per_step
    return build_config(
        {
            "name": "benchmark",
            "model": {"path": str(options.folder / "model"), "dtype": "bfloat16" if options.gpu else "float32"},
            "tuning": {"method": "full" if options.full else "lora", "lora_dropout": 0.0},
            "dpo": {
                "global_batch": size,
                "num_steps": options.num_steps + WARMUP_STEPS,
                "learning_rate": 1e-5,
                "num_held_out": 0,
                **dpo,
            },
            "workers": {
                "zero_stage": 0,
                "micro_batch": size,
                "num_gpus": int(options.gpu),
                "gradient_checkpointing": options.gpu,
            },
        }
    )


def trls_trainer(ours: Any, config: RunConfig, pairs: Path) -> DPOTrainer:
    """Return TRL's trainer with the model, data and arguments of ours, and its nearest loss."""
    arguments = ours.args.to_dict()
    kept = {name: arguments[name] for name in arguments if name in TRLDPOConfig.__dataclass_fields__}
    kept |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1], "max_length": None}
    adapter = None if config.tuning.method == "full" else ours.model.peft_config["default"]
    kept |= {"remove_unused_columns": True, "train_sampling_strategy": "random"}
    model, processor = config.model.path, ours.processing_class
    data = load_dataset("parquet", data_files=str(pairs), split="train", cache_dir=str(pairs.parent / "cache"))
    assert isinstance(data, Dataset), "a split of a file is map-style"
    del ours
    return DPOTrainer(
        model=model,
        args=TRLDPOConfig(**kept),
        train_dataset=data,
        processing_class=processor,
        data_collator=WithoutPlaces(processor=processor),
        peft_config=adapter,
    )


def compare(trainer: Any, num_pairs: int) -> dict[str, Any]:
    """Return how far the log-probabilities of both kinds of batch are apart, and how much of a sequence is prefix."""
    rows = [trainer.train_dataset[number] for number in range(num_pairs)]
    shared = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in rows]))
    plain = trainer._prepare_inputs(PreferenceCollator(processor=trainer.processing_class)([dict(row) for row in rows]))
    with torch.no_grad():
        model, network = model_of(trainer), trainer.network
        found, expected = (score_answers(model, network, batch).answers for batch in (shared, plain))
    num_answer_tokens = plain["completion_mask"].sum().item()
    return {
        "max_abs_logp_diff": (found - expected).abs().max().item(),
        "prefix_share": 1 - num_answer_tokens / plain["attention_mask"].sum().item(),
    }


class WithoutPlaces(PreferenceCollator):
    """Batches of two answers as TRL takes them, which knows their order."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch without the places of its answers."""
        return {name: value for name, value in super().__call__(examples).items() if name != PLACES}


class WithReference(torch.utils.data.Dataset[dict[str, Any]]):
    """The pairs with the reference's log-probabilities, as stage `preferences` stores them."""

    def __init__(self, trainer: Any, num_pairs: int) -> None:
        self.pairs = trainer.train_dataset
        self.num_rows = self.pairs.num_rows
        self.values: list[dict[Any, Any]] = []
        for start in range(0, len(self.pairs), num_pairs):
            rows = [self.pairs[start + number] for number in range(num_pairs)]
            with torch.no_grad():
                found = trainer.reference_scores(trainer._prepare_inputs(trainer.data_collator(rows))).own_image
            self.values += [dict(zip(REFERENCE_LOGPS, each, strict=True)) for each in found.answers.float().tolist()]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.pairs[index], **self.values[index]}


class Clock(TrainerCallback):
    """Notes how long each step takes, the making of its batch included."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.last_s = time.perf_counter()
        self.seconds: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.last_s = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the step."""
        if self.on_gpu:
            torch.cuda.synchronize()
        now_s = time.perf_counter()
        self.seconds.append(now_s - self.last_s)
        self.last_s = now_s


def write_pairs(options: argparse.Namespace, folder: Path, *, with_rejected_image: bool = False) -> Path:
    """Write a shard of pairs with pictures of noise, and answers of random words."""
    generator = np.random.default_rng(0)
    side_px = SIDES_PX[options.size]
    words = ("a", "red", "blue", "green", "circle", "square", "at", "the", "top", "left", "one", "small")
    rows = []
    for _ in range(options.pairs_per_step * 4):
        picture, other = (
            {"bytes": encode_png(Image.fromarray(pixels)), "path": None}
            for pixels in generator.integers(0, 255, (2, side_px, side_px, 3), dtype=np.uint8)
        )
        chosen, rejected = (" ".join(generator.choice(words, options.answer_tokens)) for _ in range(2))
        rows.append(
            {
                **{name: 0 for name in PAIRS.names if PAIRS.field(name).type == "int64"},
                **{name: "x" for name in PAIRS.names if PAIRS.field(name).type == "string"},
                "image": picture,
                "rejected_image": other if with_rejected_image else None,
                "prompt": [{"role": "user", "content": "Describe the picture."}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    run = RunDir.of(str(folder))
    run.write_shard("pairs", 0, table_of(rows, PAIRS), PAIRS)
    return Path(run.shards("pairs")[0].path)


if __name__ == "__main__":
    main()
