"""A run directory with candidates, scores, statements and what the rules made of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stic_ray.core.config import RunConfig
from stic_ray.core.rundir import RunDir, row_counts
from stic_ray.core.schemas import CANDIDATES, DECISIONS, INDEX, PAIRS, REJECTED, SCORES, STATEMENTS, table_of
from stic_ray.core.steps import Step
from stic_ray.core.verification import RulesConfig
from stic_ray.stages.pairs import pairs_stage
from tests.report.builders import HOSTILE, encoded, pair, picture

NUM_IMAGES, NUM_THAT_GIVE, PER_SHARD = 18, 12, 9
TOO_LONG = 15
"""The one image that gives nothing for another reason than the others that do not."""
SCHEMAS = {
    "pool/index": INDEX,
    "candidates/candidates": CANDIDATES,
    "scores/scores": SCORES,
    "scores/statements": STATEMENTS,
    "pairs/decisions": DECISIONS,
    "pairs/pairs": PAIRS,
    "pairs/rejected": REJECTED,
}


def rated_image(position: int) -> str:
    return f"{position * 2654435761 % 2**32:032x}"


def rows_of(position: int, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of all tables about one image; candidate 0 is chosen and 2 is rejected, or nothing."""
    image, gives = rated_image(position), position < NUM_THAT_GIVE
    shared = {"image_id": image, "position": position}
    facts = {"width_px": 1, "height_px": 1, "format": "PNG", "mode": "RGB", "num_bytes": file.stat().st_size}
    yield "pool/index", {**shared, "path": str(file), **facts}
    for number in range(4):
        said = HOSTILE if number == 3 else "It shows squares. " * 12
        tokens = {"num_tokens": 20 + number, "num_image_tokens": 4, "num_added_tokens": 3, "finish_reason": "stop"}
        asked = {"prompt": "Look closely.", "filed_under": "Describe this picture."}
        model = {"model": "m", "model_revision": "r", "seed": 0}
        text = f"Candidate {number} of picture {position}. {said}"
        yield "candidates/candidates", {**shared, **asked, **tokens, **model, "number": number, "text": text}
        for scorer, value in (("consistency", 0.2 + number / 10), ("claims", -float(number % 3))):
            yield "scores/scores", {**shared, "number": number, "scorer": scorer, "value": value}
        for question, p_yes in ((f"Is there a <square> of answer {number}?", 0.91), ("Is there a horse?", 0.08)):
            yield "scores/statements", {**shared, "number": number, "question": question, "p_yes": p_yes}
        taken = {0: "chosen", 2: "rejected"}.get(number) if gives else None
        reason = None if gives or position == TOO_LONG else "gap_too_small"
        decision = {"number": number, "score": 1 - number / 10, "taken": taken, "reason": reason}
        yield "pairs/decisions", {**shared, **decision}
    if gives:
        yield "pairs/pairs", {**pair(position), **shared, "negative": "worse_candidate"}
    else:
        why = "too_long" if position == TOO_LONG else "gap_too_small"
        yield "pairs/rejected", {**shared, "path": str(file), "reason": why, "message": f"too near <{position}>"}


def write_rated(path: Path) -> RunDir:
    run = RunDir.of(str(path))
    config = RunConfig(name="rated", rules=RulesConfig(scorers=("claims", "consistency"), combine="rank"))
    step = Step(pairs_stage(config.rules), "pairs", {"index": "pool", "candidates": "candidates", "scores": "scores"})
    record = {"steps": [step.record(config)], "config": config.model_dump(mode="json")}
    run.write_text("config.yaml", yaml.safe_dump(record))
    (path / "images").mkdir()
    for shard, start in enumerate(range(0, NUM_IMAGES, PER_SHARD)):
        tables: dict[str, list[dict[str, Any]]] = {}
        for position in range(start, start + PER_SHARD):
            file = path / "images" / f"{position}.png"
            file.write_bytes(encoded(picture(position)))
            for table, row in rows_of(position, file):
                known = {name: value for name, value in row.items() if name in SCHEMAS[table].names}
                tables.setdefault(table, []).append(known)
        for table, rows in tables.items():
            folder, family = table.split("/")
            (run / folder).write_shard(family, shard, table_of(rows, SCHEMAS[table]), SCHEMAS[table])
    rejected = {"gap_too_small": NUM_IMAGES - NUM_THAT_GIVE - 1, "too_long": 1}
    counts = row_counts(NUM_IMAGES, NUM_THAT_GIVE, rejected)
    (run / "pairs").write_manifest({"stage": "pairs", "seconds": 3.0, "gpu_hours": 0.0, **counts})
    return run
