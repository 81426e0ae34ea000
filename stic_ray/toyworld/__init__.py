"""The embedded default world: drawn scenes, true sentences about them, a tiny model and its benchmarks."""

from pathlib import Path

WEIGHTS = Path(__file__).with_name("weights")
"""The pretrained model: a LLaVA of 1.7 million parameters in the ordinary Hugging Face layout."""
