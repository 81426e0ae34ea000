"""A run as data: stages, the steps that a run is made of, and a step as its stage's function gets it.

A stage is one object in one file below stages/. Nothing else lists stages by name: pipeline, plan, status, estimate,
report and study read these objects, or what config.yaml records of them. A step is a stage under a name, its folder,
with its inputs by role and its own settings where they differ from the run's.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from stic_ray.core.config import MISSING, RunConfig
from stic_ray.core.errors import ConfigError, RunError, nearest, one_line
from stic_ray.core.overrides import apply_values
from stic_ray.core.placement import Need
from stic_ray.core.rundir import RunDir, digest
from stic_ray.core.storage import Location
from stic_ray.core.workload import Sizes, Work

CONFIG = "config.yaml"
"""What was run: written before any work."""
CHECKPOINT = "checkpoint"
"""Folder of the model that a training step leaves."""
BASE = "base"
"""The model that a run starts from: `model.path`, with `model.adapter` on it."""
GOES_ON = "goes_on"
"""Account in the manifest of a step that decides: false where the steps that come `only_after` it are left out."""


@dataclass(frozen=True)
class StepRun:
    """A step on its way: what the function of its stage works from."""

    name: str
    config: RunConfig
    """Resolved, the step's own settings included."""
    output: RunDir
    """The step's folder."""
    inputs: Mapping[str, RunDir] = field(default_factory=dict)
    """The folders that it reads, by role."""
    identity: str = ""
    """Hash of the settings and inputs that the result depends on."""

    def all(self, role: str) -> list[RunDir]:
        """Return the folders of all inputs of a role, "role" and each "role:name", in their order."""
        return [place for name, place in self.inputs.items() if name.partition(":")[0] == role]

    def model(self, role: str = "model") -> Location | None:
        """Return the checkpoint that an input holds, or the run's adapter without such an input; None for the base."""
        if role in self.inputs:
            inside = self.inputs[role].location / CHECKPOINT
            return inside if inside.exists() else self.inputs[role].location
        return Location.of(self.config.model.adapter) if self.config.model.adapter else None


@dataclass(frozen=True)
class Stage:
    """A kind of work."""

    name: str
    """Name of its steps, unless they have their own."""
    run: Callable[[StepRun], dict[str, Any]]
    """Does the work and returns row accounts for the manifest (core/rundir.py); Ray and torch are imported inside."""
    settings: tuple[str, ...]
    """Sections (or "section.field") of the configuration that the result depends on."""
    need: Callable[[RunConfig], Need]
    """The processes that it starts at once."""
    writes: str
    """What it leaves, for the plan."""
    section: str = ""
    """The section of the configuration with its own settings; a training's has its global batch."""
    reads: tuple[str, ...] | None = ()
    """Roles of its inputs, several of one as "role:name"; None for any, which are models by their name."""
    sources: tuple[str, ...] = ()
    """Fields of the configuration that name what it reads from outside of the run."""
    check: Callable[[StepRun], object] = lambda step: None
    """Finds the user's mistakes before anything is spent. Raises UserError."""
    loads_model: Callable[[RunConfig], bool] = lambda config: True
    """Whether it opens the model of the run."""
    work: Callable[[RunConfig, Sizes], Work | None] = lambda config, sizes: None
    """How much there is to do; None where that is not known."""
    amount: str = ""
    """Field of Sizes with the number of rows, which `estimate.<amount>` gives where nothing else does."""
    amount_in_manifest: str | None = None
    """Account of the manifest with that number once the stage is finished."""
    is_result: bool = False
    """Whether it is made for its own sake; others are made when something is made from them."""
    grows: bool = False
    """Whether it goes on behind what it has when its input has grown; nothing that was finished is made again."""


def names_in(source: str) -> tuple[str, ...]:
    """Return the steps that an input names: one, or several of which the first that is finished is read."""
    return () if "/" in source else tuple(source.split("|"))


def read_from(source: str, run: RunDir) -> str:
    """Return what an input reads: of several steps the first that is finished, or all of them where none is."""
    names = names_in(source)
    return next((name for name in names if (run / name).manifest), source) if len(names) > 1 else source


def place_of(source: str, run: RunDir) -> RunDir:
    """Return the folder that an input names: a step of the run, or a folder outside of it."""
    names = names_in(read_from(source, run))
    return run / names[0] if names else RunDir.of(source)


