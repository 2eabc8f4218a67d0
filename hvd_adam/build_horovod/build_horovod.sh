#!/usr/bin/env bash
# Builds a wheel of the unmodified Horovod release for the PyTorch and the MPI of this machine, or finds the wheel that
# an earlier run built. The last line of stdout is the wheel's path.
#
#   python -m hvd_adam.build_horovod [--cpu | --cuda] [--without-mpi] [--print-key | --check | --install]
#   PYTHON=.venv/bin/python launch/build_horovod.sh [same options]              from a clone of the repository
#
#   --cpu | --cuda   without or with NCCL (default: --cpu). Without NCCL, GPU tensors are copied through host memory if
#                    torch is a CUDA build and nvcc is installed: ranks may then share a GPU
#   --without-mpi    Gloo alone starts the ranks and reduces on CPUs: for horovodrun, not for mpirun and srun
#   --print-key      print the wheel's name in the cache, which contains everything that the wheel depends on
#   --check          print the cached wheel's path, or exit with 1 if there is none or it is damaged
#   --install        also install the wheel into PYTHON's environment
#
# The Python is the one that runs the module, or PYTHON for the script (default: python3); it must have torch. Needs
# mpicxx (unless --without-mpi), cmake (3.21 or newer) and g++; with --cuda also nvcc of torch's major CUDA version
# (CUDA_HOME, else the toolkit of the nvcc on PATH, else /usr/local/cuda) and the NCCL that was installed with torch.
# HOROVOD_BUILD_CUDA_CC_LIST names the GPU architectures (default: those of this machine's GPUs, else 80,90).
# Without a network: PIP_NO_INDEX=1 and PIP_FIND_LINKS=FOLDER, with Horovod's source and the build tools in FOLDER.
# The cache is ${XDG_CACHE_HOME:-~/.cache}/hvd_adam/horovod; it is always safe to delete it.
set -euo pipefail

here=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=hvd_adam/build_horovod/shell.sh
source "$here/shell.sh"

# What Horovod's build, horovodrun and horovod.torch import. setuptools: Python has no distutils of its own from 3.12
# on, and older releases of torch import pkg_resources, which newer setuptools no longer has.
REQUIREMENTS=('setuptools<81' packaging cloudpickle psutil pyyaml cffi)
WHEELS=$CACHE/horovod

parse_arguments() {
  device=cpu action=build mpi=true
  while (($#)); do
    case $1 in
      --cpu | --cuda) device=${1#--} ;;
      --without-mpi) mpi=false ;;
      --print-key | --check | --install) action=${1#--} ;;
      -h | --help) print_usage; exit 0 ;;
      *) fail "unknown option $1; see --help" ;;
    esac
    shift
  done
}

require_tools() {
  local tool
  for tool in cmake g++ make flock; do has_command "$tool" || fail "$tool is missing: install it first, or run launch/setup.sh"; done
  [[ $mpi == true ]] || return 0
  for tool in mpicxx mpirun; do
    has_command "$tool" || fail "$tool is missing: install it first, or build for Gloo alone with --without-mpi"
  done
}

# describe_torch: print "2.13.0+cpu-abi1 cp311 CUDA FOLDER". CUDA is torch's CUDA version or none. FOLDER contains torch
# and its dependencies; it is not PYTHON's own if that environment shares the packages of another one.
describe_torch() {
  "$python" - <<'PY' || fail "$python cannot import torch: install it first" 1
import pathlib, sys
import torch
abi, version = int(torch.compiled_with_cxx11_abi()), "cp%d%d" % sys.version_info[:2]
print(f"{torch.__version__}-abi{abi}", version, torch.version.cuda or "none", pathlib.Path(torch.__file__).parents[1])
PY
}

# describe_mpi: print the release ("openmpi4.1.4", or for another MPI the first line with a number) and a hash of its
# path, because two builds of one release link different libraries.
describe_mpi() {
  local line
  if [[ $mpi == false ]]; then
    printf 'nompi'
    return
  fi
  line=$(grep -m1 '[0-9]' <<<"$(mpirun --version 2>&1)") || line=unknown
  line=$(sed -E 's/mpirun \(Open MPI\) ?/openmpi/; s/[^A-Za-z0-9.]+/_/g' <<<"$line")
  printf '%s-%s' "$line" "$(command -v mpicxx | sha256sum | cut -c1-6)"
}

# find_cuda_home: print the toolkit's folder. nvcc itself reports it, because the nvcc on PATH may be a script that calls
# the real one.
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

# list_architectures: print the architectures of the GPUs of this machine as "80,90".
list_architectures() {
  local found=
  if [[ -z ${HOROVOD_BUILD_CUDA_CC_LIST:-} ]] && has_command nvidia-smi; then
    found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -un | paste -sd,) ||
      found=
  fi
  [[ $found =~ ^[0-9,]+$ ]] || found=80,90
  printf '%s' "${HOROVOD_BUILD_CUDA_CC_LIST:-$found}"
}

