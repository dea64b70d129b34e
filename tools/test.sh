#!/usr/bin/env bash
# Runs the tests, after setting up the environment when needed.
#
#   bash tools/test.sh [--all] [--paddle 2.6.2] [pytest arguments]
#
# Without --all the tests marked slow are left out. pytest's paths are relative to the root of the repository; `-n 0` runs
# in one process (for --pdb).
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
marker='not slow'
paddle=3.3.1
while [ $# -gt 0 ]; do
    case $1 in
        --all) marker= ;;
        --paddle) paddle=${2-}; shift $(($# > 1)) ;;
        --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
        *) break ;;
    esac
    shift
done
venv=$(bash "$root/tools/setup_env.sh" --paddle "$paddle")

# One process per core, each with one thread: two would fight for the same core.
workers=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=1
cd -- "$root"
exec "$venv/bin/python" -m pytest -n "$((workers < 4 ? workers : 4))" --dist loadfile -m "$marker" "$@"
