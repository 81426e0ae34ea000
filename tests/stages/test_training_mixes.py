"""Trainings on several sources: what is read of each, in which order, until when."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from stic_ray.core.config import ModelConfig, RunConfig
from stic_ray.core.errors import ConfigError, SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INFUSED, table_of
from stic_ray.core.steps import StepRun
from stic_ray.core.workload import ModelSize, Sizes
from stic_ray.engines.sequences import ProcessorCounter
from stic_ray.stages.sft import SFT, sources_of
from stic_ray.stages.training.building import make_sft_trainer
from stic_ray.stages.training.data import Example, ParquetRows
from stic_ray.stages.training.index import Rows, index_conversations
from stic_ray.stages.training.mixing import MixedRows, plan
from tests.stages.test_training_batches import config_for, encoded, picture


def write_source(folder: Path, name: str, lengths: Sequence[int], *, with_image: bool, shard: int = 7) -> RunDir:
    """Write rows whose lengths, as they are recorded, are given; each says its source and number."""
    run = RunDir.of(str(folder / name))
    family = "rows" if with_image else "text"
    rows: list[dict[str, Any]] = [
        {
            "id": f"{name} {number}",
            "image": {"bytes": encoded(number % 5), "path": None} if with_image else None,
            "messages": conversation(f"{name} {number}", 1 + number % 4),
            "num_sequence_tokens": length,
            "model": "m",
        }
        for number, length in enumerate(lengths)
    ]
    for number, begin in enumerate(range(0, len(rows), shard)):
        run.write_shard(family, number, table_of(rows[begin : begin + shard], INFUSED), INFUSED)
    return run


def conversation(question: str, num_sentences: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "There is a red circle. " * num_sentences},
    ]


def write_real(folder: Path, model: Path, name: str, number: int, *, with_image: bool) -> RunDir:
    """Write rows with the lengths that a stage would record."""
    counter = ProcessorCounter(ModelConfig(path=str(model)))
    added = counter.count_added_tokens([picture(each % 5) for each in range(number)]) if with_image else [0] * number
    lengths = [
        counter.count_text_tokens(conversation(f"{name} {each}", 1 + each % 4), with_image=with_image) + added[each]
        for each in range(number)
    ]
    return write_source(folder, name, lengths, with_image=with_image)


def planned(config: RunConfig, *sources: RunDir) -> Rows:
    return plan(config, index(config, *sources))


def index(config: RunConfig, *sources: RunDir) -> Rows:
    shards = {run.location.name: [*run.shards("rows"), *run.shards("text")] for run in sources}
    return index_conversations(config, shards)


def mixed(folder: Path, **sft: Any) -> RunConfig:
    return config_for(folder, sft={"num_held_out": 0, "global_batch": 8, **sft})


def names_of(examples: Sequence[Example]) -> list[str]:
    return [row["messages"][0]["content"] for row in examples]


def facts_of(rows: Rows) -> Mapping[str, Any]:
    assert rows.plan is not None
    return rows.plan.facts["sources"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """40 rows with images of 100 to 139 tokens, and 200 of text with 5 to 44."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        write_source(folder, "pictures", [100 + number for number in range(40)], with_image=True),
        write_source(folder, "text", [5 + number % 40 for number in range(200)], with_image=False),
    ]


@pytest.mark.parametrize("unit", ["rows", "tokens"])
@pytest.mark.parametrize("weights", [(1, 3), (9, 1), (1, 99)])
def test_shares_are_as_asked_after_a_few_steps_and_after_a_thousand(
    unit: str, weights: tuple[int, int], sources: list[RunDir], tmp_path: Path
) -> None:
    mix = dict(zip(("pictures", "text"), weights, strict=True))
    asked = weights[0] / sum(weights)
    for num_steps, tolerance in ((30, 0.05), (1000, 0.001)):
        rows = planned(mixed(tmp_path, mix=mix, mix_unit=unit, num_steps=num_steps), *sources)
        found = facts_of(rows)
        assert abs(found["pictures"][f"{unit[:-1]}_share"] - asked) < tolerance
        assert found["pictures"][f"asked_{unit[:-1]}_share"] == pytest.approx(asked)
        assert sum(each["num_rows"] for each in found.values()) == 8 * num_steps
        assert rows.plan is not None and rows.plan.num_steps == num_steps


