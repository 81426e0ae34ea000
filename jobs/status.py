"""How far a run is, read from its directory: finished stages, shards, checkpoints. Needs no cluster.

python jobs/status.py --run s3://bucket/runs/a
"""

from stic_ray import cli

if __name__ == "__main__":
    cli.main(cli.status, __doc__)
