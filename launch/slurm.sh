#!/usr/bin/env bash
# Trains in a Slurm job, one rank a GPU. Submit it from the repository's root:
#
#   sbatch launch/slurm.sh
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 launch/slurm.sh -- --epochs 20
#   sbatch --array=1-5 launch/slurm.sh                 five seeds, each with a run folder of its own
#
#   --launcher srun|mpirun|horovodrun   what starts the ranks (default: srun --mpi=pmix where Slurm has PMIx,
#                         else mpirun, else horovodrun, which needs ssh between the nodes)
#   -i, --network-interface NAME        for mpirun and horovodrun: the network interface to use
#   --module NAME         Python module to run (default: hvd_adam.train)
#   -- ARGUMENTS          go to the module
#
# What the command line of sbatch says goes before the lines below. GPUs are left to it, because a cluster without
# them refuses a job that names any. The Python is $HVD_ADAM_PYTHON, else the one that launch/setup.sh installed, else
# python3.
#
# The run folder is runs/slurm-JOB, in an array runs/slurm-JOB/TASK; with --output-dir DIR it is DIR, or DIR/TASK. A
# task of an array trains with its number as the seed. Two minutes before the time limit, on pre-emption, and on
# `scontrol requeue` the training saves itself, and the job is queued anew; when a node dies, too. It then goes on
# from its newest checkpoint, and its log with it. The job's exit code is the training's.
#
#SBATCH --job-name=hvd_adam
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# Slurm runs a copy of this file from its own folder: the repository is where sbatch was called.
home=${SLURM_SUBMIT_DIR:-$PWD}
if [[ ! -f $home/launch/common.sh ]]; then
  echo "slurm.sh: no launch/common.sh in $home: call sbatch from the repository's root" >&2
  exit 2
fi
cd "$home"
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/slurm_job.sh
source launch/slurm_job.sh

run_job "$@"
