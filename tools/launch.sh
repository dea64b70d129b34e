#!/usr/bin/env bash
# bash tools/launch.sh [--retries N] [LAUNCHER OPTIONS] CONFIG [-o key=value ...] [--resume auto]
#
# Trains CONFIG with one process, or with one worker per visible GPU; WORKERS=n asks for n workers (on CPU they talk through gloo).
#   --retries N       after a failure (a killed worker, a lost machine) start again with --resume auto, up to N times. Wrong input
#                     (status 2) and a run that was asked to stop (SIGTERM, Ctrl-C) are not started again.
#   LAUNCHER OPTIONS  --name value pairs of python -m paddle.distributed.launch, for example --devices 0,1 or, for several
#                     machines, --master HOST:PORT --nnodes 2; --log_dir DIR (default: log) gets the output of every worker.
# PYTHON=... names the interpreter; default: .venv of this project when it is there, else python3.
# Status: 0 done or stopped in order, 1 failed, 2 wrong input. docs/distributed.md says more.
set -uo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

refuse() {
    echo "launch.sh: $1" >&2
    exit 2
}

called=("$@")
retries=0 launcher=() chosen=
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;;
        --retries)
            [[ ${2-} =~ ^[0-9]+$ ]] || refuse "--retries needs a number, is '${2-}'"
            retries=$2; shift 2 ;;
        --*)
            [[ $1 == *=* || $# -gt 1 ]] || refuse "$1 needs a value; see --help"
            [[ $1 =~ ^--(nproc_per_node|devices|gpus)(=|$) ]] && chosen=1
            launcher+=("$1")
            [[ $1 == *=* ]] || { launcher+=("$2"); shift; }
            shift ;;
        *) break ;;
    esac
done
[ $# -ge 1 ] || refuse "give a run configuration, see run_configs/ and --help"
config=$1
shift
[ -f "$config" ] || refuse "$config does not exist; give a run configuration, see run_configs/"
resume=none previous=
for word in "$@"; do
    case $previous$word in --resume=*) resume=${word#--resume=} ;; esac
    [ "$previous" != --resume ] || resume=$word
    previous=$word
done
if [ "$retries" -gt 0 ] && [ "$resume" != auto ] && [ "$resume" != none ]; then
    refuse "--retries continues from the run's own checkpoints, not from $resume; start once without --retries, or give --resume auto"
fi

python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON-}" ] || [ -x "$python" ] || python=python3
workers=${WORKERS-}
if [ -z "$workers" ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES-}" ]; then
        workers=$(awk -F, '{print NF}' <<<"$CUDA_VISIBLE_DEVICES")
    else
        workers=$( (nvidia-smi -L 2>/dev/null || true) | wc -l)
    fi
fi
command=("$python")
# a cluster may say through the environment that there are several machines (Paddle's launcher reads it)
if [ "$workers" -gt 1 ] || [ ${#launcher[@]} -gt 0 ] || [ "${PADDLE_NNODES:-1}" != 1 ]; then
    command+=(-m paddle.distributed.launch)
    [ -n "$chosen" ] || command+=(--nproc_per_node "$((workers > 1 ? workers : 1))")
    command+=(${launcher[@]+"${launcher[@]}"})
fi
command+=("$root/tools/train.py" -c "$config" "$@")

# Paddle's launcher hides what its workers ended with: they write it down here (tools/train.py).
UNIMO2_STATUS_DIR=$(mktemp -d) || refuse "no temporary directory can be made; set TMPDIR to a writable one"
export UNIMO2_STATUS_DIR
trap 'rm -rf "$UNIMO2_STATUS_DIR"' EXIT

child='' stopped='' interrupted=''
stop() {
    stopped=1 interrupted=1
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

# attempt COMMAND...: run it to its end, passing signals on; sets status
attempt() {
    rm -f "$UNIMO2_STATUS_DIR"/*
    "$@" &
    child=$!
    while :; do
        interrupted=
        wait "$child"
        status=$?
        [ -n "$interrupted" ] || break
    done
    child=
    local ends
    ends=$(cat "$UNIMO2_STATUS_DIR"/* 2>/dev/null | sort -u)
    if [ "$ends" = 0 ]; then
        status=0
    elif [ -z "$ends$stopped" ]; then
        status=2 # not even one worker was started: another attempt would not do better
    elif [ "$status" -ne 0 ]; then
        case $'\n'$ends$'\n' in *$'\n2\n'*) status=2 ;; *) status=1 ;; esac
    fi
}

for ((tried = 0; ; tried++)); do
    attempt "${command[@]}"
    [ "$status" -eq 1 ] && [ -z "$stopped" ] && [ "$tried" -lt "$retries" ] || break
    echo "launch.sh: the run failed; starting again with --resume auto (retry $((tried + 1)) of $retries)" >&2
    [ "$tried" -gt 0 ] || [ "$resume" = auto ] || command+=(--resume auto)
    sleep 3 &
    wait $!
    [ -z "$stopped" ] || break
done
if [ "$status" -eq 1 ]; then
    again=${WORKERS:+ WORKERS=$WORKERS}$(printf ' %q' bash "${BASH_SOURCE[0]}" "${called[@]}")
    [ "$resume" = auto ] || again="$again --resume auto"
    echo "launch.sh: the run ended before its last step; its checkpoints are kept. Resume with:$again" >&2
fi
exit "$status"
