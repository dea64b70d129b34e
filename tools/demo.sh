#!/usr/bin/env bash
# The whole demo with one command: sets up .venv when needed, then runs `unimo2 demo` with the given arguments
# (`bash tools/demo.sh --help` lists them).
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(bash "$root/tools/setup_env.sh")

# `import paddle` sets one thread when this is unset; the demo's small tensors gain nothing beyond eight.
if [ -z "${OMP_NUM_THREADS-}" ]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores < 8 ? cores : 8))
fi
exec "$venv/bin/unimo2" demo "$@"
