"""The pipeline over pool sizes, seeds and variants; cells that are done are skipped (docs/studies.md).

    python jobs/scaling_study.py --run studies/demo --sizes 24,48,96 --seeds 0,1 --parallel 2
    ray job submit --working-dir . -- python jobs/scaling_study.py --recipe llava16_7b --run s3://bucket/studies/a \\
        --sizes 6000,12000,30000 --variants variants.yaml
"""

from stic_ray import cli
from stic_ray.study.run import scaling_study

if __name__ == "__main__":
    cli.main(scaling_study, __doc__)
