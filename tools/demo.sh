#!/usr/bin/env bash
# The whole demo with one command: sets up .venv when needed, then runs `unimo2 demo` with the given arguments
# (`bash tools/demo.sh --help` lists them). `unimo2` itself sets the threads, unless OMP_NUM_THREADS does.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(bash "$root/tools/setup_env.sh")
exec "$venv/bin/unimo2" demo "$@"
