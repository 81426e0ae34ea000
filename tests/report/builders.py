"""A small but complete run directory, and a reader of its page."""

import io
import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from stic_ray.core.config import RunConfig
from stic_ray.core.preferences import PreferencesConfig
from stic_ray.core.rundir import ESTIMATE, RunDir, row_counts
from stic_ray.core.schemas import PAIRS, REJECTED, table_of
from stic_ray.method.corruption import Corruption, corrupt, draw_corruption, low_resolution, pixel_change
from stic_ray.method.scoring import METRICS
from stic_ray.recipes import stic
from stic_ray.report.collect import collect

NUM_PAIRS = 36
PAIRS_PER_SHARD = 20
HOSTILE = "<script>alert('x')</script> \"quoted\" & <b>bold</b> nul:\x00 bell:\x07 \u202eright-to-left\u202c"
LONG_WORD = "un" * 400
ARABIC = "صورة لقطة نائمة على أريكة زرقاء"
STAGES = ("pool", "preferences", "dpo", "infusion", "sft", "evaluation")
REJECTED_BY_STAGE = {
    "pool": {"undecodable_image": 7, "duplicate": 3},
    "preferences": {"identical_answers": 2},
    "infusion": {},
}


def picture(number: int, side_px: int = 96) -> Image.Image:
    """A picture with large coloured areas, of landscape, square or portrait shape."""
    generator = random.Random(number)
    width, height = [(side_px * 4 // 3, side_px), (side_px, side_px), (side_px, side_px * 3 // 2)][number % 3]
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:] = [generator.randrange(90, 220) for _ in range(3)]
    for _ in range(4):
        x, y = generator.randrange(width - 20), generator.randrange(height - 20)
        pixels[y : y + 20, x : x + 20] = [generator.randrange(256) for _ in range(3)]
    return Image.fromarray(pixels)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pair(position: int) -> dict[str, Any]:
    """A third each: hallucination prompt, low resolution, colour jitter."""
    image = picture(position)
    corruption: Corruption | None = None
    if position % 3 == 1:
        corruption = low_resolution(20)
    elif position % 3 == 2:
        corruption = draw_corruption(
            random.Random(position), PreferencesConfig(low_resolution_share=0.0, jitter_brightness=0.5)
        )
    chosen = f"A picture of coloured squares, number {position}. It shows {'one more square, ' * 20}and no more."
    rejected = [HOSTILE, LONG_WORD, ARABIC, *["Something else."] * 3][position % 6]
    return {
        "image_id": f"{position * 2654435761 % 2**32:032x}",
        "position": position,
        "image": {"bytes": encoded(image), "path": f"/images/{position}.png"},
        "prompt": [{"role": "user", "content": "Describe this picture."}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "chosen_prompt": "Work through this picture one step at a time.\n" + "Name what can be seen. " * 20,
        "rejected_prompt": "Describe this picture." if corruption else "Describe it & invent <two> objects.",
        "negative": "corrupted_image" if corruption else "hallucination_prompt",
        "corruption": corruption,
        "pixel_change": pixel_change(image, corrupt(image, corruption)) if corruption else None,
        "num_image_tokens": 144,
        "num_chosen_tokens": 61 + position,
        "num_rejected_tokens": 35,
        "num_sequence_tokens": 300,
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "length" if position == 4 else "stop",
        "model": "toyworld",
        "model_revision": "abc",
        "seed": 0,
    }


def write_pairs(stage: RunDir, pairs: list[dict[str, Any]], per_shard: int = PAIRS_PER_SHARD) -> None:
    for shard, start in enumerate(range(0, len(pairs), per_shard)):
        stage.write_shard("pairs", shard, table_of(pairs[start : start + per_shard], PAIRS), PAIRS)


def write_rejected(stage: RunDir, counts: dict[str, int]) -> None:
    rows = [
        {
            "image_id": f"{i:032x}",
            "path": f"/images/{reason}-{i}.jpg",
            "reason": reason,
            "message": f"{HOSTILE} {i}",
        }
        for reason, count in counts.items()
        for i in range(count)
    ]
    stage.write_shard("rejected", 0, table_of(rows, REJECTED), REJECTED)


def manifest(stage: str, num_rows_in: int, rejected: dict[str, int]) -> dict[str, Any]:
    num_written = num_rows_in - sum(rejected.values())
    return {
        "stage": stage,
        "seconds": 12.5 * (STAGES.index(stage) + 1),
        "gpu_hours": 8 * 12.5 * (STAGES.index(stage) + 1) / 3600,
        "config": {"shard_size": 256},
        "config_hash": "0011223344556677",
        "inputs": {"source": "s3://user:secret@bucket/images"},
        **row_counts(num_rows_in, num_written, rejected),
        "model": "toyworld",
    }


def dpo_lines() -> list[dict[str, Any]]:
    lines = []
    for step in range(1, 41):
        lines.append(
            {
                "step": step,
                "epoch": step / 40,
                "loss": 0.69 - 0.01 * step,
                "loss/dpo": 0.69 - 0.012 * step,
                "loss/regulariser": 0.08 + 0.001 * math.sin(step),
                "rewards/margins": 0.02 * step,
                "rewards/accuracies": min(1.0, 0.5 + 0.015 * step),
                "logps/chosen": -80.0 + 0.2 * step,
                "logps/rejected": -60.0 - 0.5 * step,
                "learning_rate": 1e-6 * (1 - step / 40),
                "grad_norm": 2.0 + math.cos(step),
                "kl": 0.001 * step,
                "tokens_per_second": 5000.0 + 100 * math.sin(step),
                "peak_memory_gib": 1.5,
                "seconds/step": 0.5,
                "seconds/data": 0.05,
                "seconds/forward": 0.15,
                "seconds/backward_and_optimizer": 0.28,
            }
        )
        if step % 10 == 0:
            lines[-1] |= {
                "eval_loss": 0.72 - 0.009 * step,
                "eval_rewards/margins": 0.015 * step,
                "eval_rewards/accuracies": min(1.0, 0.5 + 0.012 * step),
                "eval_logps/chosen": -82.0 + 0.2 * step,
                "eval_logps/rejected": -61.0 - 0.5 * step,
                "eval_kl": 0.0012 * step,
            }
    return lines


def write_lines(stage: RunDir, lines: list[dict[str, Any]]) -> None:
    stage.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def scores_of(benchmark: str, metric: str, shift: float = 0.0, gain: float = 0.05) -> list[dict[str, Any]]:
    """Scores of three models in both modes, each model by `gain` above the one before."""
    rows = []
    for i, model in enumerate(("base", "dpo", "sft")):
        for j, mode in enumerate(("direct", "describe_and_respond")):
            score, is_reference = 0.4 + shift + gain * i + 0.02 * j, i == j == 0
            difference = None if is_reference else gain * i + 0.02 * j
            rows.append(
                {
                    "benchmark": benchmark,
                    "metric": metric,
                    "higher_is_better": METRICS[metric].higher_is_better,
                    "model": model,
                    "mode": mode,
                    "num_questions": 240,
                    "score": score,
                    "low": score - 0.06,
                    "high": score + 0.06,
                    "difference": difference,
                    "difference_low": None if difference is None else difference - 0.06,
                    "difference_high": None if difference is None else difference + 0.06,
                }
            )
    return rows


def scores() -> list[dict[str, Any]]:
    return [
        *scores_of("toyworld", "multiple_choice"),
        *scores_of("colours & <shapes>", "exact_match", shift=0.1),
    ]


def expected(stage: str) -> dict[str, Any]:
    """Of `dpo` the price is known; of `evaluation` nobody said how many questions there are."""
    known, price = stage != "evaluation", 3.0 if stage == "dpo" else None
    figures = {"num_gpus": 8, "wall_s": 30.0 if known else None, "price_per_gpu_hour": price}
    return {"stage": stage, "basis": "model" if known else "set estimate.num_questions", **figures}


def recorded_steps(config: RunConfig) -> list[dict[str, Any]]:
    return [step.record(config) for step in stic(config)]


def new_run(path: Path) -> RunDir:
    """A run of which only the steps are known."""
    run = RunDir.of(str(path))
    run.write_text("config.yaml", yaml.safe_dump({"steps": recorded_steps(RunConfig(name="x"))}))
    return run


def write_run(path: Path) -> RunDir:
    run = RunDir.of(str(path))
    config = RunConfig(name="demo <run> & more")
    settings = {
        "config": config.model_dump(mode="json"),
        "steps": recorded_steps(config),
        "recipe": "demo",
        "overrides": ["pool.source=s3://user:secret@bucket/images", "seed=3"],
        "package_versions": {"torch": "2.13.0", "ray": "2.60.0"},
        "git_commit": "93cde73+changes",
    }
    run.write_text("config.yaml", yaml.safe_dump(settings))
    write_pairs(run / "preferences", [pair(position) for position in range(NUM_PAIRS)])
    for stage, counts in REJECTED_BY_STAGE.items():
        write_rejected(run / stage, counts)
    write_lines(run / "dpo", dpo_lines())
    write_lines(run / "sft", [{"step": s, "loss": 2.0 / s, "learning_rate": 1e-5} for s in range(1, 21)])
    told = {
        "held_out": {"rewards/accuracies": 0.98},
        "throughput": {"rows_per_second": 3.5},
        "warnings": ["<too> easy"],
    }
    facts = {"num_steps": 40, "trainable": ["q_proj", "<v_proj>"], "seconds": 61.0}
    (run / "dpo").write_json("result.json", {**facts, **told})
    sources = {"infusion": {"num_rows": 96, "token_share": 0.5}, "text": {"num_rows": 288, "token_share": 0.5}}
    facts = {"num_steps": 20, "num_trainable_parameters": 1234567, "frozen": []}
    (run / "sft").write_json("result.json", {**facts, "sources": sources})
    (run / "evaluation").write_json("scores.json", scores())
    run.write_json(ESTIMATE, {stage: expected(stage) for stage in ("preferences", "dpo", "evaluation")})
    for i, stage in enumerate(STAGES):
        rejected = REJECTED_BY_STAGE.get(stage, {})
        (run / stage).write_manifest(manifest(stage, 1000 + i + sum(rejected.values()), rejected))
    return run


def with_scores(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    run = new_run(path)
    (run / "evaluation").write_json("scores.json", rows)
    (run / "evaluation").write_manifest(manifest("evaluation", len(rows), {}))
    return collect(run)


class Page(HTMLParser):
    """The parts of a page: elements with their attributes, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            continue

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.texts.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]
