"""Lets PyPI's torchvision, which is built for CUDA, be imported beside the CPU build of torch.

For the environment of `make test-vllm` alone: it lies in that environment's site-packages, with a .pth file that
imports it whenever Python starts, in child processes too. torchvision cannot load its compiled operators there, and
stops because their names are unknown. vLLM's LLaVA needs none of them, only the transforms in Python, so the names are
declared, without an implementation, right before torchvision is imported for the first time.
"""

import sys
from collections.abc import Sequence
from types import ModuleType

OPERATORS = (
    "nms(Tensor boxes, Tensor scores, float threshold) -> Tensor",
    "qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float scale, int height, int width, int ratio, bool aligned) -> Tensor",
)


class DeclareOperators:
    """First in `sys.meta_path`: finds nothing itself."""

    library: object = None
    """Kept, as the declarations go with it."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Declare the operators when torchvision is looked for."""
        if name != "torchvision" or self.library is not None:
            return
        import torch

        self.library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            self.library.define(operator)


sys.meta_path.insert(0, DeclareOperators())  # type: ignore[arg-type]
