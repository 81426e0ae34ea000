"""Turn the toy experiment's study into docs/results/toyworld.json and toyworld.png (docs/results/toyworld.md).

python jobs/toyworld_results.py --study studies/toyworld
"""

import argparse
import shlex
import sys
from pathlib import Path

from stic_ray.core.rundir import RunDir
from stic_ray.study.systems import write_systems

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, help="folder or URI of the study")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    options = parser.parse_args()
    write_systems(RunDir.of(options.study), options.out, shlex.join(["python", *sys.argv]))
