"""From the configuration to a loaded engine."""

from pathlib import Path

from stic_ray.core.config import ActorsConfig, ModelConfig, RunConfig
from stic_ray.core.storage import Location
from stic_ray.engines.base import Engine, TokenCounter
from stic_ray.engines.fake import FakeEngine, read_script
from stic_ray.engines.guarded import GuardedEngine


def open_engine(model: ModelConfig, actors: ActorsConfig, checkpoint: Path | None = None) -> GuardedEngine:
    """Load the model of the run, or what a training stage left in `checkpoint`: an adapter, or a full model."""
    return GuardedEngine(_load_engine(model, actors, checkpoint), actors.timeout_s)


def open_trained(config: RunConfig, checkpoint: Location | None) -> GuardedEngine:
    """Load the model of a run, or what a training stage left in `checkpoint`, wherever that is."""
    return open_engine(config.model, config.actors, checkpoint.local_copy() if checkpoint else None)


def with_log_probabilities(model: ModelConfig) -> ModelConfig:
    """Return the model with an engine that says how likely texts are: vLLM's figures with images have been wrong."""
    return model.model_copy(update={"engine": "transformers"}) if model.engine == "vllm" else model


def _load_engine(model: ModelConfig, actors: ActorsConfig, checkpoint: Path | None) -> Engine:
    if model.engine == "fake":
        return FakeEngine(model.path, actors.batch_size)
    from stic_ray.engines.adapters import model_at  # the fake engine starts without torch
    from stic_ray.engines.fingerprints import pin

    model = pin(model_at(model, checkpoint))  # all files of one commit
    if model.engine == "vllm":
        from stic_ray.engines.vllm_engine import VllmEngine

        return VllmEngine(model, actors)
    from stic_ray.engines.batching import BatchLimits
    from stic_ray.engines.transformers_engine import TransformersEngine

    limits = BatchLimits(actors.batch_size, actors.batch_tokens)
    return TransformersEngine(model, limits=limits, on_gpu=actors.num_gpus > 0, merge=actors.merge_adapter)


def named_model(model: ModelConfig, name: str) -> ModelConfig:
    """Return another model in the place of the run's: a folder with an adapter on it, or with a model, or a hub id."""
    place = Location.of(name)
    if model.engine != "fake" and place.is_folder():
        from stic_ray.engines.adapters import is_adapter, model_at

        checkpoint = place.local_copy()
        found = model_at(model, checkpoint)
        return found if is_adapter(checkpoint) else found.model_copy(update={"chat_template": None})
    others = {"revision": None, "adapter": None, "chat_template": None, "trust_remote_code": False}
    return model.model_copy(update={"path": name, **others})


def open_counter(model: ModelConfig) -> TokenCounter:
    """Load what counts the tokens of the model of the run, without its weights."""
    if model.engine == "fake":
        return FakeEngine(model.path, 1)
    from stic_ray.engines.sequences import ProcessorCounter

    return ProcessorCounter(model)


def check_engine(model: ModelConfig) -> ModelConfig:
    """Return the model with the commit that its revision stands for now; loads no weights.

    Raises ModelError when it cannot be opened here.
    """
    if model.engine == "fake":
        read_script(model.path)
        return model
    from stic_ray.engines.checking import check_model
    from stic_ray.engines.fingerprints import pin

    model = pin(model)
    check_model(model)
    if model.engine == "vllm":
        from stic_ray.engines.vllm_engine import check_vllm

        check_vllm(model)
    return model
