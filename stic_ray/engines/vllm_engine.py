"""The engine for scale: vLLM, from the extra `stic-ray[vllm]`.

vLLM runs the model in processes of its own and puts the requests of all callers into one running batch, so that it is
not drained when one caller has its answers. Prompts are the token ids of `sequences`, which training sees too, with one
placeholder for the image: vLLM puts the image's tokens there.
"""

import asyncio
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from PIL import Image

from stic_ray.core.config import ActorsConfig, ModelConfig
from stic_ray.core.errors import EngineError, EngineLost, ModelError, one_line, type_and_message
from stic_ray.engines.adapters import CONFIG, adapter_of, parts_of_adapter
from stic_ray.engines.base import Answer, Request, Sampling
from stic_ray.engines.fingerprints import fingerprint
from stic_ray.engines.hub import explained
from stic_ray.engines.loading import choose_dtype, read_config, read_generation_config
from stic_ray.engines.rendering import end_token_ids, read_answer
from stic_ray.engines.sequences import ProcessorCounter, SequenceBuilder
from stic_ray.engines.weight_names import has_hub_names, link_with_hub_names

Result = TypeVar("Result")

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The sizes that vLLM makes room for."""

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # an actor has threads, which a fork does not survive
}
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""A GiB for cached tokens; threads as the operating system places them, since an actor shares its cores."""

_NAMES = {
    **dict.fromkeys(("ModelRegistry", "AsyncEngineArgs", "SamplingParams"), "vllm"),
    "RequestOutputKind": "vllm.sampling_params",
    "LoRARequest": "vllm.lora.request",
    "UsageContext": "vllm.usage.usage_lib",
    "AsyncLLM": "vllm.v1.engine.async_llm",
    "EngineDeadError": "vllm.v1.engine.exceptions",
}
"""What we use of vLLM, and the module that has it."""
_KILL = """
import contextlib, signal, sys
sys.stdin.read()
for handle in sys.argv[1:]:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(int(handle), signal.SIGKILL)
"""


def check_vllm(model: ModelConfig) -> SimpleNamespace:
    """Return all that we use of vLLM, by name. Raises ModelError where it cannot serve the model and its adapter here.

    For a process on a machine where actors will be: the driver's needs no vLLM.
    """
    vllm = _import_vllm()
    architectures = read_config(model).architectures or []
    if not set(architectures) & set(vllm.ModelRegistry.get_supported_archs()):
        raise ModelError(
            f"model.path='{model.path}' is a {' or '.join(architectures) or 'nameless model'}, which vLLM does not "
            "have; use model.engine=transformers."
        )
    adapter = adapter_of(model)
    others = parts_of_adapter(adapter) - {"language_model"} if adapter else None
    if others:
        raise ModelError(
            f"The adapter '{adapter}' changes the {' and the '.join(sorted(others))}, and vLLM applies adapters to the "
            "language model alone; use model.engine=transformers."
        )
    return vllm


def _import_vllm() -> SimpleNamespace:
    if importlib.util.find_spec("vllm") is None:
        raise ModelError("model.engine=vllm needs vLLM: install the extra stic-ray[vllm].")
    os.environ.update(ENVIRONMENT | dict(os.environ))
    try:
        found = {name: getattr(importlib.import_module(module), name) for name, module in _NAMES.items()}
    except (ImportError, AttributeError) as error:
        release = importlib.metadata.version("vllm")
        problem = f"vLLM {release} is not one that stic-ray[vllm] installs"
        raise ModelError(f"{problem}: {type_and_message(error)}") from error
    known = importlib.util.find_spec("vllm.exceptions") and importlib.import_module("vllm.exceptions")
    return SimpleNamespace(**found, VLLMError=getattr(known, "VLLMError", ValueError))  # older releases: ValueError


