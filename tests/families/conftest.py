"""Families that need torchvision, and those that do not: `make test-families`. Without it nothing is collected here."""

import importlib.util

from tests.engines.conftest import checkpoint, loaded

__all__ = ["checkpoint", "loaded"]

collect_ignore_glob = [] if importlib.util.find_spec("torchvision") else ["test_*.py"]