def test_every_pass_has_each_row_once_and_no_pass_is_like_another(sources: list[RunDir], tmp_path: Path) -> None:
    """A source that is smaller than its share repeats, a larger one is not used up."""
    rows = planned(mixed(tmp_path, mix={"pictures": 1, "text": 1}, num_steps=20), *sources)
    read = names_of(list(MixedRows(rows, ["messages", "image"], 0)))
    pictures, texts = ([name for name in read if name.startswith(kind)] for kind in ("pictures", "text"))
    assert len(pictures) == len(texts) == 80 and len(set(texts)) == 80
    first, second = pictures[:40], pictures[40:]
    assert set(first) == set(second) == {f"pictures {number}" for number in range(40)} and first != second
    assert first != sorted(first, key=lambda name: int(name.split()[1]))
    assert facts_of(rows)["pictures"]["num_passes"] == 2.0 and facts_of(rows)["text"]["num_passes"] == 0.4
    again = planned(mixed(tmp_path, mix={"pictures": 1, "text": 1}, num_steps=20), *sources)
    assert names_of(list(MixedRows(again, ["messages", "image"], 0))) == read
    assert names_of(list(MixedRows(again, ["messages", "image"], 1))) != read


def test_the_lengths_that_were_planned_are_those_of_the_rows_that_come(sources: list[RunDir], tmp_path: Path) -> None:
    settings = {"mix": {"pictures": 2, "text": 1}, "mix_unit": "tokens", "num_tokens": 20_000}
    rows = planned(mixed(tmp_path, **settings), *sources)
    assert rows.plan is not None
    columns = ["messages", "image", "num_sequence_tokens"]
    lengths = [row["num_sequence_tokens"] for row in MixedRows(rows, columns, 0)]
    assert len(lengths) == 8 * rows.plan.num_steps
    assert sum(lengths) == rows.plan.facts["num_tokens"] >= 20_000 > sum(lengths[:-8]), "and not a step more"
    assert facts_of(rows)["pictures"]["token_share"] == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("unit", ["rows", "tokens"])
def test_shares_move_evenly_from_the_first_step_to_the_last(unit: str, sources: list[RunDir], tmp_path: Path) -> None:
    """Pictures come in from nothing, as in a curriculum that begins with text."""
    settings = {"mix": {"pictures": 0, "text": 1}, "mix_end": {"pictures": 1, "text": 1}, "mix_unit": unit}
    rows = planned(mixed(tmp_path, **settings, num_steps=200), *sources)
    assert rows.plan is not None and rows.plan.sources is not None
    dataset = MixedRows(rows, ["messages", "image", "num_sequence_tokens"], 0)
    amounts = np.array([row["num_sequence_tokens"] if unit == "tokens" else 1 for row in dataset])
    shares = []
    for quarter in np.split(np.arange(1600), 4):
        own = amounts[quarter] * (rows.plan.sources[quarter] == 0)
        shares.append(own.sum() / amounts[quarter].sum())
    assert shares == pytest.approx([0.0625, 0.1875, 0.3125, 0.4375], abs=0.04)
    found = facts_of(rows)["pictures"]
    asked = found[f"asked_{unit[:-1]}_share"]
    assert asked == pytest.approx(found[f"{unit[:-1]}_share"], abs=0.002)
    assert unit == "tokens" or asked == pytest.approx(0.25)


