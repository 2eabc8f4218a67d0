#!/usr/bin/env bash
# Builds a wheel of the unmodified Horovod release against the PyTorch and the MPI that are here, or finds the one
# that an earlier run built. The last line of stdout is the wheel's path.
#
#   PYTHON=.venv/bin/python launch/build_horovod.sh [--cpu | --cuda] [--without-mpi] [--print-key | --check | --install]
#
#   --cpu | --cuda   without or with NCCL (default: --cpu). Without it, GPU tensors go through the host's memory where
#                    torch is a CUDA build and nvcc is here: then ranks may share a GPU
#   --without-mpi    with Gloo alone to start ranks and to add up on CPUs: for horovodrun, not for mpirun and srun
#   --print-key      print what the wheel depends on, which is its name in the cache
#   --check          print the cached wheel's path, or exit with 1 where there is none or it is damaged
#   --install        install it into PYTHON's environment too
#
# PYTHON must have torch (default: python3). Needs mpicxx (unless --without-mpi), cmake (3.21 or newer) and g++; with
# --cuda also nvcc of torch's major CUDA version (CUDA_HOME, else the toolkit of the nvcc on PATH, else /usr/local/cuda)
# and the NCCL that came with torch.
# HOROVOD_BUILD_CUDA_CC_LIST names the GPU architectures (default: those of the GPUs here, else 80,90).
# Without a network: PIP_NO_INDEX=1 and PIP_FIND_LINKS=FOLDER, with Horovod's source and the build tools in FOLDER.
# The cache is ${XDG_CACHE_HOME:-~/.cache}/hvd_adam/horovod; deleting it is always safe.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

STORE=$CACHE/horovod

parse_arguments() {
  device=cpu action=build mpi=true
  while (($#)); do
    case $1 in
      --cpu | --cuda) device=${1#--} ;;
      --without-mpi) mpi=false ;;
      --print-key | --check | --install) action=${1#--} ;;
      -h | --help) print_usage; exit 0 ;;
      *) stop "unknown option $1; see --help" ;;
    esac
    shift
  done
}

require_tools() {
  local tool
  for tool in cmake g++ make flock; do have "$tool" || stop "$tool is missing; see launch/setup.sh"; done
  [[ $mpi == true ]] || return 0
  for tool in mpicxx mpirun; do
    have "$tool" || stop "$tool is missing; see launch/setup.sh, or build for Gloo alone with --without-mpi"
  done
}

# describe_torch: "2.13.0+cpu-abi1 cp311 CUDA FOLDER", CUDA being torch's CUDA version or none, FOLDER where torch and
# the packages that came with it lie, which is not PYTHON's own where it shares those of another environment.
describe_torch() {
  "$python" - <<'PY' || stop "$python cannot import torch: install it first" 1
import pathlib, sys
import torch
abi, version = int(torch.compiled_with_cxx11_abi()), "cp%d%d" % sys.version_info[:2]
print(f"{torch.__version__}-abi{abi}", version, torch.version.cuda or "none", pathlib.Path(torch.__file__).parents[1])
PY
}

# describe_mpi: the release ("openmpi4.1.4", or the first line that holds a number for another MPI) and a trace of
# where it lies, because two builds of one release link different libraries.
describe_mpi() {
  local line
  if [[ $mpi == false ]]; then
    printf 'nompi'
    return
  fi
  line=$(mpirun --version 2>&1 | grep -m1 '[0-9]') || line=unknown
  line=$(sed -E 's/mpirun \(Open MPI\) ?/openmpi/; s/[^A-Za-z0-9.]+/_/g' <<<"$line")
  printf '%s-%s' "$line" "$(command -v mpicxx | sha256sum | cut -c1-6)"
}

# find_cuda_home: the nvcc on PATH may be a script that calls the real one, so it is asked where its toolkit lies.
find_cuda_home() {
  local top
  if [[ -n ${CUDA_HOME:-} ]]; then
    printf '%s' "$CUDA_HOME"
  elif top=$(nvcc --dryrun -E -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p') && [[ -d $top ]]; then
    (cd "$top" && pwd)
  else
    printf '/usr/local/cuda'
  fi
}

# list_architectures: "80,90", from the GPUs here.
list_architectures() {
  local found=
  if [[ -z ${HOROVOD_BUILD_CUDA_CC_LIST:-} ]] && have nvidia-smi; then
    found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -un | paste -sd,) ||
      found=
  fi
  [[ $found =~ ^[0-9,]+$ ]] || found=80,90
  printf '%s' "${HOROVOD_BUILD_CUDA_CC_LIST:-$found}"
}

