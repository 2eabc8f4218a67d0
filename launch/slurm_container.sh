#!/usr/bin/env bash
# Trains in a Slurm job as launch/slurm.sh does, each rank in a container of the image that docker/Dockerfile builds.
# Submit it from the repository's root:
#
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm_container.sh hvd_adam.sif -- --epochs 20
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm_container.sh registry#hvd_adam -- --epochs 20
#
# Through pyxis and enroot where srun has --container-image (IMAGE is a .sqsh file, or REGISTRY#NAME:TAG), else through
# Apptainer or Singularity (a .sif file, or docker://NAME). Ranks start by srun --mpi=pmix, which Slurm must have.
#
#   --mount PATH          a folder that the ranks need besides this one (data, say), under the same path; may be
#                         repeated
#   --module NAME         Python module to run (default: hvd_adam.train)
#   -- ARGUMENTS          go to the module
#
# HVD_ADAM_CONTAINER_PYTHON names another Python in the image. Everything else is as in launch/slurm.sh.
#
#SBATCH --job-name=hvd_adam
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

home=${SLURM_SUBMIT_DIR:-$PWD}
if [[ ! -f $home/launch/common.sh ]]; then
  echo "slurm_container.sh: no launch/common.sh in $home: call sbatch from the repository's root" >&2
  exit 2
fi
cd "$home"
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/slurm_job.sh
source launch/slurm_job.sh

if [[ ${1:-} == -h || ${1:-} == --help ]]; then print_usage; exit 0; fi
[[ -n ${SLURM_JOB_ID:-} ]] || stop "this is no Slurm job; submit it: sbatch launch/slurm_container.sh IMAGE"
[[ $# -gt 0 && $1 != -* ]] || stop "which image? sbatch launch/slurm_container.sh IMAGE [-- arguments]"
image=$1
shift
mounts=("$home") others=()
while (($#)); do
  case $1 in
    --mount) [[ -d ${2:-} ]] || stop "--mount ${2:-}: no such folder"; mounts+=("$2"); shift ;;
    --launcher | -i | --network-interface) stop "$1: in containers ranks start by srun --mpi=pmix" ;;
    --) others+=("$@"); break ;;
    *) others+=("$1") ;;
  esac
  shift
done

python=${HVD_ADAM_CONTAINER_PYTHON:-/opt/hvd_adam/.venv/bin/python}
if srun --help 2>/dev/null | grep -q -- --container-image; then
  binds=
  for folder in "${mounts[@]}"; do binds+=${binds:+,}$folder:$folder; done
  container_options=(--container-image="$image" --container-mounts="$binds" --container-workdir="$home")
  container_command=("$python")
elif have apptainer || have singularity; then
  if have apptainer; then container_command=(apptainer); else container_command=(singularity); fi
  container_command+=(exec --nv --pwd "$home")
  for folder in "${mounts[@]}"; do container_command+=(--bind "$folder"); done
  container_command+=("$image" "$python")
else
  stop "this node has neither pyxis (srun --container-image) nor Apptainer; use launch/slurm.sh, or install one"
fi
run_job --launcher srun "${others[@]}"
