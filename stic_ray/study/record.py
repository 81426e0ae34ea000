"""study.yaml: what was asked of a study, and whether another call continues it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from stic_ray.core.config import MAY_CHANGE, RunConfig
from stic_ray.core.errors import ConfigError, RunError
from stic_ray.core.history import code_versions
from stic_ray.core.overrides import build_config
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import BASE
from stic_ray.study.plan import OWN_FIELDS, Run, Study, Variants

FILE = "study.yaml"
_PARTS = ("variant", "size", "seed", "source")


@dataclass(frozen=True)
class Record:
    """What study.yaml holds of all calls so far."""

    base: RunConfig
    pool_size: int
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    variants: Variants
    sources: tuple[Run, ...]
    cells: tuple[Run, ...]
    facts: Mapping[str, Any]
    """Recipe, overrides, package versions and commit of the last call."""


def read_record(home: RunDir) -> Record | None:
    """Return what study.yaml holds, or None for a new study. Raises RunError when it cannot be read."""
    location = home.location / FILE
    if not location.exists():
        return None
    try:
        data = yaml.safe_load(location.read())
        return Record(
            build_config(data["base"]),
            int(data["pool_size"]),
            tuple(data["sizes"]),
            tuple(data["seeds"]),
            data["variants"],
            tuple(Run(BASE, 0, seed, name) for name, seed in data["sources"].items()),
            tuple(Run(**cell) for cell in data["cells"].values()),
            {key: data.get(key) for key in ("recipe", "overrides", "package_versions", "git_commit")},
        )
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise RunError(f"'{location.uri}' is no study.yaml that can be continued: {error}") from error


def check_continues(record: Record, base: RunConfig, sizes: tuple[int, ...], variants: Variants, uri: str) -> None:
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


def write_record(home: RunDir, study: Study, base: RunConfig, facts: Mapping[str, Any], before: Record | None) -> None:
    """Write study.yaml with what this call adds."""
    old = before or Record(base, study.pool_size, (), (), {}, (), (), {})
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
        "cells": {cell.name: {part: getattr(cell, part) for part in _PARTS} for cell in (*old.cells, *study.cells)},
        "base": base.model_dump(mode="json"),
    }
    home.write_text(FILE, yaml.safe_dump(data, sort_keys=False))


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
