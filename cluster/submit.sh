#!/usr/bin/env bash
# Submit a job to a Ray cluster and follow its log until it ends; the exit status is 0 when it succeeded, else 1.
#
#   export RAY_ADDRESS=http://HEAD:8265
#   cluster/submit.sh jobs/full_pipeline.py --recipe llava16_7b --run s3://bucket/runs/a
#   cluster/submit.sh --no-wait --submission-id night -- jobs/full_pipeline.py --run s3://bucket/runs/a
#
# Options of `ray job submit` stand before the `--`. What is packed is this folder without what .gitignore and .rayignore
# name. The token comes from RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token; RAY_AUTH_MODE=disabled
# is for a cluster without tokens.
set -euo pipefail
cd "$(dirname "$0")/.."
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
if [ -x .venv/bin/ray ]; then PATH="$PWD/.venv/bin:$PATH"; fi

options=()
if [[ " $* " == *" -- "* ]]; then
    while [ "$1" != "--" ]; do options+=("$1"); shift; done
    shift
fi
if [ $# = 0 ] || [ -z "${RAY_ADDRESS:-}" ]; then sed -n '2,11s/^# \?//p' "$0" >&2; exit 1; fi

python - <<'PACKED'
import tempfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package  # as `ray job submit` packs it

with tempfile.TemporaryDirectory() as folder:
    package = Path(folder) / "package.zip"
    create_package(".", package, include_gitignore=True)
    print(f"package: {package.stat().st_size / 2**20:.1f} MiB")
PACKED
commit="$(git rev-parse HEAD 2>/dev/null || true)$([ -z "$(git status --porcelain 2>/dev/null)" ] || echo +changes)"
exec ray job submit --working-dir . --runtime-env-json "{\"env_vars\": {\"STIC_RAY_COMMIT\": \"$commit\"}}" \
    ${options[@]+"${options[@]}"} -- python "$@"
