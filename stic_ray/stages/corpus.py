"""Stage `corpus`: what each image is described with in training, of its source's caption and what models wrote of it.

Reads the captions of all rounds so far and takes the last of each kind. rows-*.parquet is what stage `sft` reads;
provenance-*.parquet says of each row where its text came from.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from stic_ray.core.config import RunConfig
from stic_ray.core.placement import Need, actors_need, without_gpus
from stic_ray.core.rounds import SPECIALIST
from stic_ray.core.rundir import read_shard
from stic_ray.core.schemas import CAPTIONS, INFUSED, PROVENANCE
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import BYTES_PER_TEXT_TOKEN, Sizes, Work
from stic_ray.engines.opening import open_counter
from stic_ray.method.candidates import filed_under
from stic_ray.method.captions import Target, newest, recaptions_of, target_of
from stic_ray.method.images import decode_for_storage
from stic_ray.method.prompts import PromptSet, load_prompts
from stic_ray.stages.fetch import fetch_indexed, fetched, indexed_tasks, num_images_of, read_indexed, with_images
from stic_ray.stages.lengths import check_length, sequence_length
from stic_ray.stages.rated import shards_by_number
from stic_ray.stages.shards import ShardJob, ShardTask, check_written, run_shards
from stic_ray.stages.tasks import map_tasks
from stic_ray.stages.windows import Rows

Messages = list[dict[str, str]]


def build_corpus(step: StepRun) -> dict[str, Any]:
    """Write rows and rejected shards into the step's folder and return the manifest's row accounts.

    Beside them it counts by source what the texts are made of, their words, and the turns of specialists. Raises
    SourceError when no image has a caption.
    """
    config, output = step.config, step.output
    tasks = indexed_tasks(step.inputs["index"], config.pool.shard_size, config.captions.num_images)
    # A round that was begun and then left out has no manifest.
    captions = [shards_by_number(place, "captions") for place in step.all("captions") if place.manifest is not None]
    for number, task in enumerate(tasks):
        uris = [shards[task.number].uri for shards in captions if task.number in shards]
        tasks[number] = replace(task, payload={**task.payload, "captions": uris})
    job = ShardJob(
        stage=step.name,
        output=output,
        families={"rows": INFUSED, "provenance": PROVENANCE},
        beside=("provenance",),
        load=partial(_load, config=config),
        make_worker=partial(_Writer, config, load_prompts(config.prompts)),
        max_failed_share=config.cluster.max_failed_share,
    )
    done = run_shards(job, tasks, config.actors.model_copy(update={"num_gpus": 0.0}))
    accounts = done.accounts(num_images_of(tasks))
    check_written(accounts, output, f"Not one of {num_images_of(tasks)} images can be trained on")
    counts = sum(map_tasks(step.name, _count, [(each,) for each in output.shards("provenance")]), Counter())
    num_rows, num_words = accounts["num_rows_written"], counts.pop("num_words", 0)
    return {
        **accounts,
        "num_by_source": {name: counts[name] for name in ("original", "recaption", "both")},
        "num_specialist_turns": counts["num_specialist_turns"],
        "num_words_per_text": num_words / num_rows,
    }


def _count(shard: Location) -> Counter[str]:
    table = read_shard(shard, PROVENANCE)
    counts = Counter(table["source"].to_pylist())
    for name in ("num_words", "num_specialist_turns"):
        counts[name] += sum(table[name].to_pylist())
    return counts


def _load(task: ShardTask, config: RunConfig) -> pa.Table:
    """Return the images of a shard with their bytes, their captions, and the caption of theirs that is taken."""
    index = read_indexed(task)
    rows = index.to_pylist()
    captions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for uri in task.payload["captions"]:
        for row in read_shard(Location.of(uri), CAPTIONS).to_pylist():
            captions[row["image_id"]].append(row)
    recaptions = recaptions_of(captions, shuffle=config.corpus.shuffle)
    columns = {
        "captions": pa.array([captions[row["image_id"]] for row in rows], pa.list_(pa.struct([*CAPTIONS]))),
        "recaption": pa.array([recaptions.get(row["image_id"]) for row in rows], pa.string()),
    }
    table = with_images(index, fetch_indexed(rows, config.pool.image_column))
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


class _Described(NamedTuple):
    """An image with the conversation that is trained on."""

    row: dict[str, Any]
    target: Target
    messages: Messages
    stored: bytes
    num_tokens: int


class _Writer:
    """Writes rows; owns a tokenizer."""

    engine = None

    def __init__(self, config: RunConfig, prompts: PromptSet) -> None:
        self.config = config
        self.prompts = prompts
        self.counter = open_counter(config.model)

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        return [{"image_id": row["image_id"], "path": row["path"]}]

    def prepare(self, row: dict[str, Any]) -> _Described:
        image_id, seed = row["image_id"], self.config.seed
        target = target_of(image_id, row["caption"], row["recaption"], self.config.corpus, seed)
        messages = [*_turn(filed_under(image_id, seed, self.prompts), target.text), *_specialist_turns(row["captions"])]
        picture, stored = decode_for_storage(fetched(row))
        length = sequence_length(self.counter, messages, self.counter.count_added_tokens([picture])[0])
        check_length(length, self.config.sft.max_length_tokens, "sft.max_length_tokens")
        return _Described(row, target, messages, stored, length)

    def answer(self, prepared: Sequence[_Described]) -> Sequence[None]:
        return [None] * len(prepared)

    def finish(self, prepared: _Described, answer: None) -> Rows:
        row = prepared.row
        written = {
            "id": row["image_id"],
            "image": {"bytes": prepared.stored, "path": row["path"]},
            "messages": prepared.messages,
            "description": None,
            "description_prompt": None,
            "finish_reason": None,
            "num_sequence_tokens": prepared.num_tokens,
            "model": None,
        }
        provenance = {
            "image_id": row["image_id"],
            "source": prepared.target.source,
            "num_words": len(prepared.target.text.split()),
            "num_specialist_turns": len(prepared.messages) // 2 - 1,
        }
        return {"rows": [written], "provenance": [provenance]}


def _turn(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _specialist_turns(captions: Sequence[dict[str, Any]]) -> Messages:
    """Return the answers of specialists as further turns, ordered by kind (VILA² section 3.2)."""
    kinds = sorted({each["kind"] for each in captions if each["kind"].startswith(SPECIALIST)})
    return [turn for kind in kinds for each in newest(captions, kind) for turn in _turn(each["prompt"], each["text"])]


def _need(config: RunConfig) -> Need:
    """Return the actors; without a model a GPU would only be held."""
    return without_gpus(actors_need(config))


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    if not sizes.num_images:
        return None
    num_images = min(sizes.num_images, config.captions.num_images or sizes.num_images)
    text = BYTES_PER_TEXT_TOKEN * min(sizes.num_answer_tokens, config.captions.max_new_tokens)
    return Work(num_images, storage_bytes=num_images * (sizes.image_bytes + text))


CORPUS_STAGE = Stage(
    name="corpus",
    run=build_corpus,
    settings=("seed", "prompts", "model", "corpus", "captions.num_images", "sft.max_length_tokens", "pool.shard_size"),
    need=_need,
    writes="rows-*.parquet",
    section="corpus",
    reads=("index", "captions"),
    work=_work,
    amount="num_images",
    grows=True,
)
