"""The files of `cluster/`, and what all of them must keep to."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHERS = ("aws.yaml", "gcp.yaml")
MANIFESTS = ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml")
GROUPS = {"head", "reading", "generation", "training"}
"""Value of the node label `group`, which actors.label_selector and workers.label_selector choose by."""


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    """Package -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))
