"""What the toy world's model can and cannot do, on tuning scenes: is there something that verification could find?

python -m experiments.toyworld_teacher

Writes docs/results/toyworld_teacher.json, on which docs/toyworld.md reports.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from PIL import Image

from experiments.toyworld_descriptions import split
from stic_ray.core.config import ActorsConfig, ModelConfig
from stic_ray.core.randomness import seed_for
from stic_ray.engines.base import Request, Sampling
from stic_ray.engines.guarded import GuardedEngine
from stic_ray.engines.opening import open_engine
from stic_ray.method.scoring import exact_match, hallucinated_share, named_objects, object_f1, read_yes_no
from stic_ray.toyworld import WEIGHTS
from stic_ray.toyworld.assets import BENCHMARKS_FIRST_INDEX
from stic_ray.toyworld.language import (
    DISTRACTORS,
    PLACES,
    PROMPTS,
    QUESTION_KINDS,
    Distractor,
    Question,
    absent_kind,
    ask,
    ask_claim,
    ask_presence,
    brief,
    name_of,
)
from stic_ray.toyworld.scenes import (
    COMPANIONS,
    KIND_WEIGHTS,
    NUM_CELLS,
    WILD_NOISE,
    Scene,
    draw_scene,
    random_for,
    sample_scene,
)

NUM_SAMPLES = 8
TEMPERATURE = 0.7
_MAX_NEW_TOKENS = 96
_VOCABULARY = [name_of(kind) for kind in KIND_WEIGHTS]

Pictures = Sequence[tuple[Scene, Image.Image]]


def measure(engine: GuardedEngine, num_scenes: int) -> dict[str, dict[str, float]]:
    """Return all measures, by what is asked for."""
    scenes = [sample_scene(0, BENCHMARKS_FIRST_INDEX["tuning"] + number) for number in range(num_scenes)]
    pictures = [(scene, draw_scene(scene, max_noise=WILD_NOISE)) for scene in scenes]
    found = {part: _descriptions(engine, pictures, part) for part in ("step_by_step", "plain", "hallucination")}
    questions: dict[str, Callable[[Scene], Question]] = {
        **{f"presence, {distractor}": partial(presence, distractor) for distractor in DISTRACTORS},
        "claim, true": true_claim,
        "claim, companion": companion_claim,
        **{kind: lambda s, kind=kind: ask(s, kind, random_for(s.seed, s.index, kind)) for kind in QUESTION_KINDS},
    }
    found["questions"] = {name: _accuracy(engine, pictures, make) for name, make in questions.items()}
    found["split"] = {"equal": _split(engine, pictures)}
    return found


def _answers(engine: GuardedEngine, asked: Sequence[tuple[str, Image.Image]], temperature: float = 0.0) -> list[str]:
    requests = [Request(prompt, image, seed_for(0, str(i), "teacher")) for i, (prompt, image) in enumerate(asked)]
    return [answer.text for answer in engine.generate(requests, Sampling(_MAX_NEW_TOKENS, temperature))]


def _descriptions(engine: GuardedEngine, pictures: Pictures, part: str) -> dict[str, float]:
    """Return F1 and hallucination of greedy and sampled descriptions, and how often samples have the companion."""
    prompt = PROMPTS[part][0]
    greedy = _answers(engine, [(prompt, image) for _, image in pictures])
    texts = _answers(engine, [(prompt, image) for _, image in pictures for _ in range(NUM_SAMPLES)], TEMPERATURE)
    samples = [texts[start : start + NUM_SAMPLES] for start in range(0, len(texts), NUM_SAMPLES)]
    names = [[name_of(item.kind) for item in scene.objects] for scene, _ in pictures]
    scores = [[object_f1(text, n, _VOCABULARY) for text in row] for row, n in zip(samples, names, strict=True)]
    return {
        "f1_greedy": fmean(object_f1(text, n, _VOCABULARY) for text, n in zip(greedy, names, strict=True)),
        "f1_random": fmean(map(fmean, scores)),
        "f1_best_of_8": fmean(map(max, scores)),
        "hallucinated_greedy": fmean(
            hallucinated_share(text, n, _VOCABULARY) for text, n in zip(greedy, names, strict=True)
        ),
        "companion_greedy": _companion_rate([[text] for text in greedy], pictures),
        "companion_sampled": _companion_rate(samples, pictures),
    }


def _companion_rate(samples: Sequence[Sequence[str]], pictures: Pictures) -> float:
    """Return how often a companion is added, of the texts that name something there whose companion is not."""
    added = []
    for texts, (scene, _) in zip(samples, pictures, strict=True):
        companions = {name_of(kind): name_of(other) for kind, other in COMPANIONS.items() if other not in scene.kinds}
        present = {name_of(kind) for kind in scene.kinds}
        for text in texts:
            named = set(named_objects(text, _VOCABULARY))
            if tempting := {companions[name] for name in named & present & companions.keys()}:
                added.append(bool(tempting & named))
    return fmean(added)


def presence(distractor: Distractor, scene: Scene) -> Question:
    """Ask in turn about what is there and what is not."""
    generator = random_for(scene.seed, scene.index, f"presence {distractor}")
    if scene.index % 2:
        return ask_presence(generator.choice(scene.objects).kind, scene)
    return ask_presence(absent_kind(scene, distractor, generator), scene)


def true_claim(scene: Scene) -> Question:
    """Ask after the first thing at its place."""
    return ask_claim(scene.objects[0].kind, scene.objects[0].cell, scene)


def companion_claim(scene: Scene) -> Question:
    """Ask after a companion, or a common thing where there is none to expect, at an empty place."""
    generator = random_for(scene.seed, scene.index, "claim")
    taken = {item.cell for item in scene.objects}
    cell = generator.choice([cell for cell in range(NUM_CELLS) if cell not in taken])
    return ask_claim(absent_kind(scene, "adversarial", generator), cell, scene)


def _accuracy(engine: GuardedEngine, pictures: Pictures, make: Callable[[Scene], Question]) -> float:
    questions = [make(scene) for scene, _ in pictures]
    asked = [(brief(question.text), image) for question, (_, image) in zip(questions, pictures, strict=True)]
    answers = _answers(engine, asked)
    return fmean(
        exact_match(read_yes_no(answer) if question.kind == "is_there" else answer, question.answers)
        for question, answer in zip(questions, answers, strict=True)
    )


def _split(engine: GuardedEngine, pictures: Pictures) -> float:
    """Return the share of the descriptions whose questions are those that a rule makes."""
    described = []
    for part in ("step_by_step", "plain", "hallucination"):
        texts = _answers(engine, [(PROMPTS[part][0], image) for _, image in pictures], TEMPERATURE)
        described += [(text, image) for text, (_, image) in zip(texts, pictures, strict=True) if _is_regular(text)]
    asked = [(PROMPTS["split"].replace("{answer}", text), image) for text, image in described]
    return fmean(found == split(text) for found, (text, _) in zip(_answers(engine, asked), described, strict=True))


def _is_regular(text: str) -> bool:
    """Whether a description has the form of those that the model learnt from."""
    things = [phrase.partition(" at the ") for phrase in text.removesuffix(".").split(", ")]
    return all(place in PLACES and len(thing.split()) >= 3 for thing, _, place in things)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="directory of the model")
    parser.add_argument("--num-scenes", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("docs/results/toyworld_teacher.json"))
    options = parser.parse_args()
    model = open_engine(ModelConfig(path=str(options.model)), ActorsConfig(num_actors=1, batch_size=300))
    table = measure(model, options.num_scenes)
    rounded = {part: {name: round(value, 4) for name, value in values.items()} for part, values in table.items()}
    options.out.write_text(json.dumps({"num_scenes": options.num_scenes, **rounded}, indent=1) + "\n")
    print(json.dumps(rounded, indent=1))
