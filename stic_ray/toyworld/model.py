"""The toy world's model and prompts as they are shipped.

The model is a LLaVA of 1.7 million parameters in the ordinary Hugging Face layout, which
`experiments/pretrain_toyworld.py` made.
"""

from pathlib import Path

import yaml

WEIGHTS = Path(__file__).with_name("weights")
"""Directory of the pretrained model."""
PROMPTS_FILE = Path(__file__).with_name("prompts.yaml")
PROMPTS = yaml.safe_load(PROMPTS_FILE.read_text(encoding="utf-8"))
"""The toy world's prompt set."""


def brief(question: str) -> str:
    """Return a question in the form that asks for a short answer."""
    return PROMPTS["answer_briefly"].replace("{question}", question)
