"""What all cluster files must agree on: versions are the pins, and nothing is a secret."""

import re
import tomllib

import pytest
from packaging.specifiers import SpecifierSet

from tests.cluster.files import CLUSTER, LAUNCHERS, MANIFESTS, ROOT, pins

FILES = (*LAUNCHERS, *MANIFESTS, "Dockerfile", "README.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|AIza[\w-]{35}|hf_\w{20,}|gh[pousr]_\w{20,}|-----BEGIN|"
    r"(?i:password|secret_access_key|auth_token|api_key)\s*[:=]\s*['\"]?\w{8,}"
)


def text(name: str) -> str:
    return (CLUSTER / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_ray_is_the_pinned_one_wherever_it_is_named(name: str) -> None:
    ray = pins()["ray"]
    assert [needed for needed in PROJECT["dependencies"] if re.fullmatch(rf"ray\[[\w,]+\]=={re.escape(ray)}", needed)]
    named = re.findall(r"(?:stic-ray:|ray\[default\]==|rayVersion: |\bRay )(\d[\w.]*)", text(name))
    assert named and set(named) == {ray}


def test_the_image_has_the_pinned_versions() -> None:
    dockerfile, pinned = text("Dockerfile"), pins()
    assert "--constraint constraints.txt" in dockerfile
    for package, version in re.findall(r"\b(boto3|torch)==([\d.]+)", dockerfile):
        assert version == pinned[package], package
    (python,) = re.findall(r"PYTHON_VERSION=([\d.]+)", dockerfile)
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    (torch,) = (needed for needed in PROJECT["dependencies"] if needed.startswith("torch=="))
    assert torch == f"torch=={pinned['torch']}"


@pytest.mark.parametrize("name", FILES)
def test_nothing_looks_like_a_key(name: str) -> None:
    assert SECRET.search(text(name)) is None


@pytest.mark.parametrize(
    "leak",
    ["AKIAABCDEFGHIJKLMNOP", "hf_abcdefghijklmnopqrstuv", "aws_secret_access_key: abcdefgh1234", "-----BEGIN RSA"],
)
def test_a_key_would_be_found(leak: str) -> None:
    assert SECRET.search(f"env: {leak}")


@pytest.mark.parametrize("name", (*LAUNCHERS, *MANIFESTS))
def test_every_placeholder_says_that_it_is_one(name: str) -> None:
    places = [line for line in text(name).splitlines() if re.search(r"REGISTRY|0{11,}|\bPROJECT\b", line)]
    assert places
    assert [line for line in places if "EDIT" not in line] == []


def test_the_readme_has_every_file_and_links_lead_somewhere() -> None:
    targets = {target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text("README.md"))}
    assert {*LAUNCHERS, *MANIFESTS, "Dockerfile"} <= targets
    assert [target for target in targets if not (CLUSTER / target).exists()] == []