@pytest.mark.parametrize(("num_workers", "micro_batch"), [(1, 4), (2, 2), (4, 1)])
def test_every_number_of_workers_sees_the_same_batches_and_a_resume_the_rest(
    num_workers: int, micro_batch: int, sources: list[RunDir], tmp_path: Path
) -> None:
    rows = planned(mixed(tmp_path, mix={"pictures": 2, "text": 1}, num_steps=12), *sources)
    whole = names_of(list(MixedRows(rows, ["messages", "image"], 3)))
    at_once = 8 // num_workers // micro_batch
    for skip in (0, 7):
        parts = []
        for rank in range(num_workers):
            plain = DataLoader(MixedRows(rows, ["messages", "image"], 3), batch_size=micro_batch, collate_fn=names_of)
            own = prepare_data_loader(plain, num_processes=num_workers, process_index=rank, put_on_device=False)
            own = skip_first_batches(own, skip * at_once) if skip else own
            batches = list(own)
            parts.append([sum(batches[start : start + at_once], []) for start in range(0, len(batches), at_once)])
        steps = [sorted(sum(each, [])) for each in zip(*parts, strict=True)]
        assert steps == [sorted(whole[start : start + 8]) for start in range(8 * skip, 96, 8)]


def test_a_source_is_read_by_a_bounded_number_of_row_groups(sources: list[RunDir], tmp_path: Path) -> None:
    rows = planned(mixed(tmp_path, mix={"pictures": 2, "text": 1}, num_steps=20), *sources)
    dataset = MixedRows(rows, ["messages", "image"], 0)
    for index in range(len(dataset)):
        dataset[index]
        assert sum(len(passes._tables) for passes in dataset._passes) <= 16


def row_groups_of(worker: int, micro_batch: int, dataset: MixedRows | ParquetRows) -> tuple[int, int, set[str]]:
    """Return how many row groups one of 8 workers reads and has at once, and the sources of its rows in a few steps."""
    kept = [passes._tables for passes in dataset._passes] if isinstance(dataset, MixedRows) else [dataset._tables]
    plain = DataLoader(dataset, batch_size=micro_batch, collate_fn=list)
    own = prepare_data_loader(plain, num_processes=8, process_index=worker, put_on_device=False)
    held: set[tuple[int, int]] = set()
    num_read, most, kinds = 0, 0, set[str]()
    for place in chain.from_iterable(own.batch_sampler or ()):
        row = dataset[place]
        kinds |= {row["messages"][0]["content"].split()[0]} if place < 4 * 32 else set()
        now = {(number, group) for number, tables in enumerate(kept) for group in tables}
        num_read, most, held = num_read + len(now - held), max(most, len(now)), now
    return num_read, most, kinds


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """Two sources of 40 row groups each."""
    folder = tmp_path_factory.mktemp("halves")
    return [write_source(folder, name, [5] * 320, with_image=False, shard=8) for name in ("one", "other")]


@pytest.mark.parametrize(
    ("weight", "micro_batch", "num_read", "most"), [(1, 4, 10, 2), (1, 2, 20, 4), (3, 4, 13, 4), (3, 2, 24, 6)]
)
def test_a_worker_reads_about_as_few_row_groups_as_without_a_mix(
    weight: int, micro_batch: int, num_read: int, most: int, halves: list[RunDir], tmp_path: Path
) -> None:
    """Of 80 row groups; and every worker has rows of both sources."""
    config = mixed(tmp_path, mix={"one": weight, "other": 1}, num_steps=20, global_batch=32)
    rows, trained = planned(config, *halves), index(config, *halves).trained
    for worker in range(8):
        found = row_groups_of(worker, micro_batch, MixedRows(rows, ["messages", "image"], 0))
        assert found[0] <= num_read and found[1] <= most and found[2] == {"one", "other"}
        without = ParquetRows(trained, ["messages", "image"], global_batch=32)
        assert row_groups_of(worker, micro_batch, without)[:2] == (10, 2)


def test_without_a_mix_all_rows_come_once_an_epoch_in_the_order_of_one_source(
    sources: list[RunDir], tmp_path: Path
) -> None:
    config = mixed(tmp_path)
    rows = planned(config, *sources)
    shards = [shard for run in sources for shard in (*run.shards("rows"), *run.shards("text"))]
    joined = index_conversations(config, {"both": shards})
    assert rows.trained == joined.trained and plan(config, joined).plan is None
    assert facts_of(rows)["text"] == {
        "num_rows": 200,
        "row_share": 200 / 240,
        "num_tokens": sum(5 + number % 40 for number in range(200)),
        "token_share": pytest.approx(4900 / (4900 + 4780)),
        "num_passes": 1.0,
    }
    assert rows.plan is not None and rows.plan.num_steps == 30


