"""Batched generation of the transformers engine against one request at a time, on the same model and requests.

The baseline is what STIC's released generator does: batch size 1. Both answers are compared, so a ratio can only come
from the batching.

    python benchmarks/generation.py --quick
"""

import argparse
import json
import time

from stic_ray.core.config import ModelConfig
from stic_ray.engines.base import Request, Sampling
from stic_ray.engines.batching import BatchLimits
from stic_ray.engines.transformers_engine import TransformersEngine
from stic_ray.toyworld import WEIGHTS
from stic_ray.toyworld.scenes import draw_scene, sample_scene

PROMISE = 6.0


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(WEIGHTS), help="checkpoint directory (default: the toy world's)")
    parser.add_argument("--num-requests", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--gpu", action="store_true", help="run on the first GPU, in bfloat16")
    parser.add_argument("--quick", action="store_true", help="128 requests")
    options = parser.parse_args()
    num_requests = 128 if options.quick else options.num_requests
    model = ModelConfig(path=options.model)
    engine = TransformersEngine(model, limits=BatchLimits(options.batch_size, None), on_gpu=options.gpu)
    requests = [Request("Describe the picture.", draw_scene(sample_scene(0, i)), seed=i) for i in range(num_requests)]
    sampling = Sampling(options.max_new_tokens, temperature=0.7)
    engine.generate(requests[: options.batch_size], sampling)  # warm-up

    seconds, texts = {}, {}
    for name, batch_size in (("one_at_a_time", 1), ("batched", options.batch_size)):
        engine.batches.limits = BatchLimits(batch_size, None)
        began_s = time.perf_counter()
        answers = engine.generate(requests, sampling)
        seconds[name] = time.perf_counter() - began_s
        texts[name] = [answer.text for answer in answers]
        print(f"{name}: {num_requests / seconds[name]:.1f} requests/s")
    num_equal = sum(a == b for a, b in zip(*texts.values(), strict=True))
    result = {
        "name": "generation",
        "ratio": seconds["one_at_a_time"] / seconds["batched"],
        "promise": PROMISE,
        "num_requests": num_requests,
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "seconds_one_at_a_time": seconds["one_at_a_time"],
        "seconds_batched": seconds["batched"],
        "num_equal_answers": num_equal,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
