#!/usr/bin/env bash
# Installs what the project needs into .venv: system packages, PyTorch, Horovod, and the project itself. A second run
# finds all of it there and takes a second or two.
#
#   bash launch/setup.sh [--cpu | --cuda] [--without-mpi] [--dev]
#
#   --cpu | --cuda   Horovod without or with NCCL. Default: with, where torch is a CUDA build and a GPU or a matching
#                    CUDA toolkit is here
#   --without-mpi    Horovod with Gloo in place of MPI, for one machine: neither MPI nor ssh is asked for
#   --dev            also the tools for the tests (pytest, ruff, shellcheck, Triton; as root sshd, ip,
#                    pkill, Slurm, buildah and debootstrap too)
#
# System packages come from apt where this runs as root; otherwise it lists what is missing and ends with 2. An MPI
# that is already on PATH (a cluster's module) is kept.
# A torch >= 2.1 that python3 can import is kept too, and .venv then sees all packages of that python3; otherwise the
# pinned release is installed. Which build of it pip finds (CPU or CUDA) is for pip's own environment to say:
# PIP_EXTRA_INDEX_URL, PIP_INDEX_URL, PIP_FIND_LINKS. Without a network: PIP_NO_INDEX=1 and PIP_FIND_LINKS=FOLDER, where
# FOLDER holds Horovod's source and the wheels that are missing.
#
# Variables: PYTHON (base interpreter, default python3), HVD_ADAM_VENV (default .venv of this repository),
# XDG_CACHE_HOME (Horovod's wheel is kept there), HOROVOD_BUILD_CUDA_CC_LIST (see build_horovod.sh).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/steps.sh
source "$here/steps.sh"

TORCH_PIN=2.13.0
TRITON_PIN=3.7.1
STAMP=$VENV/hvd_adam_setup
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0

parse_arguments() {
  device=auto mpi=true dev=false
  while (($#)); do
    case $1 in
      --cpu | --cuda)
        [[ $device == auto || $device == "${1#--}" ]] || stop "--cpu and --cuda exclude each other"
        device=${1#--}
        ;;
      --without-mpi) mpi=false ;;
      --dev) dev=true ;;
      -h | --help) print_usage; exit 0 ;;
      *) stop "unknown option $1; see --help" ;;
    esac
    shift
  done
}

# --- system packages ----------------------------------------------------------------------------------------

# missing_for_tests: the same for the tests alone; those on several hosts, out of namespaces, need root.
missing_for_tests() {
  have shellcheck || echo shellcheck
  ((EUID == 0)) || return 0
  [[ -x /usr/sbin/sshd ]] || echo openssh-server
  have ip || echo iproute2
  have pkill || echo procps
  have slurmctld || printf '%s\n' slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
  have buildah || echo buildah
  [[ -x /usr/sbin/debootstrap ]] || echo debootstrap
}

# missing_packages: Debian's names of what is not here, one a line.
missing_packages() {
  if [[ $mpi == true ]]; then
    have mpicxx || printf '%s\n' libopenmpi-dev openmpi-bin
    have ssh || echo openssh-client
  fi
  have cmake || echo cmake
  have g++ || echo g++
  have make || echo make
  if [[ $dev == true ]]; then missing_for_tests; fi
  if ! have "$base"; then
    printf '%s\n' python3 python3-venv python3-dev
  else
    can_make_venv || echo python3-venv
    "$base" -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null || echo python3-dev
  fi
}

# can_make_venv: with a pip of its own, or seeing that of the environment that base belongs to (see make_venv).
can_make_venv() {
  "$base" -c 'import ensurepip, venv' 2>/dev/null || { is_venv "$base" && works "$base" && has_torch "$base"; }
}

# check_mpi: half an MPI is not completed with half of another.
check_mpi() {
  local half=
  if [[ $mpi == false ]]; then return; fi
  if have mpicxx && ! have mpirun; then half="mpicxx ($(command -v mpicxx)) but no mpirun"; fi
  if have mpirun && ! have mpicxx && [[ $(command -v mpirun) != /usr/bin/mpirun ]]; then
    half="mpirun ($(command -v mpirun)) but no mpicxx"
  fi
  [[ -z $half ]] || stop "there is $half on PATH: load the module, or install the package, that has both"
}

