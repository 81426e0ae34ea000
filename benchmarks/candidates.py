"""Stage `candidates` through Ray against bare generation of the same answers, on the same model.

The bare call gets pictures that are decoded, a copy for every answer, so that none shares its picture's encoding with
another; the stage fetches and decodes them, draws prompts and writes Parquet. Both ask with the same seeds, and their
answers are compared. Both are timed from the moment their engine has answered a first request to the last answer, or
to the end of the stage. The bare call is made before the stage and again after it, and the ratio is to their mean:
where the two differ much, other work was on the machine and the ratio says nothing. The model computes on `--threads`
cores, like a GPU of its own; on two cores the other one is left to the stage.

    nice -n -5 python benchmarks/candidates.py --quick
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from fake_stage import draw_pictures, write_index
from random_llava import SIDES_PX, save_random_llava

from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import build_config
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import CANDIDATES, INDEX
from stic_ray.core.steps import StepRun
from stic_ray.engines.base import Request, Sampling
from stic_ray.engines.batching import BatchLimits
from stic_ray.engines.transformers_engine import TransformersEngine
from stic_ray.method.candidates import candidate_prompts
from stic_ray.method.images import decode_for_storage
from stic_ray.method.prompts import load_prompts
from stic_ray.stages import candidates, cluster

PROMISE = 1.15
READY = "ready"
Texts = dict[tuple[int, int], str]
"""Answers by the position of the image and the number of the candidate."""


def requests_of(config: RunConfig, run: RunDir) -> dict[tuple[int, int], Request]:
    """Return the requests of the stage, each with a picture of its own."""
    prompts, requests = load_prompts(config.prompts), {}
    for row in (run / "pool").read_table("index", INDEX).to_pylist():
        picture, _ = decode_for_storage(Path(row["path"]).read_bytes())
        asked = candidate_prompts(row["image_id"], config.seed, config.candidates, prompts)
        for number, prompt in enumerate(asked):
            seed = seed_for(config.seed, row["image_id"], f"candidate {number}")
            requests[row["position"], number] = Request(prompt, picture.copy(), seed)
    return requests


def time_bare_call(config: RunConfig, run: RunDir, *, on_gpu: bool) -> tuple[float, Texts]:
    """Answer all requests in one call of the engine; return its seconds and the answers."""
    limits = BatchLimits(config.actors.batch_size, config.actors.batch_tokens)
    engine = TransformersEngine(config.model, limits=limits, on_gpu=on_gpu)
    requests = requests_of(config, run)
    settings = config.candidates
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
    engine.generate([*requests.values()][:1], sampling)
    began_s = time.perf_counter()
    answers = engine.generate([*requests.values()], sampling)
    elapsed_s = time.perf_counter() - began_s
    return elapsed_s, {place: answer.text for place, answer in zip(requests, answers, strict=True)}


class TimedAnswerer(candidates.Answerer):
    """Says when its engine has answered a first request."""

    def __init__(self, config: RunConfig, *arguments: Any) -> None:
        """Load the model, answer, and leave the time beside it."""
        super().__init__(config, *arguments)
        self.engine.generate([Request("Hi", None)], self.sampling)
        Path(config.model.path, READY).write_text(str(time.time()), encoding="utf-8")


def time_stage(config: RunConfig, run: RunDir) -> tuple[float, Texts, dict[str, Any]]:
    """Run the stage; return its seconds, the answers and the figures of its manifest."""
    os.environ.update(cluster.process_environment(config))
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 is for other people's work, and no baseline's
    candidates.Answerer = TimedAnswerer
    with cluster.connected(config):
        accounts = candidates.build_candidates(
            StepRun("candidates", config, run / "candidates", {"index": run / "pool"})
        )
        ended_s = time.time()
    rows = (run / "candidates").read_table("candidates", CANDIDATES).to_pylist()
    elapsed_s = ended_s - float(Path(config.model.path, READY).read_text(encoding="utf-8"))
    return elapsed_s, {(row["position"], row["number"]): row["text"] for row in rows}, accounts["throughput"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=[*SIDES_PX], help="of the random LLaVA (default: small)")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--num-candidates", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="cores that the model computes on")
    parser.add_argument("--gpu", action="store_true", help="run on the first GPU, in bfloat16")
    parser.add_argument("--quick", action="store_true", help="64 images")
    return parser.parse_args()


def main() -> None:
    """Measure and print the ratio."""
    options = _options()
    num_images = 64 if options.quick else options.num_images
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        save_random_llava(options.size, Path(folder, "model"), on_gpu=options.gpu)
        config = build_config(
            {
                "name": "benchmark",
                "model": {"path": f"{folder}/model"},
                "candidates": {
                    "num_candidates": options.num_candidates,
                    "max_new_tokens": options.max_new_tokens,
                    "allow_truncated": True,
                },
                "pool": {"shard_size": options.batch_size},
                "actors": {
                    "num_cpus": options.threads,
                    "num_gpus": float(options.gpu),
                    "batch_size": options.batch_size,
                },
            }
        )
        run = RunDir.of(f"{folder}/run")
        pictures = draw_pictures(Path(folder, "pictures"), num_images, SIDES_PX[options.size])
        write_index(run, pictures, num_images, options.batch_size)
        before_s, said = time_bare_call(config, run, on_gpu=options.gpu)
        print(f"bare call: {len(said) / before_s:.1f} answers/s", flush=True)
        stage_s, kept, throughput = time_stage(config, run)
        print(f"stage: {len(kept) / stage_s:.1f} answers/s", flush=True)
        after_s, _ = time_bare_call(config, run, on_gpu=options.gpu)
    result = {
        "name": "candidates",
        "ratio": 2 * stage_s / (before_s + after_s),
        "promise": PROMISE,
        "num_images": num_images,
        "num_candidates": options.num_candidates,
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "threads": options.threads,
        "seconds_bare_before": before_s,
        "seconds_bare_after": after_s,
        "seconds_stage": stage_s,
        "num_answers": len(kept),
        "num_equal_answers": sum(said[place] == text for place, text in kept.items()),
        "stage": throughput,
        "load_average": os.getloadavg(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
