#!/usr/bin/env bash
# bash tools/launch.sh CONFIG [-o key=value ...] [--resume auto]: train CONFIG with one process, or with one worker per GPU.
# Chooses by the visible GPUs; WORKERS=n forces n workers (on CPU they talk through gloo). Uses .venv when it is there, else python3.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 1 ] || [ "$1" = "--help" ] || [ "$1" = "-h" ]; then
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
    exit $(($# < 1 ? 2 : 0))
fi
config=$1
shift
if [ ! -f "$config" ]; then
    echo "launch.sh: $config does not exist; give a run configuration, see run_configs/" >&2
    exit 2
fi
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3

workers=${WORKERS-}
if [ -z "$workers" ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES-}" ]; then
        workers=$(awk -F, '{print NF}' <<<"$CUDA_VISIBLE_DEVICES")
    else
        workers=$( (nvidia-smi -L 2>/dev/null || true) | wc -l)
    fi
fi
if [ "$workers" -gt 1 ]; then
    exec "$python" -m paddle.distributed.launch --nproc_per_node "$workers" "$root/tools/train.py" -c "$config" "$@"
fi
exec "$python" "$root/tools/train.py" -c "$config" "$@"
