"""What a study consists of: its sources (a pool with preferences and the base model's scores) and its cells.

study.yaml holds that of all calls so far; a call that means something else by the same names is refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from stic_ray.core.config import MAY_CHANGE, AnswerMode, RunConfig
from stic_ray.core.errors import ConfigError, RunError
from stic_ray.core.history import code_versions
from stic_ray.core.overrides import apply_values, build_config, read_yaml
from stic_ray.core.rundir import RunDir, digest
from stic_ray.core.steps import BASE, identity, with_inputs
from stic_ray.recipes import stic

OWN_FIELDS = ("name", "seed", "preferences.num_images", "dpo.pairs", "dpo.num_images")
"""Fields that the study sets in every run."""

_FILE = "study.yaml"
_USABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STEPS = stic(RunConfig(name="any"))
_PAIRS = next(step.inputs["pairs"] for step in _STEPS if "pairs" in step.inputs)
_PAIR_STEPS = with_inputs({_PAIRS}, _STEPS)

SCORING = next(step.name for step in _STEPS if step.stage.reads is None)
"""The step that scores models."""
SOURCE_STEPS = tuple(step.name for step in _STEPS if step.name in {*_PAIR_STEPS, SCORING})
"""What a source makes: the pool, the pairs, and the scores of the base model."""

Variants = Mapping[str, Mapping[str, Any]]
"""Variant -> "section.field" -> value, or value by size."""


@dataclass(frozen=True)
class Run:
    """A cell, which trains on the first `size` images of its source's pool; or a source: variant `base`, size 0."""

    variant: str
    size: int
    seed: int
    source: str

    @property
    def is_source(self) -> bool:
        """Whether it makes the pool and the pairs, and scores the base model."""
        return self.variant == BASE

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.source if self.is_source else f"{self.variant}-n{self.size}-seed{self.seed}"

    @property
    def folder(self) -> str:
        """Where it is in the study."""
        return f"{'sources' if self.is_source else 'cells'}/{self.name}"

    def __str__(self) -> str:
        return f"{'source' if self.is_source else 'cell'} {self.name}"


@dataclass(frozen=True)
class Study:
    """What one call asks for, or what study.yaml holds of all calls so far."""

    base: RunConfig
    pool_size: int
    """Images of each source: the largest size that the study was begun with."""
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    variants: Variants
    sources: tuple[Run, ...]
    cells: tuple[Run, ...]
    """In the order in which they are made."""
    configs: Mapping[Run, RunConfig] = field(default_factory=dict)
    """Of the sources and cells of this call."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Recipe, overrides, package versions and commit of the last call, from study.yaml."""


def plan_study(
    base: RunConfig,
    uri: str,
    sizes: Sequence[int],
    seeds: Sequence[int],
    variants: Variants,
    before: Study | None = None,
) -> Study:
    """Return sources and cells; seeds come one after the other, so that whole curves are there early.

    `before` is the study of the calls so far. Raises ConfigError for names or overrides that cannot be, RunError for
    other meanings than it had.
    """
    if before:
        _check_continues(before, base, sizes, variants, uri)
    pool_size = before.pool_size if before else max(sizes)
    for variant, overrides in variants.items():
        _check_variant(variant, overrides, sizes)
    sources: dict[Run, RunConfig] = {}
    cells: dict[Run, RunConfig] = {}
    for seed, size, (variant, overrides) in product(seeds, sizes, variants.items()):
        try:
            config = apply_values(base, {**at_size(overrides, size), "seed": seed})
        except ConfigError as error:
            raise ConfigError(f"Variant '{variant}': {error}") from error
        source, source_config = _source_of(config, pool_size, base.evaluation.modes)
        sources.setdefault(source, source_config)
        cell = Run(variant, size, seed, source.name)
        cells[cell] = _cell_config(config, cell, f"{uri}/{source.folder}/{_PAIRS}")
    configs = {**sources, **cells}
    return Study(base, pool_size, tuple(sizes), tuple(seeds), variants, tuple(sources), tuple(cells), configs)


def _source_of(config: RunConfig, pool_size: int, modes: tuple[AnswerMode, ...]) -> tuple[Run, RunConfig]:
    """Return the source of a cell's configuration; equal settings of pool and preferences give equal names.

    `modes` are the study's: variants that are asked in fewer share the base model's scores.
    """
    changes = {"preferences.num_images": pool_size, "evaluation.models": (BASE,), "evaluation.modes": modes}
    config = apply_values(config, {**changes, "dpo.pairs": None, "dpo.num_images": None})
    settings = [identity(step, config) for step in stic(config) if step.name in _PAIR_STEPS]
    name = f"seed{config.seed}-{digest(settings)[:8]}"
    return Run(BASE, 0, config.seed, name), config.model_copy(update={"name": name})


def _cell_config(config: RunConfig, cell: Run, pairs: str) -> RunConfig:
    models = tuple(model for model in config.evaluation.models if model != BASE)
    if not models:
        raise ConfigError(
            f"Variant '{cell.variant}' scores evaluation.models={list(config.evaluation.models)}; a cell scores "
            f"trained models: name dpo, sft or both (the base model is scored once for all)."
        )
    changes = {"name": cell.name, "dpo.pairs": pairs, "dpo.num_images": cell.size, "evaluation.models": models}
    return apply_values(config, {**changes, "preferences.num_images": None})


