"""Rejected images that training makes of a pair's own image, where the pair brings none."""

from dataclasses import dataclass

from PIL import Image

from stic_ray.core.preferences import GradedCorruption
from stic_ray.core.randomness import seed_for
from stic_ray.method.corruption import corrupt, graded


@dataclass(frozen=True)
class ImageMaker:
    """Corrupts images with a strength that changes over the training; a function of seed, epoch and image."""

    kind: GradedCorruption
    strengths: tuple[float, float]
    """At the first and at the last step (TEMPLE trains so from easy to hard)."""
    num_steps: int
    seed: int

    def make(self, picture: Image.Image, image_id: str, epoch: int, step: int) -> Image.Image:
        """Return the rejected image of a picture, in an epoch and at a step that is counted over all epochs."""
        begin, end = self.strengths
        progress = min(1.0, step / max(1, self.num_steps - 1))
        drawn = seed_for(self.seed, image_id, f"rejected image of epoch {epoch}") % 2**32
        return corrupt(picture, graded(self.kind, begin + (end - begin) * progress, drawn))
