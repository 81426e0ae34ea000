"""The pipeline as a process of a study: `python -m stic_ray.study.child`, the same options as jobs/full_pipeline.py.

The study holds the other end of this process's input. When that end closes, however the study ended, this process
and what it started end too, so that a rerun of the study never meets a process of the last one.
"""

import os
import signal
import threading
import time

from stic_ray import cli

_GRACE_S = 15.0


def end_with_the_study() -> None:
    """Wait until the study is gone, then end the process group: politely, then for certain."""
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with_the_study, daemon=True).start()
    cli.main(cli.full_pipeline, __doc__)
