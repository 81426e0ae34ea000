"""Which requests share a forward pass."""

import itertools
import random
import weakref

import pytest

from stic_ray.core.errors import EngineError
from stic_ray.engines.batching import BatchLimits, FittingBatches, plan_batches


def drawn(seed: int) -> tuple[list[int], list[str], BatchLimits]:
    """Rows of many lengths, most of them in pairs, and limits that some of the rows are too long for."""
    generator = random.Random(seed)
    num_rows = generator.randint(1, 60)
    lengths = [generator.choice([generator.randint(5, 50), generator.randint(200, 900)]) for _ in range(num_rows)]
    groups = [generator.choice(["", f"image {row // 2}"]) for row in range(num_rows)]
    return lengths, groups, BatchLimits(generator.randint(1, 9), generator.choice([None, generator.randint(40, 4000)]))


@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_in_one_batch_and_every_batch_is_within_the_limits(seed: int) -> None:
    lengths, groups, limits = drawn(seed)
    batches = plan_batches(lengths, groups, limits)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= limits.num_rows
        if limits.num_positions is not None and len(batch) > 1:
            assert len(batch) * max(lengths[row] for row in batch) <= limits.num_positions
    assert plan_batches(lengths, groups, limits) == batches, "the same rows are batched alike when done again"


@pytest.mark.parametrize("seed", range(40))
def test_rows_of_one_image_travel_together_where_two_fit(seed: int) -> None:
    lengths, groups, limits = drawn(seed)
    for batch in plan_batches(lengths, groups, limits):
        for row in batch:
            partners = [each for each in range(len(groups)) if groups[each] and groups[each] == groups[row]]
            if partners and limits.most_rows(max(lengths[each] for each in partners)) >= len(partners):
                assert set(partners) <= set(batch)


def test_long_rows_make_small_batches_and_short_ones_large() -> None:
    lengths = [100, 10, 10, 100, 10, 10, 10]
    assert plan_batches(lengths, [""] * 7, BatchLimits(16, 200)) == [[0, 3], [1, 2, 4, 5, 6]]
    assert plan_batches(lengths, [""] * 7, BatchLimits(2, None)) == [[0, 3], [1, 2], [4, 5], [6]]


def test_nothing_is_no_batch() -> None:
    assert plan_batches([], [], BatchLimits(4, 100)) == []


def test_half_of_what_did_not_fit_is_the_new_limit() -> None:
    assert BatchLimits(16, None).halved(5, 100) == BatchLimits(2, None)
    shrunk = BatchLimits(16, 4000).halved(8, 300)
    assert shrunk == BatchLimits(16, 1200)
    assert shrunk.most_rows(300) == 4
    assert shrunk.most_rows(100) == 12, "short rows are not made to suffer for long ones"


def answers_of(batch: list[int], most: int, tried: list[int]) -> list[str]:
    tried.append(len(batch))
    if len(batch) > most:
        raise MemoryError(f"{len(batch)} do not fit")
    return [f"answer {row}" for row in batch]


def test_a_batch_that_does_not_fit_is_halved_and_the_size_kept(caplog: pytest.LogCaptureFixture) -> None:
    batches, tried = FittingBatches(BatchLimits(16, None)), []
    for _ in range(2):
        found = batches.run(range(10), [5] * 10, [""] * 10, lambda batch: answers_of(batch, 3, tried))
        assert found == {row: f"answer {row}" for row in range(10)}
    assert tried == [10, 5, *[2] * 10]
    said = [record.message for record in caplog.records]
    assert said == [f"out of memory with {n} requests of 5 tokens, going on with half of them" for n in (10, 5)]


def test_one_row_that_does_not_fit_is_an_error_of_its_own() -> None:
    batches = FittingBatches(BatchLimits(16, None))
    with pytest.raises(EngineError, match="out of memory with a single request of about 7 tokens: 1 do not fit"):
        batches.run([0, 1], [7, 7], ["", ""], lambda batch: answers_of(batch, 0, []))


def test_memory_is_given_back_when_the_batch_that_did_not_fit_is_gone() -> None:
    """Else what it had allocated would still be held, by the traceback of its error."""
    held: list[weakref.ref[Allocated]] = []
    released: list[bool] = []

    def work(batch: list[int]) -> list[int]:
        allocated = Allocated()
        held.append(weakref.ref(allocated))
        if len(batch) > 2:
            raise MemoryError("does not fit")
        return batch

    batches = FittingBatches(BatchLimits(8, None), release=lambda: released.append(held[-1]() is None))
    assert batches.run(range(8), [5] * 8, [""] * 8, work) == {row: row for row in range(8)}
    assert released == [True, True]


def test_larger_batches_are_tried_again_and_more_seldom_where_they_do_not_fit() -> None:
    batches, tried, most = FittingBatches(BatchLimits(8, None)), [], 2

    def work(batch: list[int]) -> list[str]:
        return answers_of(batch, most, tried)

    for _ in range(350):
        batches.run(range(2), [5] * 2, [""] * 2, work)
        batches.run(range(8), [5] * 8, [""] * 8, lambda batch: answers_of(batch, most, tried))
    too_large = [place for place, size in enumerate(tried) if size > most]
    gaps = [later - earlier for earlier, later in itertools.pairwise(too_large)]
    assert sorted(gaps)[-1] >= 400 and len(too_large) < 12, "100 batches, then 200, 400, ..."
    most = 8
    for _ in range(2000):
        batches.run(range(8), [5] * 8, [""] * 8, work)
    assert batches.limits == BatchLimits(8, None), "what was asked for, and no more"


def test_limits_by_positions_grow_within_what_was_asked_for() -> None:
    assert BatchLimits(16, 1200).doubled(BatchLimits(16, 4000)) == BatchLimits(16, 2400)
    assert BatchLimits(16, 2400).doubled(BatchLimits(16, 4000)) == BatchLimits(16, 4000)
    assert BatchLimits(2, None).doubled(BatchLimits(16, None)) == BatchLimits(4, None)


class Allocated:
    """Stands for a batch's tensors."""
