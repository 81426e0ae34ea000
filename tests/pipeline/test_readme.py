"""The README tells the truth: its commands run, its tree and links exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """Every shell command of the README, continued lines joined."""
    text = "\n".join(BLOCKS).replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    inline = [found.strip() for found in re.findall(r"`((?:make|python) [^`]+)`", README)]
    return [line for line in [*lines, *inline] if re.match(r"(make|ray|python|\S*/python) ", line)]


def test_the_two_commands_are_make_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {command.split()[1] for command in commands() if command.startswith("make ")}
    assert {"demo", "test", "check"} <= named <= targets


def jobs() -> list[list[str]]:
    """The arguments of every call of a job."""
    found = []
    for command in commands():
        words = shlex.split(command)
        start = next((i for i, word in enumerate(words) if word.startswith("jobs/")), None)
        if start is not None:
            found.append(words[start:])
    return found


@pytest.mark.parametrize("arguments", jobs(), ids=lambda arguments: " ".join(arguments)[:60])
def test_a_job_of_the_readme_has_these_options(arguments: list[str], tmp_path: Path) -> None:
    job, *options = arguments
    command = [sys.executable, str(ROOT / job), *options, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    # Commands for a cluster are planned here, too, and then refused where this machine has too few GPUs.
    assert done.returncode == 0 or "fit: this machine has 1 node: " in done.stderr, done.stderr


def test_there_are_commands_to_check() -> None:
    assert len(jobs()) >= 3


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tree_is_the_repository() -> None:
    tree = next(block for block in BLOCKS if block.startswith("stic_ray/"))
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
            assert folder.is_dir(), name
        else:
            assert (ROOT / "stic_ray" / name).exists(), name
    shown = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    modules = {path.name for path in (ROOT / "stic_ray").iterdir() if not path.name.startswith("_")}
    assert modules - {"py.typed"} <= shown


def test_code_that_the_docs_name_exists() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        for name in re.findall(r"`((?:method|stages|engines|core|tests)/[\w/]+\.(?:py|yaml))", page.read_text()):
            assert (ROOT / "stic_ray" / name).exists() or (ROOT / name).exists(), f"{page.name} names {name}"
