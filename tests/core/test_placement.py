"""What fits on which machines: numbers, labels, the share of a CPU that tasks need."""

import math
from typing import Any

import pytest

from stic_ray.core.errors import ConfigError
from stic_ray.core.overrides import apply_values
from stic_ray.core.placement import Machines, Need, Node, check_fits, format_unplaced, matches, num_places, unplaced
from stic_ray.core.steps import needs_of
from stic_ray.recipes import demo, stic

SMALL, GPU = Node({"CPU": 4.0}), Node({"CPU": 8.0, "GPU": 2.0}, {"group": "generation", "ray.io/node-id": "f"})


def config(**settings: Any) -> Any:
    return apply_values(demo().config, {key.replace("__", "."): value for key, value in settings.items()})


def needs(settings: Any, *names: str) -> dict[str, Need]:
    return needs_of(settings, stic(settings), names)


@pytest.mark.parametrize(
    ("each", "nodes", "places"),
    [
        ({"CPU": 1.0}, [SMALL], 4),
        ({"CPU": 1.0, "GPU": 1.0}, [SMALL, GPU, GPU], 4),
        ({"CPU": 1.0, "GPU": 0.5}, [GPU], 4),
        ({"CPU": 0.1, "GPU": 0.1}, [GPU], 9),  # at most what is asked for; 20 would fit
        ({"CPU": 1.0, "GPU": 3.0}, [GPU, GPU], 0),  # a model cut over three GPUs of one machine
        ({"CPU": 5.0, "GPU": 1.0}, [GPU], 1),
        ({"CPU": 1.0}, [], 0),
    ],
)
def test_a_process_is_on_one_machine(each: dict[str, float], nodes: list[Node], places: int) -> None:
    assert num_places(Need("workers", 9, each), nodes) == places


def test_actors_leave_a_share_of_a_cpu_for_tasks() -> None:
    actors = Need("actors", 4, {"CPU": 1.0, "GPU": 0.0}, reads_with_tasks=True)
    assert num_places(actors, [SMALL]) == 3
    assert num_places(actors, [Node({"CPU": 4.25})]) == num_places(actors, [SMALL, SMALL]) == 4
    chosen = Need("actors", 4, {"CPU": 4.0, "GPU": 1.0}, {"group": "generation"}, reads_with_tasks=True)
    assert num_places(chosen, [GPU]) == 1 and num_places(chosen, [GPU, SMALL]) == 2, "tasks may be on any machine"


@pytest.mark.parametrize(
    ("strategy", "nodes", "places"),
    [
        ("PACK", [GPU, GPU], 3),
        ("SPREAD", [GPU, GPU], 3),
        ("STRICT_SPREAD", [GPU, GPU], 2),
        ("STRICT_PACK", [GPU, GPU], 2),
        ("STRICT_PACK", [Node({"CPU": 4.0, "GPU": 3.0})], 3),
    ],
)
def test_strict_strategies_are_about_machines(strategy: str, nodes: list[Node], places: int) -> None:
    assert num_places(Need("workers", 3, {"CPU": 1.0, "GPU": 1.0}, placement_strategy=strategy), nodes) == places


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"num_workers": 2}, "2 workers of 1 CPU, 1 GPU, and 1 fit"),
        ({"accelerator_type": "H200"}, r"1 worker of 1 CPU, 1 GPU \(H200\), and 0 fit.*1 x 1 GPU \(H100\)"),
        ({"num_workers": 2, "placement_strategy": "STRICT_SPREAD"}, "each on a node of its own, and 1 fit"),
        ({"accelerator_type": "H100", "placement_strategy": "STRICT_SPREAD"}, None),
    ],
)
def test_workers_ask_for_a_kind_of_gpu_and_for_machines(asked: dict[str, Any], told: str | None) -> None:
    here = Machines("this machine", [Node({"CPU": math.inf, "GPU": 1.0, "accelerator_type:H100": 1.0})])
    values = {"num_workers": 1, "num_gpus": 1, **asked}
    settings = config(**{f"workers__{name}": value for name, value in values.items()})
    if told is None:
        check_fits(needs(settings, "dpo"), here)
        return
    with pytest.raises(ConfigError, match=told):
        check_fits(needs(settings, "dpo"), here)


@pytest.mark.parametrize(
    ("wanted", "labels", "does"),
    [
        ("spot", {"market": "spot"}, True),
        ("spot", {"market": "on-demand"}, False),
        ("spot", {}, False),
        ("!spot", {"market": "spot"}, False),
        ("!spot", {}, True),
        ("in(a, b)", {"market": "b"}, True),
        ("in(a,b)", {"market": "c"}, False),
        ("!in(a, b)", {"market": "a"}, False),
        ("!in(a, b)", {"market": "c"}, True),
    ],
)
def test_selectors_are_read_as_ray_reads_them(wanted: str, labels: dict[str, str], does: bool) -> None:
    assert matches({"market": wanted}, labels) is does


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    asked = config(actors__num_actors=8, actors__num_gpus=1, actors__label_selector={"group": "generation"})
    cluster = Machines("the cluster", [SMALL, GPU, GPU])
    with pytest.raises(ConfigError) as refused:
        check_fits(needs(asked, "preferences", "dpo", "evaluation"), cluster)
    assert str(refused.value) == (
        "preferences, evaluation ask for 8 actors of 1 CPU, 1 GPU on nodes with group=generation, and 0.25 CPU for "
        "tasks, and 4 fit: the cluster has 3 nodes: 1 x 4 CPU; 2 x 8 CPU, 2 GPU [group=generation]. Lower "
        "actors.num_actors, actors.num_gpus or actors.num_cpus; or set RAY_ADDRESS to a cluster that has them."
    )
    check_fits(needs(config(actors__num_actors=8, actors__min_actors=4, actors__num_gpus=1), "preferences"), cluster)
    grows = Machines("the cluster", [SMALL], may_grow=True)
    check_fits(needs(asked, "preferences"), grows)
    assert "preferences asks for 8 actors" in format_unplaced(unplaced(needs(asked, "preferences"), grows), grows)


def test_runs_at_the_same_time_need_their_places_at_the_same_time() -> None:
    cluster = Machines("the cluster", [GPU])
    check_fits(needs(config(), "pool", "preferences", "dpo"), cluster, num_runs=3)
    with pytest.raises(ConfigError, match="preferences asks for 8 actors of 1 CPU, and 0.25 CPU for tasks, and 7 fit"):
        check_fits(needs(config(), "pool", "preferences", "dpo"), cluster, num_runs=4)


def test_each_stage_has_processes_of_its_kind() -> None:
    asked = config(workers__num_gpus=1, workers__label_selector={"group": "training"}, actors__min_actors=1)
    found = needs(asked, "pool", "preferences", "dpo", "infusion", "sft", "evaluation")
    assert [need.what for need in found.values()] == ["tasks", "actors", "workers", "actors", "workers", "actors"]
    assert str(needs(asked, "sft")["sft"]) == "2 workers of 1 CPU, 1 GPU on nodes with group=training"
    assert needs(asked, "infusion")["infusion"].num == 1
    assert needs(asked, "preferences")["preferences"].label_selector == {}


@pytest.mark.parametrize("value", ["in(a", "a b", "!!a", "", 3])
def test_a_selector_that_ray_cannot_read_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="is none of: value, !value, in"):
        config(actors__label_selector={"group": value})
