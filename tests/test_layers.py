"""Imports go one way: core, method, engines, stages. Torch from method on, transformers from engines on, Ray last."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import stic_ray

PACKAGE = "stic_ray"
SOURCE = Path(stic_ray.__file__).parent

MODELS = frozenset({"transformers", "peft", "tokenizers", "safetensors", "vllm"})
CLUSTER = frozenset({"ray", "deepspeed", "trl", "accelerate"})


@dataclass(frozen=True)
class Layer:
    """What the modules of a folder may import."""

    layers: frozenset[str]
    """Folders of the package beside their own."""
    heavy: frozenset[str]
    """Libraries out of torch, MODELS and CLUSTER; others are free."""


HEAVY = frozenset({"torch"}) | MODELS | CLUSTER
TOP = "top level"
LAYERS = {
    "core": Layer(frozenset(), frozenset()),
    "method": Layer(frozenset({"core"}), frozenset({"torch"})),
    "engines": Layer(frozenset({"core", "method"}), frozenset({"torch"}) | MODELS),
    "stages": Layer(frozenset({"core", "method", "engines"}), HEAVY),
    # Makes a checkpoint, so it may use what checkpoints are made with.
    "toyworld": Layer(frozenset({"core", "engines"}), frozenset({"torch"}) | MODELS),
    "report": Layer(frozenset({"core", "method"}), frozenset()),
    "estimate": Layer(frozenset({"core", "report", "toyworld"}), frozenset()),
    # Above the top: runs the command line of the pipeline as processes, and reads what they leave.
    "study": Layer(frozenset({"core", "method", "report", TOP}), frozenset()),
    TOP: Layer(frozenset({"core", "method", "engines", "stages", "toyworld", "report", "estimate", TOP}), frozenset()),
}
"""The modules at the top, which put the layers in order, import the heavy ones through them."""


def imported_names(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, inside functions too, by statement or by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rsplit(".", 1)[-1]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def layer_of(name: str, folders: set[str]) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in folders else TOP


def violations(source: Path) -> list[str]:
    """Every import below `source`, the folder of the package, that LAYERS does not allow."""
    folders = {path.name for path in source.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    found = [f"{folder}: a folder that is no layer" for folder in sorted(folders - LAYERS.keys())]
    for file in sorted(source.rglob("*.py")):
        place = file.relative_to(source)
        own = place.parts[0] if len(place.parts) > 1 else TOP
        if own not in LAYERS:
            continue
        package = ".".join([PACKAGE, *place.parts[:-1]])
        for line, name in imported_names(ast.parse(file.read_text(encoding="utf-8")), package):
            root = name.split(".")[0]
            if root == PACKAGE and name != f"{PACKAGE}.__version__":
                other = layer_of(name, folders)
                allowed = other == own or other in LAYERS[own].layers
            else:
                allowed = root not in HEAVY - LAYERS[own].heavy
            if not allowed:
                found.append(f"{place}:{line}: {own} imports {name}")
    return found


def test_imports_go_one_way() -> None:
    assert violations(SOURCE) == []


def test_every_layer_was_looked_at() -> None:
    assert {folder for folder in LAYERS if any((SOURCE / folder).glob("*.py"))} == LAYERS.keys() - {TOP}


@pytest.mark.parametrize(
    ("file", "code", "told"),
    [
        ("core/x.py", "from stic_ray.method.images import decode", "core imports stic_ray.method.images.decode"),
        ("core/x.py", "import stic_ray.stages.pool", "core imports stic_ray.stages.pool"),
        ("core/x.py", "from stic_ray import engines", "core imports stic_ray.engines"),
        ("core/x.py", "from ..engines import base", "core imports stic_ray.engines.base"),
        ("core/x.py", "from .. import stages", "core imports stic_ray.stages"),
        ("core/x.py", "from stic_ray.recipes import demo", "core imports stic_ray.recipes.demo"),
        ("core/x.py", "def f():\n    import torch", "core imports torch"),
        (
            "core/x.py",
            "if False:\n    class A:\n        def f(self):\n            import ray.data",
            "core imports ray.data",
        ),
        ("core/x.py", "import importlib\nimportlib.import_module('ray')", "core imports ray"),
        ("core/x.py", "__import__('torch.nn')", "core imports torch.nn"),
        ("core/deep/x.py", "from ...stages import pool", "core imports stic_ray.stages.pool"),
        ("method/x.py", "from transformers import AutoConfig", "method imports transformers.AutoConfig"),
        ("method/x.py", "from stic_ray.engines.base import Request", "method imports stic_ray.engines.base"),
        ("engines/x.py", "async def f():\n    import ray", "engines imports ray"),
        ("engines/x.py", "import trl as t", "engines imports trl"),
        ("engines/x.py", "from stic_ray.stages import shards", "engines imports stic_ray.stages.shards"),
        ("stages/x.py", "from stic_ray.pipeline import plan", "stages imports stic_ray.pipeline.plan"),
        ("stages/x.py", "from stic_ray.report import write", "stages imports stic_ray.report.write"),
        ("toyworld/x.py", "from stic_ray.stages import pool", "toyworld imports stic_ray.stages.pool"),
        ("toyworld/x.py", "import accelerate", "toyworld imports accelerate"),
        ("report/x.py", "from stic_ray.engines.base import Answer", "report imports stic_ray.engines.base"),
        ("report/x.py", "import torch", "report imports torch"),
        ("study/x.py", "from stic_ray.stages import cluster", "study imports stic_ray.stages.cluster"),
        ("study/x.py", "import ray", "study imports ray"),
        ("x.py", "from stic_ray.study import run", "top level imports stic_ray.study.run"),
        ("x.py", "import ray", "top level imports ray"),
        ("extras/x.py", "x = 1", "extras: a folder that is no layer"),
    ],
)
def test_a_planted_violation_is_found(file: str, code: str, told: str, tmp_path: Path) -> None:
    for folder in LAYERS.keys() - {TOP}:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("", encoding="utf-8")
    assert violations(tmp_path) == []
    planted = tmp_path / file
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(f"{code}\n", encoding="utf-8")
    assert len(violations(tmp_path)) == 1
    assert told in violations(tmp_path)[0]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("method/x.py", "import torch\nfrom stic_ray.core.config import RunConfig\nfrom . import images"),
        ("engines/x.py", "from stic_ray.method.prompts import fill\nfrom peft import PeftModel"),
        ("stages/x.py", "import ray\nfrom stic_ray.engines import base\nimport deepspeed"),
        ("report/x.py", "import numpy\nfrom stic_ray.method import corruption"),
        ("study/x.py", "from stic_ray import cli\nfrom stic_ray.report import drawing"),
        ("x.py", "def f():\n    from stic_ray.stages.pool import build_pool"),
        ("core/x.py", "import rayon\nfrom stic_ray import __version__\ntext = 'import torch'"),
    ],
)
def test_what_is_allowed_is_not_reported(file: str, code: str, tmp_path: Path) -> None:
    for folder in LAYERS.keys() - {TOP}:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / file).write_text(f"{code}\n", encoding="utf-8")
    assert violations(tmp_path) == []
