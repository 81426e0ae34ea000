"""Are the questions that the model asks itself answered rightly, the more its answers agree?

python jobs/full_pipeline.py --recipe self_questions --run runs/self_questions
python -m experiments.own_questions --run runs/self_questions

Of every question that a scene of the toy world answers, whether the most frequent answer is right, by the share of the
answers that agree on it. Questions in other words, and those about what a scene has twice, are counted beside.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INDEX, QUESTIONS
from stic_ray.core.steps import read_record
from stic_ray.method.scoring import exact_match
from stic_ray.toyworld.assets import POOL_FIRST_INDEX
from stic_ray.toyworld.language import NUMBERS, PLACES, name_of
from stic_ray.toyworld.scenes import Scene, sample_scene

SHARES = (0.0, 0.5, 0.6, 0.75, 0.9)


def true_answers(question: str, scene: Scene) -> list[str] | None:
    """Return the true answers of a question about a scene; None where it has none, or several."""
    named = [(item, name_of(item.kind), PLACES[item.cell]) for item in scene.objects]
    if found := re.fullmatch(r"What colour is the shape at the (.+)\?", question):
        colours = [item.colour for item, _, place in named if place == found[1]]
    elif found := re.fullmatch(r"What colour is the (\w+)\?", question):
        colours = [item.colour for item, *_ in named if item.shape == found[1]]
    elif found := re.fullmatch(r"How many (\w+?)(?:e?s)? are there\?", question):
        number = sum(found[1] == "shap" or item.shape == found[1] for item, *_ in named)
        return [NUMBERS[number], str(number)] if number else None
    elif found := re.fullmatch(r"Where is the (\w+ \w+ \w+|\w+ \w+)\?", question):
        places = [place for _, name, place in named if name == found[1]]
        return [places[0], f"at the {places[0]}"] if len(places) == 1 else None
    elif found := re.fullmatch(r"Is there an? (.+) in the picture\?", question):
        return ["yes" if any(name == found[1] for _, name, _ in named) else "no"]
    else:
        return None
    return colours if len(colours) == 1 else None


def figures(rows: Sequence[dict[str, Any]], scenes: dict[str, Scene]) -> dict[str, Any]:
    """Return by least share of agreeing answers how many questions there are, and the share that is right."""
    asked = [row for row in rows if row["answer"] is not None]
    known = [(row, truth) for row in asked if (truth := true_answers(row["question"], scenes[row["image_id"]]))]
    by_share = {}
    for share in SHARES:
        right = [exact_match(row["answer"], truth) for row, truth in known if row["share"] >= share]
        by_share[f"{share:g}"] = {"num_questions": len(right), "right": sum(right) / max(1, len(right))}
    return {"num_rows": len(rows), "num_known": len(known), "by_share": by_share}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run of recipe self_questions on the toy world")
    run = RunDir.of(str(Path(parser.parse_args().run).absolute()))
    seed = read_record(run).config["seed"]
    index = (run / "pool").read_table("index", INDEX, ["image_id", "path"]).to_pylist()
    scenes = {
        row["image_id"]: sample_scene(seed, POOL_FIRST_INDEX + int(PurePosixPath(row["path"]).stem)) for row in index
    }
    print(json.dumps(figures((run / "questions").read_table("questions", QUESTIONS).to_pylist(), scenes), indent=1))


if __name__ == "__main__":
    main()
