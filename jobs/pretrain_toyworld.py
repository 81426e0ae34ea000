"""Make the toy world's model from nothing: about 20 minutes on 2 CPU cores.

The weights in stic_ray/toyworld/weights are what this command leaves without options. The same options on the same
kind of machine give the same weights; then docs/results/ has to be made again.
"""

import argparse
import logging
from pathlib import Path

import torch

from stic_ray.toyworld.model import WEIGHTS
from stic_ray.toyworld.pretraining import pretrain

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="directory of the model")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes")
    parser.add_argument("--vision-steps", type=int, default=400, help="for the vision tower alone")
    parser.add_argument("--language-steps", type=int, default=1200, help="of the first course")
    parser.add_argument("--habits-steps", type=int, default=2400, help="of the second course")
    parser.add_argument("--batch-size", type=int, default=64, help="scenes per step, each seen once")
    parser.add_argument("--threads", type=int, default=2, help="of torch; part of what decides the weights")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    pretrain(
        options.out,
        seed=options.seed,
        num_vision_steps=options.vision_steps,
        num_steps={"language": options.language_steps, "habits": options.habits_steps},
        batch_size=options.batch_size,
    )
