"""A process of ours ends with the one that started it."""

import subprocess
import sys

import psutil

CHILD = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from stic_ray.stages.tasks import end_with_parent
end_with_parent()
ThreadPoolExecutor(1).submit(threading.Event().wait)
print("ready", flush=True)
sys.exit()
"""
PARENT = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {CHILD!r}]).pid, flush=True)
sys.stdin.read()
"""


def test_a_process_whose_pool_hangs_ends_with_the_one_that_started_it() -> None:
    """Python waits for the threads of pools when it ends: for ever, in this case."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs([child], timeout=60)[1], "gone by itself"
