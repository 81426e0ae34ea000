"""stic-ray: vision-language models that teach themselves from unlabeled images, on a Ray cluster."""

__version__ = "0.1.0"
