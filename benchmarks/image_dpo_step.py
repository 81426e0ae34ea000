"""A DPO step with terms about images: mDPO's, S-VCO's and POVID's against plain DPO, same model, pairs and batches.

mDPO's conditional term needs the chosen answer with a second image, under policy and reference: a second sequence
beside the one that both answers share. S-VCO's has both answers there, and once more without an image. POVID's looks at
the second image without learning from it. A step makes its batch, crops and noise included, goes forward and back, and
lets the optimiser take its step. The trainers take their steps in turn in one process; on CPUs it is the time of one
core that counts, whatever else runs. The model has random weights, which cost as much as others.

    python benchmarks/image_dpo_step.py --quick
    python benchmarks/image_dpo_step.py --gpu --size 7b --pairs-per-step 4
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dpo_step import configuration, write_pairs
from random_llava import SIDES_PX, save_random_llava

from stic_ray.core.storage import Location
from stic_ray.stages.training.building import make_dpo_trainer
from stic_ray.stages.training.index import index_pairs
from stic_ray.stages.training.models import model_of

PROMISE = 1.8
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mdpo": {"conditional_weight": 1.0, "anchor_weight": 1.0, "rejected_image": "crop"},
    "svco": {"text_weight": 0.0, "symmetric_weight": 1.0},
    "povid": {"text_weight": 0.5, "own_tokens_weight": 0.5, "rejected_image": "diffusion_noise"},
}


_WARMUP_STEPS = 1


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIDES_PX, default="small", help="7b: LLaVA-1.6's, needs a GPU")
    parser.add_argument("--gpu", action="store_true", help="run on the first GPU, in bfloat16")
    parser.add_argument("--pairs-per-step", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=20, help="timed of each, after one that is not")
    parser.add_argument("--answer-tokens", type=int, default=75, help="of each answer, about")
    parser.add_argument("--quick", action="store_true", help="6 timed steps")
    options = parser.parse_args()
    options.full = False
    if options.quick:
        options.num_steps = 6
    if not options.gpu:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        save_random_llava(options.size, options.folder / "model", on_gpu=options.gpu)
        steps = {name: stepper(options, name) for name in SETTINGS}
        seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(options.num_steps + _WARMUP_STEPS):
            for name, step in steps.items():
                seconds[name].append(timed(step, options.gpu))
    step_s = {name: float(np.median(found[_WARMUP_STEPS:])) for name, found in seconds.items()}
    ratios = {f"ratio_{name}": found / step_s["plain"] for name, found in step_s.items() if name != "plain"}
    facts = {name: getattr(options, name) for name in ("size", "gpu", "pairs_per_step", "num_steps", "answer_tokens")}
    result = {"name": "image_dpo_step", "ratio": ratios.pop("ratio_mdpo"), "promise": PROMISE, **ratios}
    print(json.dumps({**result, **facts, "step_s": step_s}))


def stepper(options: argparse.Namespace, side: str) -> Callable[[], None]:
    """Return what takes a step of a training with one kind of terms."""
    config = configuration(options, **SETTINGS[side])
    pairs = write_pairs(options, options.folder / "pairs", with_rejected_image=True)
    trainer: Any = make_dpo_trainer(config, index_pairs(config, [Location.of(str(pairs))]), options.folder / side)
    model, optimizer = model_of(trainer), trainer.create_optimizer()
    model.to(trainer.args.device).train()
    rows = trainer.train_dataset
    begin = 0

    def step() -> None:
        nonlocal begin
        batch = trainer.data_collator([rows[(begin + number) % len(rows)] for number in range(options.pairs_per_step)])
        begin += options.pairs_per_step
        trainer.loss_of(model, trainer._prepare_inputs(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], None], on_gpu: bool) -> float:
    """Return the seconds that a step takes; without a GPU, of one core."""
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    begin_s = clock()
    step()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - begin_s


if __name__ == "__main__":
    main()
