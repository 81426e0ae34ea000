"""Which processes a stage needs, which machines there are, and whether they fit there. Plain data, no Ray."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError

TASK_CPUS = 0.25
"""CPUs reserved by a task that mostly waits for storage, so that actors cannot starve it."""

ACCELERATOR = "accelerator_type:"
"""Ray's name of the resource that a machine has of its kind of GPU, and processes that want one take a little of."""
_SHARE_OF_ACCELERATOR = 0.001


@dataclass(frozen=True)
class Need:
    """Equal processes that a stage starts, each on one machine."""

    what: str
    """`actors`, `workers` or `tasks`; the first two are the section of the configuration that asks for them."""
    num: int
    each: Mapping[str, float]
    """Resources per process, as {"CPU": 4, "GPU": 1}."""
    label_selector: Mapping[str, str] = field(default_factory=dict)
    reads_with_tasks: bool = False
    """Whether small tasks run beside them, which need a share of a CPU of any machine."""
    placement_strategy: str = "PACK"
    """STRICT_SPREAD puts each on a machine of its own, STRICT_PACK all on one."""

    def __str__(self) -> str:
        where = format_selector(self.label_selector)
        where += {"STRICT_SPREAD": ", each on a node of its own", "STRICT_PACK": ", all on one node"}.get(
            self.placement_strategy, ""
        )
        what = self.what if self.num > 1 else self.what.removesuffix("s")
        beside = f", and {TASK_CPUS:g} CPU for tasks" if self.reads_with_tasks else ""
        return f"{self.num} {what} of {format_resources(self.each)}{where}{beside}"


@dataclass(frozen=True)
class Node:
    """A machine that is there."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Machines:
    """What a run would find."""

    whose: str
    nodes: Sequence[Node]
    may_grow: bool = False
    """Whether others may be started when they are asked for; which ones is not known here."""

    def __str__(self) -> str:
        grows = ", and may start others" if self.may_grow else ""
        return f"{self.whose} has {format_machines(self.nodes)}{grows}"


def tasks_need(config: RunConfig) -> Need:
    """Return what a stage of tasks starts at once, at least."""
    return Need("tasks", 1, {"CPU": 1.0})


def actors_need(config: RunConfig) -> Need:
    """Return what a stage that generates starts at once."""
    actors = config.actors
    each = {"CPU": actors.num_cpus, "GPU": actors.num_gpus}
    num = actors.min_actors or actors.num_actors
    return Need("actors", num, each, dict(actors.label_selector), reads_with_tasks=True)


def without_gpus(need: Need) -> Need:
    """Return the same processes without a GPU, which would only be held where no model is loaded."""
    return replace(need, each={**need.each, "GPU": 0.0})


def workers_need(config: RunConfig) -> Need:
    """Return what a stage that trains starts at once."""
    workers = config.workers
    each = {"CPU": workers.num_cpus, "GPU": workers.num_gpus}
    if workers.accelerator_type:
        each[f"{ACCELERATOR}{workers.accelerator_type}"] = _SHARE_OF_ACCELERATOR
    selector, strategy = dict(workers.label_selector), workers.placement_strategy
    return Need("workers", workers.num_workers, each, selector, placement_strategy=strategy)


def unplaced(needs: Mapping[str, Need], machines: Machines, num_runs: int = 1) -> dict[str, Need]:
    """Return the needs, by step, that do not fit on the machines that are there, for so many runs at once."""
    needs = {step: replace(need, num=need.num * num_runs) for step, need in needs.items()}
    return {step: need for step, need in needs.items() if num_places(need, machines.nodes) < need.num}


def format_unplaced(needs: Mapping[str, Need], machines: Machines) -> str:
    """Return such needs in words, equal ones together, with how many of the processes fit."""
    steps: dict[str, list[str]] = {}
    for step, need in needs.items():
        steps.setdefault(f"{need}, and {num_places(need, machines.nodes)} fit", []).append(step)
    return "; ".join(
        f"{', '.join(names)} {'asks' if len(names) == 1 else 'ask'} for {words}" for words, names in steps.items()
    )


def check_fits(needs: Mapping[str, Need], machines: Machines, num_runs: int = 1) -> None:
    """Raise ConfigError when so many runs at once can never have what one of the steps needs on these machines."""
    missing = unplaced(needs, machines, num_runs)
    if not missing or machines.may_grow:
        return
    sections = sorted({need.what for need in missing.values()} - {"tasks"})
    settings = [f"{name}.num_{name}, {name}.num_gpus or {name}.num_cpus" for name in sections]
    raise ConfigError(
        f"{format_unplaced(missing, machines)}: {machines}. "
        + (f"Lower {'; '.join(settings)}; or set" if settings else "Set")
        + " RAY_ADDRESS to a cluster that has them."
    )


def num_places(need: Need, nodes: Sequence[Node]) -> int:
    """Return how many of the processes the machines hold at once if they hold nothing else, at most `need.num`."""
    suitable = [node for node in nodes if matches(need.label_selector, node.labels)]
    times = [_times(need, node) for node in suitable]
    if need.placement_strategy == "STRICT_SPREAD":
        times = [min(1, each) for each in times]
    places = max(times, default=0) if need.placement_strategy == "STRICT_PACK" else sum(times)
    if not need.reads_with_tasks or places > need.num:
        return min(places, need.num)
    # All that fit leave a task its share beside them, or one of them less does.
    others = [node for node in nodes if node not in suitable]
    room = any(node.resources.get("CPU", 0.0) >= TASK_CPUS for node in others) or any(
        node.resources.get("CPU", 0.0) - _times(need, node) * need.each["CPU"] >= TASK_CPUS for node in suitable
    )
    return places if room else max(0, places - 1)


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a machine's labels satisfy a selector in Ray's syntax: `a`, `!a`, `in(a, b)` or `!in(a, b)` per label."""
    for key, wanted in selector.items():
        values = wanted.removeprefix("!").removeprefix("in(").removesuffix(")")
        found = labels.get(key) in [value.strip() for value in values.split(",")]
        if found == wanted.startswith("!"):
            return False
    return True


def format_resources(resources: Mapping[str, float]) -> str:
    """Return CPUs and GPUs in words; CPUs without end, which are not counted, are left out."""
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    kinds = [kind.removeprefix(ACCELERATOR) for kind in resources if kind.startswith(ACCELERATOR)]
    gpus_in_words = f"{gpus:g} GPU" + (f" ({', '.join(kinds)})" if gpus and kinds else "")
    if math.isinf(cpus):
        return gpus_in_words
    return f"{cpus:g} CPU, {gpus_in_words}" if gpus else f"{cpus:g} CPU"


def format_selector(selector: Mapping[str, str]) -> str:
    """Return in words which nodes processes may be on; nothing for any."""
    return f" on nodes with {_pairs(selector)}" if selector else ""


def format_machines(nodes: Sequence[Node]) -> str:
    """Return the machines in words, equal ones together; labels that Ray itself sets are left out."""
    kinds: Counter[str] = Counter()
    for node in nodes:
        labels = _pairs({key: value for key, value in node.labels.items() if not key.startswith("ray.io/")})
        kinds[format_resources(node.resources) + (f" [{labels}]" if labels else "")] += 1
    counted = "; ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items()))
    return f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}: {counted}" if nodes else "no node"


def _times(need: Need, node: Node) -> int:
    """Return how often one of the processes fits on a machine."""
    asked = {kind: amount for kind, amount in need.each.items() if amount}
    fits = [node.resources.get(kind, 0.0) / amount + 1e-9 for kind, amount in asked.items()]
    return int(min([*fits, need.num]))


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))
