#!/bin/bash
# Pre-training on 4 machines with 8 GPUs each under Slurm. From a clone on a file system that all machines share:
#   sbatch tools/cluster/slurm.sh run_configs/pretrain/unimo2_base.yaml -o run.output=output/base
# Slurm sends SIGTERM 180 seconds before the time limit; the run then saves and ends with status 0. Submit the same line again: it
# continues from the newest checkpoint, because of --resume auto.
#SBATCH --job-name=unimo2
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --output=slurm-%j.out
set -euo pipefail

config=${1:?usage: sbatch tools/cluster/slurm.sh CONFIG [-o key=value ...]}
shift
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))
export MASTER WORKERS=8

# One launch for each machine; each passes Slurm's SIGTERM on to its workers. --kill-on-bad-exit ends all when one gives up.
exec srun --kill-on-bad-exit=1 bash -c 'exec bash tools/launch.sh --retries 3 --master "$MASTER" --nnodes "$SLURM_JOB_NUM_NODES" \
    --job_id "$SLURM_JOB_ID" --log_dir "log/$SLURM_JOB_ID/$SLURM_NODEID" "$@"' launch "$config" --resume auto "$@"
