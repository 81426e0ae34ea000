"""study.yaml: what was asked of a study, and whether another call continues it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from stic_ray.core.config import MAY_CHANGE, RunConfig
from stic_ray.core.errors import ConfigError, RunError
from stic_ray.core.overrides import build_config
from stic_ray.core.provenance import git_commit, package_versions
from stic_ray.core.rundir import RunDir
from stic_ray.study.plan import OWN_FIELDS, Study, Variants

FILE = "study.yaml"


@dataclass(frozen=True)
class Known:
    """A cell as study.yaml knows it."""

    name: str
    variant: str
    size: int
    seed: int
    source: str


@dataclass(frozen=True)
class Record:
    """What study.yaml holds of all calls so far."""

    base: RunConfig
    pool_size: int
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    variants: Variants
    sources: Mapping[str, int]
    """Source -> seed."""
    cells: tuple[Known, ...]
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
            data["sources"],
            tuple(Known(name=name, **cell) for name, cell in data["cells"].items()),
            {key: data.get(key) for key in ("recipe", "overrides", "package_versions", "git_commit")},
        )
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise RunError(f"'{location.uri}' is no study.yaml that can be continued: {error}") from error


def check_continues(record: Record, base: RunConfig, sizes: tuple[int, ...], variants: Variants, uri: str) -> None:
    """Raise RunError when the study was begun with something else, naming both values."""
    before, now = _meaning(record.base), _meaning(base)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        told = "; ".join(f"{key} was {before.get(key)!r}, is now {now.get(key)!r}" for key in changed)
        raise RunError(f"Study '{uri}' was begun with other settings: {told}. Set the old value, or use another --run.")
    if max(sizes) > record.pool_size:
        raise RunError(
            f"Study '{uri}' was begun with pools of {record.pool_size} images, now the largest size is {max(sizes)}: "
            f"growing a study is not supported yet. Use sizes up to {record.pool_size}, or another --run."
        )
    for name in variants.keys() & record.variants.keys():
        _merged(name, record.variants[name], variants[name], uri)


def write_record(home: RunDir, study: Study, base: RunConfig, facts: Mapping[str, Any], before: Record | None) -> None:
    """Write study.yaml with what this call adds."""
    cells = {cell.name: cell for cell in before.cells} if before else {}
    cells |= {c.name: Known(c.name, c.variant, c.size, c.seed, c.source) for c in study.cells}
    variants = dict(before.variants) if before else {}
    for name, overrides in study.variants.items():
        variants[name] = _merged(name, variants.get(name, overrides), overrides, home.uri)
    sources = (dict(before.sources) if before else {}) | {source.name: source.seed for source in study.sources}
    data = {
        **facts,
        "git_commit": git_commit(),
        "package_versions": package_versions(),
        "pool_size": study.pool_size,
        "sizes": sorted({*study.sizes, *(before.sizes if before else ())}),
        "seeds": sorted({*study.seeds, *(before.seeds if before else ())}),
        "variants": variants,
        "sources": sources,
        "cells": {
            c.name: {"variant": c.variant, "size": c.size, "seed": c.seed, "source": c.source} for c in cells.values()
        },
        "base": base.model_dump(mode="json"),
    }
    home.write_text(FILE, yaml.safe_dump(data, sort_keys=False))


def _meaning(config: RunConfig) -> dict[str, Any]:
    """Return the settings of the base configuration that every run of the study inherits, flat."""
    return {
        key: value
        for key, value in config.flat().items()
        if key not in OWN_FIELDS and key.split(".")[0] not in MAY_CHANGE
    }


def _merged(name: str, old: Mapping[str, Any], new: Mapping[str, Any], uri: str) -> dict[str, Any]:
    """Return a variant with the values of both calls' sizes. Raises RunError when it changed its meaning."""
    merged: dict[str, Any] = {}
    for key in [*old, *(key for key in new if key not in old)]:
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