@dataclass(frozen=True)
class Step:
    """A stage under a name."""

    stage: Stage
    name: str = ""
    """Its folder; the stage's name when empty."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """By role: the name of an earlier step, or a folder outside of the run (a path with a "/", or a URI). As "a|b", the
    first of these steps that is finished, where some may be left out."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """"section.field" -> value, where it differs from the run's."""
    only_after: str = ""
    """An earlier step that decides whether this one is made (GOES_ON)."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.stage.name)

    def configured(self, config: RunConfig) -> RunConfig:
        """Return the run's configuration with this step's settings. Raises ConfigError for one that cannot be."""
        return apply_values(config, self.settings) if self.settings else config

    def place(self, role: str, run: RunDir) -> RunDir:
        """Return the folder of an input."""
        return place_of(self.inputs[role], run)

    @property
    def earlier_steps(self) -> tuple[str, ...]:
        """Names of the steps that it reads or waits for, each once."""
        read = [name for source in self.inputs.values() for name in names_in(source)]
        return tuple(dict.fromkeys([*read, *filter(None, [self.only_after])]))

    def record(self, config: RunConfig) -> dict[str, Any]:
        """Return what config.yaml holds of the step, for readers that have no stage objects."""
        need = self.stage.need(self.configured(config))
        return {
            "name": self.name,
            "stage": self.stage.name,
            "section": self.stage.section,
            "writes": self.stage.writes,
            "inputs": dict(self.inputs),
            "only_after": self.only_after,
            "settings": dict(self.settings),
            "processes": need.what,
        }


Steps = Sequence[Step]


@dataclass(frozen=True)
class Recipe:
    """A named run: its configuration, and the steps that follow from it once it has been changed with --set."""

    config: RunConfig
    steps: Callable[[RunConfig], tuple[Step, ...]]


def check_given(config: RunConfig, steps: Steps, names: Collection[str]) -> None:
    """Raise ConfigError where the named steps read what the recipe leaves to its user."""
    wanted = [step for step in steps if step.name in names]
    fields = ["model.path"] if any(step.stage.loads_model(config) for step in wanted) else []
    missing = [name for name in fields if MISSING in config.sources(name)]
    for step in wanted:
        own = step.configured(config)
        missing += [name for name in step.stage.sources if MISSING in own.sources(name) and name not in missing]
    if missing:
        raise ConfigError(f"'{config.name}' leaves this to you: {' '.join(f'--set {name}=...' for name in missing)}")


def check_steps(steps: Steps) -> None:
    """Raise ConfigError for two steps of one name, a role that a stage does not read, or an input that is not there."""
    known: list[str] = []
    for step in steps:
        if step.name in known or "/" in step.name or step.name in ("", BASE):
            raise ConfigError(f"Step '{step.name}': give each step a name of its own, without '/', and not '{BASE}'.")
        for role, source in step.inputs.items():
            if step.stage.reads is not None and role.partition(":")[0] not in step.stage.reads:
                allowed = ", ".join(step.stage.reads) or "nothing"
                raise ConfigError(
                    f"Step '{step.name}' has an input '{role}'.{nearest(role, step.stage.reads)} "
                    f"Stage {step.stage.name} reads: {allowed}."
                )
            for name in names_in(source):
                if name not in known:
                    where = f"{step.stage.section}.models" if step.stage.reads is None else f"The input '{role}'"
                    raise ConfigError(
                        f"{where} of step '{step.name}' names '{name}', which is no step before it."
                        f"{nearest(name, known)} Valid: {', '.join(known) or 'none'}."
                    )
        assert not step.only_after or step.only_after in known, "it decides before"
        known.append(step.name)


def with_inputs(names: Collection[str], steps: Steps) -> set[str]:
    """Return the named steps and all that they are made from."""
    found = set(names)
    for step in reversed(steps):
        if step.name in found:
            found |= set(step.earlier_steps)
    return found


def left_out(steps: Iterable[tuple[str, str]], run: RunDir) -> set[str]:
    """Return the steps that are not made, of pairs of a step and the one that it comes `only_after`, in order."""
    found: set[str] = set()
    for name, decision in steps:
        if decision and (decision in found or ((run / decision).manifest or {}).get(GOES_ON) is False):
            found.add(name)
    return found


def left_out_of(steps: Steps, run: RunDir) -> set[str]:
    """Return the steps of a run that are not made."""
    return left_out([(step.name, step.only_after) for step in steps], run)


def left_out_of_record(record: "Record", run: RunDir) -> set[str]:
    """Return the same from what config.yaml holds; runs of an earlier version have nothing to leave out."""
    return left_out([(step["name"], step.get("only_after", "")) for step in record.steps], run)


def needs_of(config: RunConfig, steps: Steps, names: Collection[str]) -> dict[str, Need]:
    """Return the processes of the named steps."""
    return {step.name: step.stage.need(step.configured(config)) for step in steps if step.name in names}


def identity(step: Step, config: RunConfig) -> dict[str, Any]:
    """Return the settings that a step's result depends on, as flat "section.field" keys."""
    own = step.configured(config)
    flat = own.identifying()
    wanted = (*step.stage.settings, *(key for name in step.stage.sources for key in own.toy_settings(name)))
    return {key: value for key, value in flat.items() if key in wanted or key.split(".")[0] in wanted}


def input_hashes(step: Step, run: RunDir) -> dict[str, dict[str, str]]:
    """Return by role where an input comes from, and the hash of its manifest as it is now."""
    return {
        role: {"from": source, "manifest": digest(step.place(role, run).manifest)}
        for role, source in step.inputs.items()
    }


def prepare_step(step: Step, config: RunConfig, run: RunDir, resolved: RunConfig) -> StepRun:
    """Return the step as its function gets it; `resolved` is the step's configuration with all places found."""
    inputs = {role: step.place(role, run) for role in step.inputs}
    sources = {role: place.uri for role, place in inputs.items()}
    return StepRun(step.name, resolved, run / step.name, inputs, digest([identity(step, config), sources]))


@dataclass(frozen=True)
class Record:
    """What config.yaml holds: the last call's settings, and the steps of the run as `Step.record` wrote them."""

    config: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Recipe, overrides, package versions and commit."""


def read_record(run: RunDir) -> Record:
    """Read config.yaml; an empty record where there is none. Raises RunError when it is no YAML mapping."""
    location = run.location / CONFIG
    if not location.exists():
        return Record()
    try:
        found = yaml.safe_load(location.read())
    except yaml.YAMLError as error:
        raise RunError(f"'{location.uri}' is not valid YAML: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise RunError(f"'{location.uri}' must hold a mapping, found {type(found).__name__}.")
    config, steps = found.pop("config", None) or {}, found.pop("steps", None) or []
    return Record(config, steps, found)
