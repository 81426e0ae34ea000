"""What a study consists of: its sources (a pool with preferences and the base model's scores) and its cells."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from stic_ray.core.config import AnswerMode, RunConfig
from stic_ray.core.errors import ConfigError
from stic_ray.core.overrides import apply_values, read_yaml
from stic_ray.core.rundir import digest
from stic_ray.core.steps import BASE, identity, with_inputs
from stic_ray.recipes import stic

OWN_FIELDS = ("name", "seed", "preferences.num_images", "dpo.pairs", "dpo.num_images")
"""Fields that the study sets in every run."""

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
class PlannedRun(Run):
    """A run with its configuration."""

    config: RunConfig = field(compare=False)


@dataclass(frozen=True)
class Study:
    """All runs of a study, in the order in which they are made."""

    pool_size: int
    """Images of each source: the largest size that the study was begun with."""
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    variants: Variants
    sources: tuple[PlannedRun, ...]
    cells: tuple[PlannedRun, ...]


def plan_study(
    base: RunConfig, uri: str, sizes: Sequence[int], seeds: Sequence[int], variants: Variants, pool_size: int
) -> Study:
    """Return sources and cells; seeds come one after the other, so that whole curves are there early.

    Raises ConfigError for names or overrides that cannot be.
    """
    for variant, overrides in variants.items():
        _check_variant(variant, overrides, sizes)
    sources: dict[str, PlannedRun] = {}
    cells = []
    for seed, size, (variant, overrides) in product(seeds, sizes, variants.items()):
        try:
            config = apply_values(base, {**at_size(overrides, size), "seed": seed})
        except ConfigError as error:
            raise ConfigError(f"Variant '{variant}': {error}") from error
        source = _source_of(config, pool_size, base.evaluation.modes)
        sources.setdefault(source.name, source)
        cells.append(_cell_of(config, variant, size, source, uri))
    return Study(pool_size, tuple(sizes), tuple(seeds), variants, tuple(sources.values()), tuple(cells))


def _source_of(config: RunConfig, pool_size: int, modes: tuple[AnswerMode, ...]) -> PlannedRun:
    """Return the source of a cell's configuration; equal settings of pool and preferences give equal names.

    `modes` are the study's: variants that are asked in fewer share the base model's scores.
    """
    changes = {"preferences.num_images": pool_size, "evaluation.models": (BASE,), "evaluation.modes": modes}
    config = apply_values(config, {**changes, "dpo.pairs": None, "dpo.num_images": None})
    settings = [identity(step, config) for step in stic(config) if step.name in _PAIR_STEPS]
    name = f"seed{config.seed}-{digest(settings)[:8]}"
    return PlannedRun(BASE, 0, config.seed, name, config.model_copy(update={"name": name}))


def _cell_of(config: RunConfig, variant: str, size: int, source: PlannedRun, uri: str) -> PlannedRun:
    models = tuple(model for model in config.evaluation.models if model != BASE)
    if not models:
        raise ConfigError(
            f"Variant '{variant}' scores evaluation.models={list(config.evaluation.models)}; a cell scores trained "
            f"models: name dpo, sft or both (the base model is scored once for all)."
        )
    cell = Run(variant, size, config.seed, source.name)
    changes = {"name": cell.name, "evaluation.models": models, "preferences.num_images": None}
    changes |= {"dpo.pairs": f"{uri}/{source.folder}/{_PAIRS}", "dpo.num_images": size}
    return PlannedRun(variant, size, cell.seed, cell.source, apply_values(config, changes))


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
