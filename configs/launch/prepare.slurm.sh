#!/usr/bin/env bash
# Prepare one data set on many machines that share this directory:
#
#   python data/prepare.py data/fineweb-edu.yaml --scan
#   sbatch --array=1-16 configs/launch/prepare.slurm.sh data/fineweb-edu.yaml
#   python data/prepare.py data/fineweb-edu.yaml --merge        # when all are done; or as a job, see below
#
# A part that is killed or preempted continues where it stopped. One that failed is run again by its number:
#
#   PARTS=16 sbatch --array=3 configs/launch/prepare.slurm.sh data/fineweb-edu.yaml
#
# The merge as a job after all the others:
#
#   sbatch --dependency=afterok:JOB --wrap "python data/prepare.py data/fineweb-edu.yaml --merge"
#
#SBATCH --job-name=prepare
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
set -euo pipefail
part=${SLURM_ARRAY_TASK_ID:?submit it with --array=1-N}
exec python data/prepare.py "$@" --part "$part/${PARTS:-$SLURM_ARRAY_TASK_COUNT}" --workers "${SLURM_CPUS_PER_TASK:-1}"
