"""The stage `preferences` with the vllm engine, end to end through Ray, against one bare `LLM.generate` call.

Both answer the same requests, with the same seeds, on a random LLaVA of about 6 million parameters; the bare call is
given pictures and token ids that are ready, while the stage fetches, decodes and corrupts pictures, renders prompts,
judges pairs and writes Parquet. Both are timed from the moment their engine has answered a first request to the last
answer, or to the end of the stage; `ratio_with_start_up` has the seconds before that too. vLLM computes on `--threads`
cores, like a GPU of its own; on two cores the other one is left to the stage.

    nice -n -5 .venv-vllm/bin/python benchmarks/vllm.py --quick
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, GenerationConfig, LlavaForConditionalGeneration

from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import build_config
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INDEX, PAIRS
from stic_ray.core.steps import StepRun
from stic_ray.engines.base import Request
from stic_ray.engines.loading import load_processor
from stic_ray.engines.sequences import SequenceBuilder
from stic_ray.engines.weight_names import use_hub_names
from stic_ray.method.images import decode_for_storage
from stic_ray.method.preferences import picture_for_rejected, plan_pair
from stic_ray.method.prompts import PromptSet, load_prompts
from stic_ray.stages import cluster, preferences
from stic_ray.toyworld import WEIGHTS

PROMISE = 0.95
SIDE_PX = 128
READY = "ready"
READY = "ready"
HIDDEN_SIZE, NUM_LAYERS, HEAD_SIZE = 256, 4, 64


def write_model(folder: Path) -> Path:
    """Write a LLaVA with the toy world's words and random weights, for pictures of 64 image tokens."""
    config: Any = AutoConfig.from_pretrained(WEIGHTS)
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers = HIDDEN_SIZE, 2 * HIDDEN_SIZE, NUM_LAYERS
        part.num_attention_heads = HIDDEN_SIZE // HEAD_SIZE
    config.text_config.num_key_value_heads, config.text_config.head_dim = HIDDEN_SIZE // HEAD_SIZE, HEAD_SIZE
    config.vision_config.image_size = SIDE_PX
    model: Any = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(WEIGHTS)
    model.save_pretrained(folder)
    use_hub_names(folder)
    processor: Any = AutoProcessor.from_pretrained(WEIGHTS)
    processor.image_processor.size = {"shortest_edge": SIDE_PX}
    processor.image_processor.crop_size = {"height": SIDE_PX, "width": SIDE_PX}
    processor.save_pretrained(folder)
    return folder


def requests_of(config: RunConfig, run: RunDir, prompts: PromptSet) -> list[Request]:
    """Return the two requests of every image, as the stage makes them."""
    requests = []
    for row in (run / "pool").read_table("index", INDEX).to_pylist():
        clean, _ = decode_for_storage(Path(row["path"]).read_bytes())
        plan = plan_pair(row["image_id"], config.seed, config.preferences, prompts, row["position"])
        for_rejected, _ = picture_for_rejected(plan, clean)
        for prompt, image, purpose in (
            (plan.chosen_prompt, clean, "chosen"),
            (plan.rejected_prompt, for_rejected, "rejected"),
        ):
            requests.append(Request(prompt, image, seed_for(config.seed, row["image_id"], purpose)))
    return requests