def read_variants(path: Path) -> dict[str, dict[str, Any]]:
    """Read a variants file. Raises ConfigError when it is missing or of another shape."""
    data = read_yaml(path, "variants")
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"'{path}' must map names of variants to overrides, found {type(data).__name__}.")
    for name, overrides in data.items():
        if not isinstance(overrides, dict | None):
            raise ConfigError(
                f"Variant '{name}' in '{path}' must be a mapping of section.field to a value ({{}} for none), "
                f"found {overrides!r}."
            )
    return {str(name): dict(overrides or {}) for name, overrides in data.items()}


def at_size(overrides: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return the overrides of a variant at one size."""
    return {key: value[size] if isinstance(value, Mapping) else value for key, value in overrides.items()}


def _check_variant(name: str, overrides: Mapping[str, Any], sizes: Sequence[int]) -> None:
    if not _USABLE_NAME.fullmatch(name) or name == BASE:
        raise ConfigError(
            f"Variant '{name}' cannot name a folder: use letters, digits, '.', '_' and '-', at most 64, the first a "
            f"letter or digit, and not '{BASE}'."
        )
    for key, value in overrides.items():
        if not isinstance(key, str):
            raise ConfigError(f"Variant '{name}' sets {key!r}; give section.field.")
        if key in OWN_FIELDS:
            raise ConfigError(f"Variant '{name}' sets {key}, which the study sets in every run; leave it out.")
        if key.startswith("evaluation.") and key not in ("evaluation.models", "evaluation.modes"):
            raise ConfigError(
                f"Variant '{name}' sets {key}: all variants must be scored alike. Set it for the whole study with "
                f"--set {key}=VALUE."
            )
        if isinstance(value, Mapping) and set(value) != set(sizes):
            raise ConfigError(
                f"Variant '{name}' gives {key} by size, for {_listed(value)}; give exactly the sizes {_listed(sizes)}."
            )


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values)) or "none"


def read_record(home: RunDir) -> Study | None:
    """Return what study.yaml holds, or None for a new study. Raises RunError when it cannot be read."""
    location = home.location / _FILE
    if not location.exists():
        return None
    try:
        data = yaml.safe_load(location.read())
        return Study(
            build_config(data["base"]),
            int(data["pool_size"]),
            tuple(data["sizes"]),
            tuple(data["seeds"]),
            data["variants"],
            tuple(Run(BASE, 0, seed, name) for name, seed in data["sources"].items()),
            tuple(Run(**cell) for cell in data["cells"].values()),
            facts={key: data.get(key) for key in ("recipe", "overrides", "package_versions", "git_commit")},
        )
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise RunError(f"'{location.uri}' is no study.yaml that can be continued: {error}") from error


def _check_continues(record: Study, base: RunConfig, sizes: Sequence[int], variants: Variants, uri: str) -> None:
    """Raise RunError when the study was begun with something else, naming both values."""
    before, now = _inherited(record.base), _inherited(base)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        both = "; ".join(f"{key} was {before.get(key)!r}, is now {now.get(key)!r}" for key in changed)
        raise RunError(f"Study '{uri}' was begun with other settings: {both}. Set the old value, or use another --run.")
    if max(sizes) > record.pool_size:
        raise RunError(
            f"Study '{uri}' was begun with pools of {record.pool_size} images, now the largest size is {max(sizes)}: "
            f"growing a study is not supported yet. Use sizes up to {record.pool_size}, or another --run."
        )
    for name in variants.keys() & record.variants.keys():
        _merged(name, record.variants[name], variants[name], uri)


def write_record(home: RunDir, study: Study, facts: Mapping[str, Any], before: Study | None) -> None:
    """Write study.yaml with what this call adds to the calls before."""
    old = before or study
    variants = dict(old.variants)
    for name, overrides in study.variants.items():
        variants[name] = _merged(name, variants.get(name, overrides), overrides, home.uri)
    data = {
        **facts,
        **code_versions(),
        "pool_size": study.pool_size,
        "sizes": sorted({*study.sizes, *old.sizes}),
        "seeds": sorted({*study.seeds, *old.seeds}),
        "variants": variants,
        "sources": {source.name: source.seed for source in (*old.sources, *study.sources)},
        "cells": {cell.name: asdict(cell) for cell in (*old.cells, *study.cells)},
        "base": study.base.model_dump(mode="json"),
    }
    home.write_text(_FILE, yaml.safe_dump(data, sort_keys=False))


def _inherited(config: RunConfig) -> dict[str, Any]:
    """Return the settings of the base configuration that every run of the study inherits, flat."""
    flat = config.flat()
    return {key: flat[key] for key in flat if key not in OWN_FIELDS and key.split(".")[0] not in MAY_CHANGE}


def _merged(name: str, old: Mapping[str, Any], new: Mapping[str, Any], uri: str) -> dict[str, Any]:
    """Return a variant with the values of both calls' sizes. Raises RunError when it changed its meaning."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys([*old, *new]):
        before, now = old.get(key, "not set"), new.get(key, "not set")
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            same = all(before[size] == now[size] for size in before.keys() & now.keys())
            merged[key] = {**before, **now}
        else:
            same, merged[key] = before == now, now
        if not same:
            raise RunError(
                f"Variant '{name}' of study '{uri}' had {key} = {before!r}, now {now!r}. Give the changed variant "
                f"another name, or use another --run."
            )
    return merged
