"""What a study consists of: its sources (a pool with preferences and the base model's scores) and its cells."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stic_ray.core.config import AnswerMode, RunConfig
from stic_ray.core.errors import ConfigError
from stic_ray.core.overrides import apply_values, read_yaml
from stic_ray.core.rundir import digest
from stic_ray.core.steps import BASE, Steps, identity, with_inputs
from stic_ray.recipes import stic

OWN_FIELDS = ("name", "seed", "preferences.num_images", "dpo.pairs", "dpo.num_images")
"""Fields that the study sets in every run."""

_USABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Variants = Mapping[str, Mapping[str, Any]]
"""Variant -> "section.field" -> value, or value by size."""


def pair_steps(steps: Steps) -> set[str]:
    """Return the names of the steps that make the pairs that a run trains on."""
    makers = {step.inputs["pairs"] for step in steps if "pairs" in step.inputs}
    return with_inputs(makers, steps) & {step.name for step in steps}


def scoring_step(steps: Steps) -> str:
    """Return the name of the step that scores models."""
    return next(step.name for step in steps if step.stage.reads is None)


_WHOLE = stic(RunConfig(name="any"))
SCORING = scoring_step(_WHOLE)
_PAIRS = next(step.inputs["pairs"] for step in _WHOLE if "pairs" in step.inputs)
SOURCE_STEPS = tuple(step.name for step in _WHOLE if step.name in {*pair_steps(_WHOLE), SCORING})
"""What a source makes: the pool, the pairs, and the scores of the base model."""


@dataclass(frozen=True)
class Source:
    """A run that makes the pool and the preferences at the largest size, and scores the base model."""

    name: str
    seed: int
    config: RunConfig

    @property
    def folder(self) -> str:
        """Where it is in the study."""
        return f"sources/{self.name}"


@dataclass(frozen=True)
class Cell:
    """A run that trains on the first `size` images of its source's pool."""

    variant: str
    size: int
    seed: int
    source: str
    config: RunConfig

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.variant}-n{self.size}-seed{self.seed}"

    @property
    def folder(self) -> str:
        """Where it is in the study."""
        return f"cells/{self.name}"


@dataclass(frozen=True)
class Study:
    """All runs of a study, in the order in which they are made."""

    pool_size: int
    """Images of each source: the largest size that the study was begun with."""
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    variants: Variants
    sources: tuple[Source, ...]
    cells: tuple[Cell, ...]


def plan_study(
    base: RunConfig, uri: str, sizes: Sequence[int], seeds: Sequence[int], variants: Variants, pool_size: int
) -> Study:
    """Return sources and cells; seeds come one after the other, so that whole curves are there early.

    Raises ConfigError for sizes, seeds, names or overrides that cannot be.
    """
    check_numbers(sizes, seeds)
    for name, overrides in variants.items():
        _check_variant(name, overrides, sizes)
    sources: dict[str, Source] = {}
    cells = []
    for seed in seeds:
        for size in sizes:
            for variant, overrides in variants.items():
                config = _configured(base, variant, overrides, size, seed)
                source = _source_of(config, pool_size, base.evaluation.modes)
                sources.setdefault(source.name, source)
                pairs = f"{uri}/{source.folder}/{_PAIRS}"
                cells.append(Cell(variant, size, seed, source.name, _cell_config(config, variant, size, seed, pairs)))
    return Study(pool_size, tuple(sizes), tuple(seeds), variants, tuple(sources.values()), tuple(cells))


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


def check_numbers(sizes: Sequence[int], seeds: Sequence[int]) -> None:
    """Raise ConfigError unless sizes rise from 1 on and seeds are different and not negative."""
    if not sizes or any(size < 1 for size in sizes) or list(sizes) != sorted(set(sizes)):
        given = ",".join(map(str, sizes))
        raise ConfigError(f"--sizes {given} must be positive, each once, smallest first, such as 250,1000,4000.")
    if not seeds or any(seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        given = ",".join(map(str, seeds))
        raise ConfigError(f"--seeds {given} must be whole numbers from 0 on, each once, such as 0,1,2.")


def _check_variant(name: str, overrides: Mapping[str, Any], sizes: Sequence[int]) -> None:
    if not _USABLE_NAME.fullmatch(name) or name == BASE:
        raise ConfigError(
            f"Variant '{name}' cannot name a folder: use letters, digits, '.', '_' and '-', at most 64, the first a "
            f"letter or digit, and not '{BASE}'."
        )
    for field, value in overrides.items():
        if not isinstance(field, str):
            raise ConfigError(f"Variant '{name}' sets {field!r}; give section.field.")
        if field in OWN_FIELDS:
            raise ConfigError(f"Variant '{name}' sets {field}, which the study sets in every run; leave it out.")
        if field.startswith("evaluation.") and field not in ("evaluation.models", "evaluation.modes"):
            raise ConfigError(
                f"Variant '{name}' sets {field}: all variants must be scored alike. Set it for the whole study with "
                f"--set {field}=VALUE."
            )
        if isinstance(value, Mapping) and set(value) != set(sizes):
            raise ConfigError(
                f"Variant '{name}' gives {field} by size, for {_listed(value)}; give exactly the sizes "
                f"{_listed(sizes)}."
            )


def _listed(values: Any) -> str:
    return ", ".join(map(str, values)) or "none"


def at_size(overrides: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return the overrides of a variant at one size."""
    return {key: value[size] if isinstance(value, Mapping) else value for key, value in overrides.items()}


def _configured(base: RunConfig, variant: str, overrides: Mapping[str, Any], size: int, seed: int) -> RunConfig:
    try:
        return apply_values(base, {**at_size(overrides, size), "seed": seed})
    except ConfigError as error:
        raise ConfigError(f"Variant '{variant}': {error}") from error


def _source_of(config: RunConfig, pool_size: int, modes: tuple[AnswerMode, ...]) -> Source:
    """Return the source of a cell's configuration; equal settings of pool and preferences give equal names.

    `modes` are the study's: variants that are asked in fewer share the base model's scores.
    """
    changes = {"preferences.num_images": pool_size, "evaluation.models": (BASE,), "evaluation.modes": modes}
    config = apply_values(config, {**changes, "dpo.pairs": None, "dpo.num_images": None})
    steps = stic(config)
    settings = [identity(step, config) for step in steps if step.name in pair_steps(steps)]
    name = f"seed{config.seed}-{digest(settings)[:8]}"
    return Source(name, config.seed, config.model_copy(update={"name": name}))


def _cell_config(config: RunConfig, variant: str, size: int, seed: int, pairs: str) -> RunConfig:
    models = tuple(model for model in config.evaluation.models if model != BASE)
    if not models:
        raise ConfigError(
            f"Variant '{variant}' scores evaluation.models={list(config.evaluation.models)}; a cell scores trained "
            f"models: name dpo, sft or both (the base model is scored once for all)."
        )
    name = f"{variant}-n{size}-seed{seed}"
    changes = {"name": name, "dpo.pairs": pairs, "dpo.num_images": size, "evaluation.models": models}
    return apply_values(config, {**changes, "preferences.num_images": None})