# read_toolkit: the CUDA toolkit, after checking that it fits torch. Horovod compiles CUDA code for every CUDA build of
# torch, with NCCL or without.
read_toolkit() {
  cuda_home=$(find_cuda_home)
  if [[ ! -x $cuda_home/bin/nvcc ]]; then
    [[ $device == cpu ]] ||
      stop "no nvcc in $cuda_home: install the CUDA $torch_cuda toolkit, set CUDA_HOME to it, or take --cpu"
    cuda_home=
    return
  fi
  local release
  release=$("$cuda_home/bin/nvcc" --version | sed -nE 's/.*release ([0-9]+\.[0-9]+).*/\1/p')
  [[ ${release%%.*} == "${torch_cuda%%.*}" ]] ||
    stop "nvcc in $cuda_home is CUDA $release, torch was built with $torch_cuda: set CUDA_HOME to a matching toolkit"
  architectures=$(list_architectures)
  key_of_device=cuda$release-nonccl-cc${architectures//,/.}
}

read_nccl() {
  local version
  nccl=$packages/nvidia/nccl
  [[ -e $nccl/lib/libnccl.so.2 && -e $nccl/include/nccl.h ]] ||
    stop "no NCCL in $nccl: install the nvidia-nccl package that torch $torch asks for"
  version=$(awk '/^#define NCCL_(MAJOR|MINOR|PATCH)/ { printf "%s%s", dot, $3; dot = "." }' "$nccl/include/nccl.h")
  # Horovod's library remembers this folder (RUNPATH), so it lies where it will still be at run time.
  shim=$("$python" -c 'import sys; print(sys.prefix)')/lib/hvd_adam_nccl
  key_of_device=${key_of_device/nonccl/nccl$version}-$(sha256sum <<<"$shim" | cut -c1-6)
}

read_key() {
  local tag recipe
  # Not `read < <(...)`: its exit code would be lost.
  local description
  description=$(describe_torch)
  read -r torch tag torch_cuda packages <<<"$description"
  recipe=$(cat "$here"/horovod/*.cmake | sha256sum | cut -c1-6)
  key_of_device=cpu cuda_home=
  if [[ $torch_cuda != none ]]; then
    read_toolkit
  elif [[ $device == cuda ]]; then
    stop "--cuda needs a CUDA build of torch, and $torch is none; take --cpu or another torch"
  fi
  if [[ $device == cuda ]]; then read_nccl; fi
  key=$HOROVOD_VERSION-torch$torch-$tag-$(describe_mpi)-$key_of_device-$(uname -m)-$recipe
}

# cached_wheel: prints the path of the whole wheel for this key; fails where there is none.
cached_wheel() {
  local folder=$STORE/$key wheels
  wheels=("$folder"/*.whl)
  [[ -s ${wheels[0]} && -f $folder/sha256 ]] || return 1
  (cd "$folder" && sha256sum --check --status sha256) || return 1
  printf '%s\n' "${wheels[0]}"
}

prepare_nccl_links() {
  mkdir -p "$shim"
  # NCCL's wheel has libnccl.so.2 alone; the linker looks for libnccl.so, the loader for libnccl.so.2.
  ln -sfn "$nccl/lib/libnccl.so.2" "$shim/libnccl.so"
  ln -sfn "$nccl/lib/libnccl.so.2" "$shim/libnccl.so.2"
}

set_build_environment() {
  export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
  unset HOROVOD_WITH_MPI HOROVOD_WITHOUT_MPI
  if [[ $mpi == true ]]; then export HOROVOD_WITH_MPI=1; else export HOROVOD_WITHOUT_MPI=1; fi
  export CMAKE_TOOLCHAIN_FILE=$here/horovod/cxx20.cmake MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}
  export CMAKE_POLICY_VERSION_MINIMUM=3.5 # CMake 4 refuses Gloo's older minimum without it
  if [[ -n $cuda_home ]]; then
    # CUDA_HOME: for torch, whose own search would take any nvcc's folder for the toolkit's.
    export HOROVOD_CUDA_HOME=$cuda_home CUDA_HOME=$cuda_home HOROVOD_BUILD_CUDA_CC_LIST=$architectures
  fi
  unset HOROVOD_GPU_OPERATIONS
  if [[ $device == cuda ]]; then
    prepare_nccl_links
    export HOROVOD_GPU_OPERATIONS=NCCL
    export HOROVOD_NCCL_INCLUDE=$nccl/include HOROVOD_NCCL_LIB=$shim HOROVOD_NCCL_LINK=SHARED
  fi
}

check_cmake() {
  local version
  version=$(cmake --version | sed -nE '1s/.*version ([0-9.]+).*/\1/p')
  printf '3.21\n%s\n' "$version" | sort -VC || stop "cmake $version is too old: 3.21 or newer is needed"
}

# build_wheel: into a folder of its own, which takes the final name only when it is whole.
build_wheel() {
  check_cmake
  set_build_environment
  rm -rf "${STORE:?}/$key" "$STORE/$key".building.*
  building=$(mktemp -d "$STORE/$key.building.XXXXXX")
  trap 'rm -rf "$building"' EXIT
  # setuptools: Python has no distutils of its own from 3.12 on, which Horovod's set-up and horovodrun import, and older
  # releases of torch import pkg_resources, which newer setuptools no longer has.
  "$python" -m pip install --quiet 'setuptools<81' wheel packaging cloudpickle psutil pyyaml cffi 9>&-
  # No pip cache: pip keeps wheels that it built by the source's name alone, and would hand out one that was
  # compiled against another torch.
  "$python" -m pip wheel --no-cache-dir --no-build-isolation --no-deps --no-binary horovod \
    "horovod==$HOROVOD_VERSION" --wheel-dir "$building" 9>&-
  (cd "$building" && sha256sum ./*.whl >sha256)
  mv -T "$building" "$STORE/$key"
}

# ensure_wheel: sets wheel. One build at a time for one key; whoever waited finds the wheel of whoever built.
ensure_wheel() {
  mkdir -p "$STORE"
  exec 9>"$STORE/$key.lock"
  flock --nonblock 9 || { echo "another build of $key is running: waiting for it" && flock 9; }
  if ! cached_wheel >/dev/null; then
    echo "building $key"
    build_wheel
  fi
  exec 9>&-
  wheel=$(cached_wheel) || stop "the wheel in $STORE/$key is damaged right after its build: is the disk full?" 1
}

parse_arguments "$@"
python=${PYTHON:-python3}
require_tools
read_key
case $action in
  print-key) echo "$key" ;;
  check) cached_wheel ;;
  build)
    ensure_wheel
    echo "$wheel"
    ;;
  install)
    ensure_wheel
    if [[ $device == cuda ]]; then prepare_nccl_links; fi
    "$python" -m pip install --quiet --no-deps --force-reinstall "$wheel"
    echo "$wheel"
    ;;
esac
