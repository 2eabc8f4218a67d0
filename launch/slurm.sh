#!/usr/bin/env bash
# Trains in a Slurm job, one rank a GPU. Submit it from the repository's root:
#
#   sbatch launch/slurm.sh
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 launch/slurm.sh -- --epochs 20
#
# What the command line of sbatch says goes before the lines below. GPUs are left to it, because a cluster without
# them refuses a job that names any. Arguments after -- go to python -m hvd_adam.train. The job's exit code is the
# training's. The Python is $HVD_ADAM_PYTHON, else the one that launch/setup.sh installed, else python3.
#
#SBATCH --job-name=hvd_adam
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
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

if [[ ${1:-} == --help || ${1:-} == -h ]]; then print_usage; exit 0; fi
if [[ ${1:-} == -- ]]; then shift; elif (($#)); then stop "unknown option $1; options of the training go after --"; fi
[[ -n ${SLURM_JOB_ID:-} ]] || stop "this is no Slurm job; submit it: sbatch launch/slurm.sh"

ranks=${SLURM_NTASKS:-1}
per_node=${SLURM_NTASKS_PER_NODE:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
((gpus == 0 || gpus == per_node)) ||
  stop "$gpus GPUs but $per_node tasks a node: give sbatch --ntasks-per-node=$gpus, for one rank a GPU"

python=$(find_python)
export PATH=${python%/*}:$PATH
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it over from sbatch
fi

if srun --mpi=list 2>&1 | grep -qw pmix; then
  echo "Starting $ranks ranks on ${SLURM_JOB_NODELIST:-this node} by srun --mpi=pmix"
  exec srun --mpi=pmix --kill-on-bad-exit=1 "$python" -m hvd_adam.train "$@"
fi
echo "Starting $ranks ranks on ${SLURM_JOB_NODELIST:-this node} by mpirun: this Slurm has no PMIx"
exec launch/mpirun.sh -np "$ranks" -- "$@"