# read_toolkit: set the CUDA toolkit, after checking that it matches torch. Horovod compiles CUDA code for every CUDA
# build of torch, with NCCL or without.
read_toolkit() {
  cuda_home=$(find_cuda_home)
  if [[ ! -x $cuda_home/bin/nvcc ]]; then
    [[ $device == cpu ]] ||
      fail "no nvcc in $cuda_home: install the CUDA $torch_cuda toolkit, set CUDA_HOME to it, or use --cpu"
    cuda_home=
    return
  fi
  local release
  release=$("$cuda_home/bin/nvcc" --version | sed -nE 's/.*release ([0-9]+\.[0-9]+).*/\1/p')
  [[ ${release%%.*} == "${torch_cuda%%.*}" ]] ||
    fail "nvcc in $cuda_home is CUDA $release, torch was built with $torch_cuda: set CUDA_HOME to a matching toolkit"
  architectures=$(list_architectures)
  key_of_device=cuda$release-nonccl-cc${architectures//,/.}
}

read_nccl() {
  local version
  nccl=$packages/nvidia/nccl
  [[ -e $nccl/lib/libnccl.so.2 && -e $nccl/include/nccl.h ]] ||
    fail "no NCCL in $nccl: install the nvidia-nccl package that torch $torch asks for"
  version=$(awk '/^#define NCCL_(MAJOR|MINOR|PATCH)/ { printf "%s%s", dot, $3; dot = "." }' "$nccl/include/nccl.h")
  # Horovod's library contains this folder's path (RUNPATH), so it must exist at run time too.
  nccl_links=$("$python" -c 'import sys; print(sys.prefix)')/lib/hvd_adam_nccl
  key_of_device=${key_of_device/nonccl/nccl$version}-$(sha256sum <<<"$nccl_links" | cut -c1-6)
}

read_key() {
  local tag recipe description
  # Not `read < <(...)`: the exit code would be lost.
  description=$(describe_torch)
  read -r torch tag torch_cuda packages <<<"$description"
  recipe=$(sed '/^#/d' "$here"/*.cmake | sha256sum | cut -c1-6) # without comments
  key_of_device=cpu cuda_home=
  if [[ $torch_cuda != none ]]; then
    read_toolkit
  elif [[ $device == cuda ]]; then
    fail "--cuda needs a CUDA build of torch, but torch $torch is a CPU build: use --cpu, or install another torch"
  fi
  if [[ $device == cuda ]]; then read_nccl; fi
  key=$HOROVOD_VERSION-torch$torch-$tag-$(describe_mpi)-$key_of_device-$(uname -m)-$recipe
}

# cached_wheel: print the path of the complete wheel for this key; fail if there is none.
cached_wheel() {
  local folder=$WHEELS/$key wheels
  wheels=("$folder"/*.whl)
  [[ -s ${wheels[0]} && -f $folder/sha256 ]] || return 1
  (cd "$folder" && sha256sum --check --status sha256) || return 1
  printf '%s\n' "${wheels[0]}"
}

prepare_nccl_links() {
  mkdir -p "$nccl_links"
  # NCCL's wheel has only libnccl.so.2. The linker looks for libnccl.so, the loader for libnccl.so.2.
  ln -sfn "$nccl/lib/libnccl.so.2" "$nccl_links/libnccl.so"
  ln -sfn "$nccl/lib/libnccl.so.2" "$nccl_links/libnccl.so.2"
}

set_build_environment() {
  export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
  unset HOROVOD_WITH_MPI HOROVOD_WITHOUT_MPI
  if [[ $mpi == true ]]; then export HOROVOD_WITH_MPI=1; else export HOROVOD_WITHOUT_MPI=1; fi
  export CMAKE_TOOLCHAIN_FILE=$here/cxx20.cmake MAKEFLAGS=${MAKEFLAGS:--j$(nproc)}
  export CMAKE_POLICY_VERSION_MINIMUM=3.5 # without it, CMake 4 rejects the older minimum of Gloo
  if [[ -n $cuda_home ]]; then
    # CUDA_HOME is for torch, which otherwise takes the folder of any nvcc for the toolkit.
    export HOROVOD_CUDA_HOME=$cuda_home CUDA_HOME=$cuda_home HOROVOD_BUILD_CUDA_CC_LIST=$architectures
  fi
  unset HOROVOD_GPU_OPERATIONS
  if [[ $device == cuda ]]; then
    prepare_nccl_links
    export HOROVOD_GPU_OPERATIONS=NCCL
    export HOROVOD_NCCL_INCLUDE=$nccl/include HOROVOD_NCCL_LIB=$nccl_links HOROVOD_NCCL_LINK=SHARED
  fi
}

check_cmake() {
  local version
  version=$(cmake --version | sed -nE '1s/.*version ([0-9.]+).*/\1/p')
  printf '3.21\n%s\n' "$version" | sort -VC || fail "cmake $version is too old: 3.21 or newer is needed"
}

# build_wheel: build in a temporary folder, which is renamed only when it is complete.
build_wheel() {
  check_cmake
  set_build_environment
  rm -rf "${WHEELS:?}/$key" "$WHEELS/$key".building.*
  building=$(mktemp -d "$WHEELS/$key.building.XXXXXX")
  trap 'rm -rf "$building"' EXIT
  "$python" -m pip install --quiet "${REQUIREMENTS[@]}" wheel 9>&-
  # No pip cache: pip keeps the wheels that it built by the name of their source, and would return one that was compiled
  # against another torch.
  "$python" -m pip wheel --no-cache-dir --no-build-isolation --no-deps --no-binary horovod \
    "horovod==$HOROVOD_VERSION" --wheel-dir "$building" 9>&-
  (cd "$building" && sha256sum ./*.whl >sha256)
  mv -T "$building" "$WHEELS/$key"
}

# ensure_wheel: set `wheel`. A lock allows one build of a key at a time; a process that waited finds the built wheel.
ensure_wheel() {
  mkdir -p "$WHEELS"
  exec 9>"$WHEELS/$key.lock"
  flock --nonblock 9 || { echo "Waiting for another build of $key" && flock 9; }
  if ! cached_wheel >/dev/null; then
    echo "Building $key"
    build_wheel
  fi
  exec 9>&-
  wheel=$(cached_wheel) || fail "the wheel in $WHEELS/$key is damaged immediately after its build: is the disk full?" 1
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
    "$python" -m pip install --quiet "${REQUIREMENTS[@]}"
    "$python" -m pip install --quiet --no-deps --force-reinstall "$wheel"
    echo "$wheel"
    ;;
esac
