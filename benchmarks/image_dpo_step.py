"""A DPO step with terms about images: mDPO's, S-VCO's and POVID's against plain DPO, same model, pairs and batches.

mDPO's conditional term needs the chosen answer with a second image, under policy and reference: a second sequence
beside the one that both answers share. S-VCO's has both answers there, and once more without an image. POVID's looks at
the second image without learning from it. Crops and noise are made in the step, as in training. Each trainer runs in a
process of its own, and so does plain DPO before and behind the others. The model has random weights, which cost as
much as others.

    python benchmarks/image_dpo_step.py --quick
    python benchmarks/image_dpo_step.py --gpu --size 7b --pairs-per-step 4
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dpo_step import WARMUP_STEPS, Clock, configuration, write_pairs
from random_llava import SIDES_PX, save_random_llava

from stic_ray.core.storage import Location
from stic_ray.stages.training.building import make_dpo_trainer
from stic_ray.stages.training.index import index_pairs

PROMISE = 1.8
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mdpo": {"conditional_weight": 1.0, "anchor_weight": 1.0, "rejected_image": "crop"},
    "svco": {"text_weight": 0.0, "symmetric_weight": 1.0},
    "povid": {"text_weight": 0.5, "own_tokens_weight": 0.5, "rejected_image": "diffusion_noise"},
}


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIDES_PX, default="small", help="7b: LLaVA-1.6's, needs a GPU")
    parser.add_argument("--gpu", action="store_true", help="run on the first GPU, in bfloat16")
    parser.add_argument("--pairs-per-step", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=20, help="timed, after two that are not")
    parser.add_argument("--answer-tokens", type=int, default=75, help="of each answer, about")
    parser.add_argument("--quick", action="store_true", help="8 timed steps")
    parser.add_argument("--side", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.full = False
    if options.side:
        print(json.dumps(run_side(options)))
        return
    if options.quick:
        options.num_steps = 8
    with tempfile.TemporaryDirectory() as folder:
        save_random_llava(options.size, Path(folder) / "model", on_gpu=options.gpu)
        measured: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for side in (*SETTINGS, "plain"):
            measured[side].append(run_in_process(options, side, folder))
            print(f"{side}: {measured[side][-1]:.3f} s a step")
    step_s = {name: min(seconds) for name, seconds in measured.items()}
    ratios = {name: seconds / step_s["plain"] for name, seconds in step_s.items()}
    facts = {name: getattr(options, name) for name in ("size", "gpu", "pairs_per_step", "num_steps", "answer_tokens")}
    spread = max(measured["plain"]) / min(measured["plain"])
    result = {"name": "image_dpo_step", "ratio": ratios["mdpo"], "promise": PROMISE}
    result |= {f"ratio_{name}": ratios[name] for name in ("svco", "povid")}
    print(json.dumps({**result, "spread_of_plain": spread, **facts, "step_s": step_s}))


def run_in_process(options: argparse.Namespace, side: str, folder: str) -> float:
    """Run one trainer in a fresh process and return the seconds of a step."""
    command = [sys.executable, __file__, "--side", side, "--folder", folder, "--size", options.size]
    for name in ("pairs_per_step", "num_steps", "answer_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--gpu"] if options.gpu else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_side(options: argparse.Namespace) -> float:
    """Train with one kind of terms and return the seconds of the fastest step: what else runs only ever adds."""
    config = configuration(options, **SETTINGS[options.side])
    pairs = write_pairs(options, options.folder / f"pairs-{options.side}", with_rejected_image=True)
    rows = index_pairs(config, [Location.of(str(pairs))])
    trainer: Any = make_dpo_trainer(config, rows, options.folder / options.side)
    clock = Clock(options.gpu)
    trainer.add_callback(clock)
    trainer.train()
    return min(clock.seconds[WARMUP_STEPS:])


if __name__ == "__main__":
    main()