install_system_packages() {
  local missing hint=
  check_mpi
  mapfile -t missing < <(missing_packages)
  if ((${#missing[@]} == 0)); then return; fi
  if [[ ${missing[*]} == *openmpi* ]]; then hint=" (one machine alone can do without MPI: --without-mpi)"; fi
  have apt-get || stop "missing: ${missing[*]} (Debian's names): install them first$hint"
  ((EUID == 0)) ||
    stop "system packages are missing; as root: apt-get update && apt-get install -y --no-install-recommends ${missing[*]}$hint"
  step apt "Installing system packages: ${missing[*]}" install_with_apt "${missing[@]}"
}

install_with_apt() {
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

# --- virtual environment and torch --------------------------------------------------------------------------

is_venv() { "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; }

works() { "$1" -I -c 'import pip' 2>/dev/null; }

# has_torch PYTHON: can it import a torch of at least 2.1?
has_torch() {
  "$1" -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 1)' 2>/dev/null
}

# make_venv: where base has torch, the new environment sees its packages.
make_venv() {
  local options=() shared=false
  if works "$venv_python"; then return; fi
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    stop "$base is $("$base" -V); Python 3.10 or newer is needed: name another one in PYTHON"
  if [[ -e $VENV && ! -e $VENV/pyvenv.cfg ]] && find "$VENV" -mindepth 1 -maxdepth 1 ! -name log | grep -q .; then
    stop "$VENV is there but is no virtual environment: move it away, or name another folder in HVD_ADAM_VENV"
  fi
  if has_torch "$base"; then
    # One that is made from another environment would see what the Python under both has.
    if is_venv "$base"; then shared=true; else options+=(--system-site-packages); fi
  fi
  "$base" -c 'import ensurepip' 2>/dev/null || options+=(--without-pip)
  step venv "Making the virtual environment $VENV" create_or_repair_venv "${options[@]}"
}

create_or_repair_venv() {
  create_venv "$@"
  # What an older or another Python left there helps nobody.
  works "$venv_python" || create_venv --clear "$@"
}

create_venv() {
  "$base" -m venv "$@" "$VENV"
  if [[ $shared == true ]]; then share_packages; fi
}

# share_packages: lets the new environment see what the one that base belongs to sees, after its own.
share_packages() {
  local folder
  folder=$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$base" -c 'import site; print("import site;", *(f"site.addsitedir({path!r});" for path in site.getsitepackages()))' \
    >"$folder/hvd_adam_shared.pth"
}

pip() { "$venv_python" -m pip "$@"; }

install_torch() {
  if ! has_torch "$venv_python"; then
    step torch "Installing torch $TORCH_PIN" pip install "torch==$TORCH_PIN" numpy
    has_torch "$venv_python" || stop "torch $TORCH_PIN is installed but cannot be imported; try: $venv_python -c 'import torch'" 1
  fi
  read -r torch torch_cuda < <("$venv_python" -c 'import torch; print(torch.__version__, torch.version.cuda or "none")')
}

# choose_device: NCCL only where torch can use it and this machine has either a GPU or the toolkit to build for one.
choose_device() {
  if [[ $device != auto ]]; then return; fi
  device=cpu
  if [[ $torch_cuda != none ]] && { (($(count_gpus) > 0)) || have nvcc; }; then device=cuda; fi
  if [[ $torch_cuda == none ]] && (($(count_gpus) > 0)); then
    echo "There is a GPU, but torch $torch is a CPU build: Horovod is built without NCCL."
  fi
}

# install_torchvision: release 0.(N+15) goes with torch 2.N. Without dependencies, for it would bring another torch.
install_torchvision() {
  local release=${torch%%[+a-z]*} wanted
  wanted=0.$(($(cut -d. -f2 <<<"$release") + 15))
  if [[ $(installed_version torchvision) == "$wanted".* ]]; then return; fi
  step torchvision "Installing torchvision $wanted" torchvision_for "$wanted" "${release##*.}"
}

torchvision_for() { pip install --no-deps "torchvision==$1.$2" || pip install --no-deps "torchvision==$1.*"; }

installed_version() {
  "$venv_python" -I -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$1" 2>/dev/null || true
}

# --- Horovod, mpi4py and the project ------------------------------------------------------------------------

install_horovod() {
  local key record=$VENV/horovod_key build=("$here/build_horovod.sh" "--$device")
  if [[ $mpi == false ]]; then build+=(--without-mpi); fi
  key=$(PYTHON=$venv_python "${build[@]}" --print-key)
  if [[ -f $record && $(<"$record") == "$key" ]] && imports_horovod; then return; fi
  local message="Building Horovod (3 to 5 minutes on two cores)"
  if PYTHON=$venv_python "${build[@]}" --check >/dev/null; then message="Installing Horovod, built before"; fi
  step horovod "$message" env "PYTHON=$venv_python" "${build[@]}" --install
  echo "$key" >"$record"
}

imports_horovod() { "$venv_python" -I -c 'import horovod.torch' >/dev/null 2>&1; }

install_mpi4py() {
  if [[ $mpi == false ]] || mpi4py_works; then return; fi
  step mpi4py "Installing mpi4py" build_mpi4py
}

# mpi4py_works: loaded, and with the MPI that Horovod was built with. Asks without starting MPI.
mpi4py_works() {
  "$venv_python" -I -c 'import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; MPI.Get_library_version()' \
    >/dev/null 2>&1
}

# The ready wheel finds the common MPIs at run time; where it does not, it is compiled with the mpicc that is here.
build_mpi4py() {
  pip install mpi4py
  mpi4py_works || pip install --no-cache-dir --no-binary mpi4py --force-reinstall --no-deps mpi4py
  mpi4py_works
}

# install_project: the constraints keep pip from replacing what was just built.
install_project() {
  local extra='' constraints=$VENV/constraints.txt name
  if [[ $dev == true ]]; then extra='[dev]'; fi
  for name in torch torchvision horovod; do echo "$name==$(installed_version "$name")"; done >"$constraints"
  step project "Installing the project and its dependencies" install_editable "$constraints" "$ROOT$extra"
}

# Without build isolation, so that no second set of build tools is fetched.
install_editable() {
  pip install 'setuptools>=64,<81' wheel
  pip install --no-build-isolation --constraint "$1" --editable "$2"
}

# install_triton: for the tests of the kernel for GPUs, where torch brings none. Apart, since it slows torch's import.
install_triton() {
  if [[ $dev == false || -d $VENV/triton ]] || "$venv_python" -I -c 'import triton' 2>/dev/null; then return; fi
  step triton "Installing Triton $TRITON_PIN" triton_apart
}

triton_apart() {
  rm -rf "$VENV/triton.new"
  pip install --no-deps --target "$VENV/triton.new" "triton==$TRITON_PIN"
  mv "$VENV/triton.new" "$VENV/triton"
}

# --- proof --------------------------------------------------------------------------------------------------

prove() {
  step check "Checking the build" check_build
  step allreduce "Adding up over two ranks" env "HVD_ADAM_PYTHON=$venv_python" "PYTHONPATH=$here" \
    timeout 120 "$here/horovodrun.sh" -np 2 --module check_allreduce
}

check_build() {
  local report part parts=(PyTorch Gloo)
  if [[ $mpi == true ]]; then parts+=(MPI); fi
  if [[ $device == cuda ]]; then parts+=(NCCL); fi
  report=$("$VENV/bin/horovodrun" --check-build)
  echo "$report"
  for part in "${parts[@]}"; do
    grep -qF "[X] $part" <<<"$report" || stop "this Horovod was built without $part" 1
  done
}

# --- what is here, in a second ------------------------------------------------------------------------------

# describe: everything that this set-up depends on. Equal text means nothing to do. Nothing heavy is imported.
describe() {
  echo "asked $device $dev $mpi"
  cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml" "$here"/{setup,build_horovod,common}.sh "$here"/horovod/*.cmake | sha256sum
  if have mpirun; then mpirun --version 2>&1 | grep -m1 '[0-9]'; fi
  command -v mpirun mpicxx || true
  count_gpus
  "$venv_python" -I "$here/describe_environment.py"
}

is_done() {
  [[ -f $STAMP ]] && [[ -z $(missing_packages) ]] && works "$venv_python" && cmp -s "$STAMP" <(describe 2>/dev/null)
}

main() {
  parse_arguments "$@"
  base=${PYTHON:-python3} venv_python=$VENV/bin/python
  mkdir -p "$CACHE"
  exec 8>"$CACHE/setup-$(sha256sum <<<"$VENV" | cut -c1-12).lock"
  flock --nonblock 8 || { echo "Another set-up of $VENV is running: waiting for it." && flock 8; }
  # A set-up for development serves the others too.
  if [[ -f $STAMP ]] && grep -q '^asked [a-z]* true\b' "$STAMP"; then dev=true; fi
  if is_done; then
    echo "Everything is set up in $VENV."
    return
  fi
  local asked=$device
  rm -f "$STAMP"
  install_system_packages
  make_venv
  install_torch
  choose_device
  install_torchvision
  install_horovod
  install_mpi4py
  install_project
  install_triton
  prove
  device=$asked
  describe >"$STAMP.new"
  mv "$STAMP.new" "$STAMP"
  echo "Everything is set up in $VENV (torch $torch)."
}

main "$@"