@pytest.mark.parametrize("budget", [3_000, 9_680, 25_000])
def test_a_budget_of_tokens_ends_with_the_step_that_spends_it(
    budget: int, sources: list[RunDir], tmp_path: Path
) -> None:
    """Less than an epoch, a whole one, and more than two; rows that fill up the last batch count for nothing."""
    config = mixed(tmp_path, num_tokens=budget, global_batch=7)
    rows = planned(config, *sources)
    assert rows.plan is not None and rows.plan.sources is None
    dataset = ParquetRows(rows.trained, ["image", "num_sequence_tokens"], seed=config.seed, global_batch=7)
    read: list[int] = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        read += [row["num_sequence_tokens"] * (row["weight"] > 0) for row in dataset]
    steps = np.array(read).reshape(-1, 7).sum(1).cumsum()
    assert rows.plan.num_steps == int((steps < budget).sum()) + 1
    assert rows.plan.facts["num_tokens"] == steps[rows.plan.num_steps - 1]
    single = planned(config, sources[1])
    assert single.plan is not None and list(single.plan.facts["sources"]) == ["text"]


def test_rows_are_held_out_of_every_source(sources: list[RunDir], tmp_path: Path) -> None:
    other = write_source(tmp_path, "other", [9] * 100, with_image=False, shard=50)
    rows = index(mixed(tmp_path, num_held_out=5), other, sources[1])
    kinds = Counter(name.split()[0] for name in names_of(list(ParquetRows(rows.held_out, ["messages", "image"]))))
    assert kinds == {"other": 2, "text": 3}


def step(config: RunConfig, folder: Path, **inputs: RunDir) -> StepRun:
    return StepRun("sft", config, RunDir.of(str(folder)), {role.replace("_", ":"): run for role, run in inputs.items()})


@pytest.mark.parametrize(
    ("sft", "told"),
    [
        ({"mix": {"pictures": 1, "txet": 1}}, r"sft\.mix names 'txet', which is no source\. .*'text'.* Sources of"),
        ({"mix": {"pictures": 1, "text": 1}}, r"sft\.mix says nothing of 'more'"),
    ],
)
def test_a_mix_that_does_not_fit_the_inputs_is_refused(
    sft: dict[str, Any], told: str, sources: list[RunDir], tiny_llava: Path, tmp_path: Path
) -> None:
    pictures, text = sources
    asked = step(mixed(tiny_llava, **sft), tmp_path, rows=pictures, rows_text=text, rows_more=text)
    with pytest.raises(ConfigError, match=told) as caught:
        SFT.check(asked)
    assert "\n" not in str(caught.value)


def test_sources_have_the_names_of_their_roles_or_folders(
    sources: list[RunDir], tiny_llava: Path, tmp_path: Path
) -> None:
    pictures, text = sources
    assert list(sources_of(step(mixed(tiny_llava), tmp_path, rows=pictures, rows_words=text))) == ["pictures", "words"]
    with pytest.raises(ConfigError, match="two sources 'text': give one the role rows:NAME"):
        sources_of(step(mixed(tiny_llava), tmp_path, rows=text, rows_text=text))
    alone = step(mixed(tiny_llava, mix={"pictures": 1, "text": 2}), tmp_path, rows=pictures)
    with pytest.raises(ConfigError, match=r"sft\.mix needs several sources\. Sources of step 'sft': pictures\."):
        SFT.check(alone)


