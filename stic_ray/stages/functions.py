"""The stages as functions of (configuration, run directory, trained models or None), by name."""

from collections.abc import Callable, Mapping
from typing import Any

from stic_ray.core.config import RunConfig
from stic_ray.core.rundir import RunDir
from stic_ray.core.storage import Location
from stic_ray.stages.evaluation import evaluate
from stic_ray.stages.infusion import build_infusion
from stic_ray.stages.pool import build_pool
from stic_ray.stages.preferences import build_preferences
from stic_ray.stages.training.launch import train_dpo, train_sft


def run_evaluation(config: RunConfig, run: RunDir, trained: Mapping[str, str] | None) -> dict[str, Any]:
    """Score the models that `evaluation.models` names, and the given checkpoints."""
    own = {name: None if name == "base" else (run / name).location / "checkpoint" for name in config.evaluation.models}
    given = {name: Location.of(uri) for name, uri in (trained or {}).items()}
    return evaluate(config, run / "evaluation", {**own, **given})


FUNCTIONS: dict[str, Callable[[RunConfig, RunDir, Mapping[str, str] | None], dict[str, Any]]] = {
    "pool": lambda config, run, _: build_pool(config, run),
    "preferences": lambda config, run, _: build_preferences(config, run),
    "dpo": lambda config, run, _: train_dpo(config, run),
    "infusion": lambda config, run, _: build_infusion(config, run),
    "sft": lambda config, run, _: train_sft(config, run),
    "evaluation": run_evaluation,
}