def time_bare_call(config: RunConfig, requests: Sequence[Request]) -> dict[str, Any]:
    """Answer all requests in one call of vLLM's own offline class."""
    from stic_ray.engines import vllm_engine

    os.environ.update(vllm_engine.ENVIRONMENT | vllm_engine.CPU_ENVIRONMENT | dict(os.environ))
    vllm = importlib.import_module("vllm")

    began_s = time.perf_counter()
    llm = vllm.LLM(**vllm_engine.engine_arguments(config.model, config.actors, Path(os.devnull)))
    builder = SequenceBuilder(load_processor(config.model))
    drawn = {"temperature": config.preferences.temperature, "top_p": config.preferences.top_p}
    params = [
        vllm.SamplingParams(**drawn, max_tokens=config.preferences.max_new_tokens, seed=request.seed)
        for request in requests
    ]
    prompts = [vllm_engine.make_prompt(builder, request) for request in requests]
    llm.generate(prompts[:1], params[:1], use_tqdm=False)
    ready_s = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ended_s = time.perf_counter()
    llm.llm_engine.engine_core.shutdown()
    texts = [output.outputs[0].text.strip() for output in outputs]
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "seconds": ended_s - ready_s,
        "seconds_to_start": ready_s - began_s,
        "tokens_per_s": num_tokens / (ended_s - ready_s),
        "texts": texts,
    }


class TimedPairMaker(preferences.PairMaker):
    """Says when its engine is ready."""

    def __init__(self, config: RunConfig, *arguments: Any) -> None:
        """Load the model, and leave the time beside it."""
        super().__init__(config, *arguments)
        Path(config.model.path, READY).write_text(str(time.time()), encoding="utf-8")


def time_stage(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Run the stage; the texts have their places among the requests, a pair that was rejected has none."""
    os.environ.update(cluster.process_environment(config))
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 is for other people's work, and no baseline's
    preferences.PairMaker = TimedPairMaker
    with cluster.connected(config):
        began_s = time.time()
        accounts = preferences.build_preferences(
            StepRun("preferences", config, run / "preferences", {"index": run / "pool"})
        )
        ended_s = time.time()
    ready_s = float(Path(config.model.path, READY).read_text(encoding="utf-8"))
    rows = (run / "preferences").read_table("pairs", PAIRS).to_pylist()
    places = {"chosen": 0, "rejected": 1}
    texts = {2 * row["position"] + places[side]: row[side][0]["content"] for row in rows for side in places}
    return {
        "seconds": ended_s - ready_s,
        "seconds_to_start": ready_s - began_s,
        "throughput": accounts["throughput"],
        "texts": texts,
    }


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32, help="requests that vLLM computes at once")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="cores that vLLM computes on")
    parser.add_argument("--quick", action="store_true", help="128 images")
    options = parser.parse_args()
    from fake_stage import draw_pictures, write_index

    sys.path.remove(str(Path(__file__).parent))  # noqa: TID251 - there, this file is the module `vllm`
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    num_images = 128 if options.quick else options.num_images
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(
            {
                "name": "benchmark",
                "model": {"engine": "vllm", "path": str(write_model(Path(folder, "model")))},
                "preferences": {"temperature": 0.7, "max_new_tokens": options.max_new_tokens, "allow_truncated": True},
                "pool": {"shard_size": options.batch_size},
                "actors": {"num_cpus": options.threads, "batch_size": options.batch_size},
            }
        )
        run = RunDir.of(f"{folder}/run")
        write_index(run, draw_pictures(Path(folder, "pictures"), num_images, 256), num_images, options.batch_size)
        bare = time_bare_call(config, requests_of(config, run, load_prompts(config.prompts)))
        print(f"bare call: {2 * num_images / bare['seconds']:.1f} requests/s", flush=True)
        stage = time_stage(config, run)
    said, kept = bare.pop("texts"), stage.pop("texts")
    num_equal = sum(said[place] == text for place, text in kept.items())
    start_up = {name: figures["seconds"] + figures["seconds_to_start"] for name, figures in (("b", bare), ("s", stage))}
    result = {
        "name": "vllm",
        "ratio": bare["seconds"] / stage["seconds"],
        "promise": PROMISE,
        "ratio_with_start_up": start_up["b"] / start_up["s"],
        "num_images": num_images,
        "num_requests": 2 * num_images,
        "num_answers_in_pairs": len(kept),
        "num_equal_answers": num_equal,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "bare": bare,
        "stage": stage,
        "load_average": os.getloadavg(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
