"""Every module imports; configurations and results need neither torch nor Ray; files and functions stay small."""

import ast
import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import stic_ray

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(stic_ray.__path__, "stic_ray."))
JOBS = sorted((ROOT / "jobs").glob("*.py"))
SOURCES = sorted(
    file for folder in ("stic_ray", "jobs", "benchmarks", "experiments") for file in (ROOT / folder).rglob("*.py")
)
HEAVY = ("torch", "ray", "transformers", "trl", "peft", "deepspeed", "accelerate", "datasets")

MAX_LINES_OF_FILE = 300
MAX_LINES_OF_FUNCTION = 50


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    assert importlib.import_module(name).__doc__, "and says what it is for"


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.name)
def test_every_job_imports_without_running(file: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"job_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    assert job.__doc__


LIGHT = {
    "configurations": [name for name in MODULES if name.startswith("stic_ray.core")] + ["stic_ray.recipes"],
    "commands": ["stic_ray.cli", "stic_ray.pipeline", "stic_ray.status"],
    "results": [name for name in MODULES if name.startswith("stic_ray.report")],
    "studies": [name for name in MODULES if name.startswith("stic_ray.study")],
}
LOOK = """
import importlib, json, logging, sys
absent = json.loads(sys.argv[2])
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
loggers = [logging.getLogger(), *map(logging.getLogger, sorted(logging.root.manager.loggerDict))]
handled = [logger.name for logger in loggers if any(type(h) is not logging.NullHandler for h in logger.handlers)]
print(json.dumps({"modules": [name for name in sys.modules if sys.modules[name]], "handled": handled}))
"""


def look(modules: list[str], absent: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Import in a fresh process, where `absent` cannot be imported; say what was loaded and who handles logs."""
    command = [sys.executable, "-c", LOOK, json.dumps(modules), json.dumps(absent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", LIGHT)
def test_a_laptop_without_torch_and_ray_reads(what: str) -> None:
    found = look(LIGHT[what], absent=HEAVY)
    assert set(LIGHT[what]) <= set(found["modules"])


@pytest.mark.parametrize("what", LIGHT)
def test_importing_loads_nothing_heavy_and_leaves_logging_alone(what: str) -> None:
    found = look(LIGHT[what])
    assert set(HEAVY).isdisjoint(found["modules"])
    assert found["handled"] == []


def test_looking_would_find_what_is_heavy() -> None:
    assert "torch" in look(["stic_ray.method.objectives"])["modules"]


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


def long_functions(code: str) -> list[str]:
    functions = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [function.name for function in functions if lines_of(function) > MAX_LINES_OF_FUNCTION]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_fit_on_a_page(file: Path) -> None:
    code = file.read_text(encoding="utf-8")
    assert len(code.splitlines()) <= MAX_LINES_OF_FILE
    assert long_functions(code) == []


def test_a_function_that_is_too_long_is_found() -> None:
    body = "    x = 1\n" * MAX_LINES_OF_FUNCTION
    inside = "".join(f"    {line}\n" for line in f"def f():\n{body}".splitlines())
    assert long_functions(f"def f():\n{body}") == ["f"]
    assert long_functions(f"class A:\n{inside}") == ["f"]
    documented = f'def f():\n    """One.\n\n    Two.\n    """\n{body}'.replace("    x = 1\n", "", 1)
    assert long_functions(documented) == []
