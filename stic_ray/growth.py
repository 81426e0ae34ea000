"""Whether the finished pool of a run takes in what is new in its source: told before Ray is started."""

import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from stic_ray.core.config import RunConfig, is_toy
from stic_ray.core.errors import SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.stages.listing import BUILDING, Change, compare

logger = logging.getLogger(__name__)


def takes_in_more(config: RunConfig, pool: RunDir, *, has_trained: bool) -> bool:
    """Whether the source has new images that this run can still use; logs how the source differs from the index."""
    asked = config.preferences.num_images
    manifest = pool.manifest
    if manifest is None or is_toy(config.pool.source):
        return False
    if (pool / BUILDING).location.is_folder():
        return True  # begun, and stopped before its end
    change = _change_of(config.pool.source, pool, manifest["num_listing_shards"])
    if change.num_changed or change.num_gone:
        logger.warning(
            "pool: of the source's files %d have changed and %d are gone; the index stays as it is, and images that "
            "cannot be read any more become rejected rows",
            change.num_changed,
            change.num_gone,
        )
    if not change.num_new:
        return False
    if has_trained:
        stays = "this run has begun to train and stays with the images it has; another --run takes all"
    elif asked is not None and asked <= manifest["num_rows_written"]:
        stays = f"this run has the {asked} images that preferences.num_images asks for and stays with them"
    else:
        logger.info("pool: %d files are new in the source; their images go behind those that are there", change.num_new)
        return True
    logger.warning("pool: %d files are new in the source; %s", change.num_new, stays)
    return False


def _change_of(source: str, pool: RunDir, num_shards: int) -> Change:
    """Compare a source with the pool's listing; one that cannot be listed any more leaves the pool as it is.

    The names are listed in a process of their own, so that the driver never holds those of a whole pool.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(compare, source, pool, num_shards).result()
        except (SourceError, OSError) as error:
            logger.warning("pool: the source cannot be compared with the index, which stays as it is: %s", error)
            return Change()
