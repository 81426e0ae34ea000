"""Before the first step: where everything is, and the mistakes that can be found before anything is spent."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stic_ray.core.config import ModelConfig, RunConfig
from stic_ray.core.errors import ConfigError
from stic_ray.core.overrides import apply_values, read_text
from stic_ray.core.rundir import RunDir, digest
from stic_ray.core.steps import Step, StepRun, prepare_step
from stic_ray.core.storage import Location
from stic_ray.engines.opening import check_engine
from stic_ray.method.prompts import load_prompts
from stic_ray.toyworld.assets import resolve_toyworld

COMMITS = "model_commits.json"
"""The commit that a hub id and revision stood for when the run began: a branch may move."""


def prepare(steps: Sequence[Step], config: RunConfig, run: RunDir) -> list[StepRun]:
    """Return the steps as their functions get them. Raises UserError for settings that cannot be."""
    return [prepare_step(step, config, run, resolve(step.configured(config), run)) for step in steps]


def resolve(config: RunConfig, run: RunDir) -> RunConfig:
    """Return the configuration as workers on any machine, in any working directory, can use it.

    `toyworld` becomes the places of its parts, local paths of the model and its adapter absolute, the revision of a hub
    id the commit that the run has recorded, and a file with a chat template its text. Raises ConfigError when that file
    cannot be read.
    """
    config = resolve_toyworld(config, run)
    model = config.model
    path = os.path.expanduser(model.path)
    changes = {
        "model.path": os.path.abspath(path) if os.path.isdir(path) else model.path,
        "model.revision": _commits(run).get(_hub_name(model), model.revision),
        "model.adapter": Location.of(model.adapter).uri if model.adapter else None,
        "model.chat_template": _text_of(model.chat_template),
    }
    return apply_values(config, changes)


def _text_of(template: str | None) -> str | None:
    """Return the text of a chat template that is given as text or as a file."""
    if template is None or "{" in template:
        return template
    try:
        return read_text(Path(template))
    except OSError as error:
        raise ConfigError(f"model.chat_template='{template}' cannot be read: {error.strerror}.") from error


def check_before_work(steps: Sequence[tuple[Step, StepRun]], *, engine_too: bool = True) -> dict[str, ModelConfig]:
    """Find the user's mistakes before minutes or GPUs are spent on earlier steps. Raises UserError.

    Returns the models that were found to load here, by their digest: with `engine_too` all of the steps, else none.
    """
    for step, prepared in steps:
        load_prompts(prepared.config.prompts)
        step.stage.check(prepared)
    loading = [prepared.config.model for step, prepared in steps if step.stage.loads_model(prepared.config)]
    models = {digest(model.model_dump()): model for model in loading} if engine_too else {}
    return {name: check_engine(model) for name, model in models.items()}


def with_commit(step: StepRun, found: ModelConfig, run: RunDir) -> StepRun:
    """Return the step with its model as it was found, and record the commit, which later calls load, too."""
    model = step.config.model
    if found.revision != model.revision:
        run.write_json(COMMITS, {**_commits(run), _hub_name(model): found.revision})
    return replace(step, config=step.config.model_copy(update={"model": found}))


def _commits(run: RunDir) -> dict[str, str]:
    return run.read_json(COMMITS) or {}


def _hub_name(model: ModelConfig) -> str:
    return f"{model.path}@{model.revision or 'main'}"
