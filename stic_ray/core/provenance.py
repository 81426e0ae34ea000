"""What a run was made with: package versions and the commit."""

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("stic-ray", "torch", "ray", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "pyarrow")


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on; absent ones are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Return the commit of the source tree, "+changes" behind it if there are any; None when it is not known.

    Of a package that cluster/submit.sh sent, STIC_RAY_COMMIT says it.
    """
    if os.environ.get("STIC_RAY_COMMIT"):
        return os.environ["STIC_RAY_COMMIT"]
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changes else commit