class VllmEngine(ProcessorCounter):
    """A model in vLLM's processes. Threads may share it."""

    def __init__(self, model: ModelConfig, actors: ActorsConfig) -> None:
        """Load the model, and its adapter, a local folder, onto it. Raises ModelError."""
        self._vllm = check_vllm(model)
        super().__init__(model)
        self.name = model.adapter or model.path
        self.revision = fingerprint(model)
        self.end_ids = end_token_ids(self.processor, read_generation_config(model))
        self._numbers = itertools.count()
        self._adapter: Any = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()
        others = set(multiprocessing.active_children())
        adapter = f" with the adapter '{model.adapter}'" if model.adapter else ""
        what = f"model.path='{model.path}'{adapter} in vLLM"
        with explained(model, what), tempfile.TemporaryDirectory(prefix="stic_ray_vllm_") as scratch:
            self._llm: Any = self._wait(_start(self._vllm, engine_arguments(model, actors, Path(scratch))))
            self.process_ids = [child.pid for child in multiprocessing.active_children() if child not in others]
            self._watchdog = end_with_us(self.process_ids)
            self.generate([Request("What is this?", Image.new("RGB", (64, 64)))], Sampling(1))  # loads what is left
            if model.adapter:
                self._wait(self._add_adapter(model.adapter))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        """Answer every request, together with those of other threads.

        Raises EngineError when one of these requests is refused, and EngineLost when vLLM has died.
        """
        with self.tokenizing:
            prompts = [make_prompt(self.builder, request) for request in requests]
        return self._wait(self._answer_all(requests, prompts, sampling))

    def close(self) -> None:
        """End vLLM's processes; the end of this process does the same."""
        self._llm.shutdown()
        self._wait(_end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._watchdog.communicate()

    async def _answer_all(
        self, requests: Sequence[Request], prompts: Sequence[Any], sampling: Sampling
    ) -> list[Answer]:
        """Answer all prompts; when one fails the others of this call are given up, those of other calls go on."""
        try:
            async with asyncio.TaskGroup() as group:
                pairs = zip(prompts, requests, strict=True)
                tasks = [group.create_task(self._answer(prompt, each.seed, sampling)) for prompt, each in pairs]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(self, prompt: dict[str, Any], seed: int, sampling: Sampling) -> Answer:
        output = await self._run(
            prompt,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=seed,
            stop_token_ids=self.end_ids,
        )
        num_image_tokens = output.prompt_token_ids.count(self.builder.image_token_id)
        num_added_tokens = len(output.prompt_token_ids) - len(prompt["prompt_token_ids"])
        ids = output.outputs[0].token_ids
        with self.tokenizing:
            return read_answer(self.processor, ids, self.end_ids, num_image_tokens, num_added_tokens)

    async def _run(self, prompt: dict[str, Any], **settings: Any) -> Any:
        vllm = self._vllm
        params = vllm.SamplingParams(**settings, detokenize=False, output_kind=vllm.RequestOutputKind.FINAL_ONLY)
        number = str(next(self._numbers))
        try:
            outputs = [o async for o in self._llm.generate(prompt, params, number, lora_request=self._adapter)]
        except vllm.EngineDeadError as error:
            raise EngineLost("vLLM's processes have died; their last messages are in the actor's log.") from error
        except (vllm.VLLMError, ValueError) as error:
            raise EngineError(f"vLLM gave no answer: {one_line(error)}") from error
        if outputs[-1].outputs[0].finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM gave up a request: {outputs[-1].outputs[0].finish_reason}")
        return outputs[-1]

    async def _add_adapter(self, adapter: str) -> None:
        """Apply the adapter to all requests. Raises ModelError when it changes nothing."""
        probe = make_prompt(self.builder, Request("Describe in detail what can be seen, and where.", image=None))
        before = await self._run(probe, temperature=0.0, max_tokens=1, prompt_logprobs=0)
        self._adapter = self._vllm.LoRARequest("adapter", 1, adapter)
        after = await self._run(probe, temperature=0.0, max_tokens=1, prompt_logprobs=0)
        if before.prompt_logprobs == after.prompt_logprobs:
            raise ModelError(f"The adapter '{adapter}' changes nothing.")

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _start(vllm: SimpleNamespace, arguments: dict[str, Any]) -> Any:
    # The context chooses defaults for throughput, as vLLM's own offline `LLM` has them.
    context = vllm.UsageContext.LLM_CLASS
    return vllm.AsyncLLM.from_engine_args(vllm.AsyncEngineArgs(**arguments), usage_context=context)


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def make_prompt(builder: SequenceBuilder, request: Request) -> dict[str, Any]:
    """Return a request as vLLM takes it: token ids with one placeholder for the image, and the image."""
    prompt: dict[str, Any] = {"prompt_token_ids": builder.ask(request.prompt, with_image=request.image is not None).ids}
    return prompt if request.image is None else prompt | {"multi_modal_data": {"image": request.image}}


def engine_arguments(model: ModelConfig, actors: ActorsConfig, scratch: Path) -> dict[str, Any]:
    """Return what vLLM is started with.

    A checkpoint without the Hub's names of weights is linked into `scratch` with them. Raises ModelError.
    """
    on_gpu = actors.num_gpus > 0
    if not on_gpu:
        os.environ.update(CPU_ENVIRONMENT | dict(os.environ))
    path = Path(model.path)
    if path.is_dir() and not has_hub_names(path):
        link_with_hub_names(path, scratch)
        path = scratch
    arguments = {
        "model": str(path) if path.is_dir() else model.path,
        "revision": model.revision,
        "tokenizer_revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "load_format": "safetensors",
        "dtype": str(choose_dtype(model, on_gpu=on_gpu)).removeprefix("torch."),
        "tensor_parallel_size": max(1, int(actors.num_gpus)),
        "distributed_executor_backend": "mp" if actors.num_gpus > 1 else None,
        "gpu_memory_utilization": actors.gpu_memory_share * min(1.0, actors.num_gpus or 1.0),
        "max_model_len": actors.max_length_tokens,
        "max_num_seqs": actors.batch_size,
        "enforce_eager": not on_gpu,
        # vLLM 0.32 rewinds the generator of a seed after a part of a prompt, which torch's CPU generators cannot do.
        "enable_chunked_prefill": on_gpu,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if model.adapter:
        rank = json.loads((Path(model.adapter) / CONFIG).read_text(encoding="utf-8"))["r"]
        room = next((size for size in LORA_RANKS if size >= rank), None)
        if room is None:
            raise ModelError(f"The adapter '{model.adapter}' has rank {rank}, vLLM takes up to {LORA_RANKS[-1]}.")
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
    return arguments


def end_with_us(process_ids: Sequence[int | None]) -> subprocess.Popen[bytes]:
    """Start a process that kills these when ours is gone, however it ended.

    They would outlive a killed actor and keep the GPU's memory. It waits for the end of its input, which the operating
    system brings about, and holds the processes themselves: after days a number may belong to another one.
    """
    handles = [os.pidfd_open(number) for number in process_ids if number is not None]
    command = [sys.executable, "-I", "-S", "-c", _KILL, *map(str, handles)]
    watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=handles, start_new_session=True)
    for handle in handles:
        os.close(handle)
    return watchdog
