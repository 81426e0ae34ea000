"""Run directories with the manifests of finished steps, and nothing else."""

from pathlib import Path
from typing import Any

import yaml

from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import apply_overrides
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import Steps, identity
from stic_ray.recipes import recipe, stic


def configured(name: str = "llava16_7b", **settings: Any) -> RunConfig:
    return apply_overrides(
        recipe(name).config, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    )


def finished(folder: Path, config: RunConfig, steps: Steps | None = None, **manifests: dict[str, Any]) -> RunDir:
    """A run with the manifests of some stages, as far as rates are read from them."""
    run = RunDir.of(str(folder))
    steps = steps or stic(config)
    record = {"config": config.model_dump(mode="json"), "steps": [step.record(config) for step in steps]}
    run.write_text("config.yaml", yaml.safe_dump(record))
    for step in steps:
        if step.name in manifests:
            num = config.workers.num_workers if step.stage.need(config).what == "workers" else config.actors.num_actors
            made = {"made_with": {"processes": {"num": num}}, "config": identity(step, config)}
            manifest = {"stage": step.stage.name, "num_rows_in": 100, "seconds": 50.0, **made, **manifests[step.name]}
            (run / step.name).write_manifest(manifest)
    return run
