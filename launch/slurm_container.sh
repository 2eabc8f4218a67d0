#!/usr/bin/env bash
# Trains in a Slurm job like launch/slurm.sh, each rank in a container of the image that docker/Dockerfile builds.
# Submit it from the repository's root:
#
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm_container.sh hvd_adam.sif -- --epochs 20
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm_container.sh registry#hvd_adam -- --epochs 20
#
# Uses pyxis and enroot if srun has --container-image (IMAGE is a .sqsh file, or REGISTRY#NAME:TAG), else Apptainer or
# Singularity (IMAGE is a .sif file, or docker://NAME). Slurm must have PMIx: srun --mpi=pmix starts the ranks.
#
#   --mount PATH          also mount this folder (for example the data) in the container, under the same path; may be
#                         repeated
#   --module NAME         Python module to run (default: hvd_adam.train)
#   -- ARGUMENTS          arguments of the module
#
# HVD_ADAM_CONTAINER_PYTHON names another Python in the image. Everything else works as in launch/slurm.sh.
#
#SBATCH --job-name=hvd_adam
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

home=${SLURM_SUBMIT_DIR:-$PWD}
if [[ ! -f $home/launch/lib/common.sh ]]; then
  echo "slurm_container.sh: no launch/lib/common.sh in $home: call sbatch from the repository's root" >&2
  exit 2
fi
cd "$home"
# shellcheck source=launch/lib/common.sh
source launch/lib/common.sh
# shellcheck source=launch/lib/slurm_job.sh
source launch/lib/slurm_job.sh

if [[ ${1:-} == -h || ${1:-} == --help ]]; then print_usage; exit 0; fi
[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is not a Slurm job; submit it: sbatch launch/slurm_container.sh IMAGE"
[[ $# -gt 0 && $1 != -* ]] || fail "no image given: sbatch launch/slurm_container.sh IMAGE [-- ARGUMENTS]"
image=$1
shift
mounts=("$home") job_arguments=()
while (($#)); do
  case $1 in
    --mount) [[ -d ${2:-} ]] || fail "--mount ${2:-}: no such folder"; mounts+=("$2"); shift ;;
    --launcher | -i | --network-interface) fail "$1: in containers, srun --mpi=pmix starts the ranks" ;;
    --) job_arguments+=("$@"); break ;;
    *) job_arguments+=("$1") ;;
  esac
  shift
done

python=${HVD_ADAM_CONTAINER_PYTHON:-/opt/hvd_adam/.venv/bin/python}
if srun --help 2>/dev/null | grep -- --container-image >/dev/null; then
  binds=
  for folder in "${mounts[@]}"; do binds+=${binds:+,}$folder:$folder; done
  container_options=(--container-image="$image" --container-mounts="$binds" --container-workdir="$home")
  container_command=("$python")
elif has_command apptainer || has_command singularity; then
  if has_command apptainer; then container_command=(apptainer); else container_command=(singularity); fi
  container_command+=(exec --nv --pwd "$home")
  for folder in "${mounts[@]}"; do container_command+=(--bind "$folder"); done
  container_command+=("$image" "$python")
else
  fail "this node has neither pyxis (srun --container-image) nor Apptainer: install one, or use launch/slurm.sh"
fi
run_job --launcher srun "${job_arguments[@]}"
