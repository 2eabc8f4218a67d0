#!/usr/bin/env bash
# Trains in a Slurm job, one rank per GPU. Submit it from the repository's root:
#
#   sbatch launch/slurm.sh
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 launch/slurm.sh -- --epochs 20
#   sbatch --array=1-5 launch/slurm.sh                 five seeds, each with its own run folder
#
#   --launcher srun|mpirun|horovodrun   program that starts the ranks (default: srun --mpi=pmix if Slurm has PMIx,
#                         else mpirun, else horovodrun, which needs ssh between the nodes)
#   -i, --network-interface NAME        the network interface to use, for mpirun and horovodrun
#   --module NAME         Python module to run (default: hvd_adam.train)
#   -- ARGUMENTS          arguments of the module
#
# Options on sbatch's command line override the lines below. These name no GPUs, because a cluster without GPUs rejects
# a job that does. The Python is $HVD_ADAM_PYTHON, else the one that launch/setup.sh installed, else python3.
#
# The run folder is runs/slurm-JOB, in an array runs/slurm-JOB/TASK; with --output-dir DIR it is DIR, or DIR/TASK. A
# task of an array trains with its number as the seed. Both override a --config file. Two minutes before the time limit,
# on pre-emption, and on `scontrol requeue` the training saves a checkpoint, and the job, or the task of the array, is
# requeued, as it is when a node fails. It then resumes from its newest checkpoint and appends to its log, slurm-JOB.out
# or slurm-JOB_TASK.out. The job's exit code is the training's.
#
#SBATCH --job-name=hvd_adam
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# Slurm runs a copy of this file from its spool directory. The repository is where sbatch was called.
home=${SLURM_SUBMIT_DIR:-$PWD}
if [[ ! -f $home/launch/lib/common.sh ]]; then
  echo "slurm.sh: no launch/lib/common.sh in $home: call sbatch from the repository's root" >&2
  exit 2
fi
cd "$home"
# shellcheck source=launch/lib/common.sh
source launch/lib/common.sh
# shellcheck source=launch/lib/slurm_job.sh
source launch/lib/slurm_job.sh

run_job "$@"