@pytest.mark.parametrize("sft", [{"num_tokens": 100}, {"mix": {"old": 1, "text": 1}, "mix_unit": "tokens"}])
def test_tokens_cannot_be_counted_where_lengths_are_not_known(
    sft: dict[str, Any], sources: list[RunDir], tmp_path: Path
) -> None:
    old = write_source(tmp_path, "old", [0, 0], with_image=False)
    with pytest.raises(SourceError, match=r"^sft\.\w+=\w+ needs the length of every row.*num_sequence_tokens"):
        planned(mixed(tmp_path, **sft), old, sources[1])
    by_rows = planned(mixed(tmp_path, mix={"old": 1, "text": 1}, num_steps=4), old, sources[1])
    assert facts_of(by_rows)["old"] == {
        "num_rows": 16,
        "row_share": 0.5,
        "asked_row_share": pytest.approx(0.5),
        "num_passes": 8.0,
    }
    with pytest.raises(SourceError, match="Source 'gone' left no rows"):
        planned(mixed(tmp_path), sources[1], RunDir.of(str(tmp_path / "gone")))


def test_the_estimate_knows_how_many_rows_a_budget_is() -> None:
    model = ModelSize(1e9, 100, 1.0)
    sizes = Sizes(model, None, None, None, num_prompt_tokens=150, num_answer_tokens=50, image_bytes=0)
    config = mixed(Path("model"), num_tokens=43_200)
    work = SFT.work(config, sizes)
    assert work is not None and work.num_rows == 43_200 / (150 + 50 + 16)
    assert work.row_flops > 0
    by_steps, unknown = (SFT.work(mixed(Path("model"), **each), sizes) for each in ({"num_steps": 5}, {}))
    assert by_steps is not None and by_steps.num_rows == 40 and unknown is None
    known = SFT.work(mixed(Path("model"), num_epochs=3), replace(sizes, num_instructions=70))
    assert known is not None and known.num_rows == 210


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> list[RunDir]:
    folder = tmp_path_factory.mktemp("real")
    return [
        write_real(folder, tiny_llava, "pictures", 6, with_image=True),
        write_real(folder, tiny_llava, "text", 14, with_image=False),
    ]


MIX = {"mix": {"pictures": 1, "text": 1}, "mix_unit": "tokens", "num_steps": 6, "learning_rate": 0.01}


def test_a_mix_trains_and_goes_on_bit_for_bit(real: list[RunDir], tiny_llava: Path, tmp_path: Path) -> None:
    """The tokens that the plan counts are those that the model reads."""
    config = mixed(tiny_llava, **MIX)
    config = config.model_copy(update={"workers": config.workers.model_copy(update={"save_every_steps": 3})})
    rows = planned(config, *real)
    whole: Any = make_sft_trainer(config, rows, tmp_path / "whole")
    read: list[int] = []
    whole.speed.count = lambda batch: read.append(int(batch["attention_mask"].sum()))
    whole.speed.figures = lambda every: {}
    whole.train()
    assert rows.plan is not None and sum(read) == rows.plan.facts["num_tokens"]
    again: Any = make_sft_trainer(config, rows, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    found = [[each["loss"] for each in one.state.log_history if "loss" in each] for one in (whole, again)]
    assert len(found[0]) == 6 and found[0] == found[1]


@pytest.mark.usefixtures("ray_session")
def test_what_was_read_of_each_source_is_in_result_and_manifest(
    real: list[RunDir], tiny_llava: Path, tmp_path: Path
) -> None:
    pictures, text = real
    workers = {"num_workers": 2, "micro_batch": 2, "zero_stage": 0}
    config = config_for(tiny_llava, sft={"num_held_out": 0, "global_batch": 8, **MIX}, workers=workers)
    asked = step(config, tmp_path / "sft", rows=pictures, rows_text=text)
    SFT.check(asked)
    accounts = SFT.run(asked)
    result = asked.output.read_json("result.json")
    expected = planned(config, pictures, text).plan
    assert expected is not None
    assert accounts["sources"] == result["sources"] == json.loads(json.dumps(expected.facts["sources"]))
    assert accounts["num_tokens"] == result["num_tokens"] == expected.facts["num_tokens"]
    assert result["num_steps"] == 6 and result["num_rows"] == 20
    assert result["sources"]["text"]["token_share"] == pytest.approx(0.5, abs=0.05)
