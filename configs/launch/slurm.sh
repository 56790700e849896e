#!/usr/bin/env bash
# Train on any number of nodes, and go on by itself after a time limit or a preemption:
#
#   python data/prepare.py data/fineweb-edu.yaml               # once, where all nodes see it
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 configs/launch/slurm.sh configs/llama_1b.yaml name=big
#
# One task is one rank on one GPU (for CPUs, leave out --gpus-per-node: --ntasks-per-node is the ranks of a node).
# Five minutes before the end (SIGUSR1), and when the job is preempted (SIGTERM), each rank saves its step and exits; this
# script puts the job back into the queue only if this job wrote "preempted" into runs/NAME/status.json. A run that is done,
# or that failed for a reason of its own, is not started again. (Slurm itself does so after it lost a node: --requeue. The run then
# goes on from its last checkpoint.)
#
# There is no torchrun here: it would swallow SIGUSR1, and kill its ranks 30 seconds after a SIGTERM, saved or not.
#
#SBATCH --job-name=train
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
: "${SLURM_JOB_ID:?submit it with sbatch}"
config=${1:?name a settings file, for example configs/llama_1b.yaml}
name=$(sed -n 's/^name:[[:space:]]*\([^[:space:]]*\).*/\1/p' "$config" | tr -d "\"'")
name=${name:-$(basename "$config" .yaml)}
for setting in "$@"; do
    case $setting in name=*) name=${setting#name=} ;; esac
done

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

mkdir -p runs
began=$(mktemp runs/.job.XXXXXX)
trap 'rm -f "$began"' EXIT

code=0
# shellcheck disable=SC2016 # each task fills in its own numbers
srun --kill-on-bad-exit=1 --wait=600 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python train.py "$@"
' train "$@" || code=$?

# Below 75 it failed for a reason of its own, and perhaps above too: srun gives the highest code, that of ranks it ended. What
# failed before it could say so left the status of an earlier job.
status=runs/$name/status.json
if [ "$code" -ge 75 ] && [ "$status" -nt "$began" ] && grep -q '"state": "preempted"' "$status"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
