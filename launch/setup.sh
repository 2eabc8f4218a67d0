#!/usr/bin/env bash
# Installs the project and what it needs: system packages, and in .venv PyTorch, Horovod and the project itself with the
# extra "all". A second run finds everything installed and takes one or two seconds.
#
#   bash launch/setup.sh [--cpu | --cuda] [--without-mpi] [--dev]
#
#   --cpu | --cuda   Horovod without or with NCCL (default: with NCCL if torch is a CUDA build and this machine has a GPU
#                    or a CUDA toolkit)
#   --without-mpi    Horovod with Gloo instead of MPI, for one machine: neither MPI nor ssh is needed
#   --dev            also the extra "dev" and the other tools for the tests (shellcheck, Triton; as root also sshd, ip,
#                    pkill, Slurm, buildah, debootstrap and Chromium)
#
# As root, system packages are installed with apt. Otherwise the missing ones are listed and the exit code is 2. An MPI
# that is already on PATH (a cluster's module) is kept.
# A torch >= 2.1 that python3 can import is kept too; .venv then sees all packages of that python3. Otherwise the pinned
# release is installed. Its build (CPU or CUDA) depends on pip's own settings: PIP_EXTRA_INDEX_URL, PIP_INDEX_URL,
# PIP_FIND_LINKS. Without a network: PIP_NO_INDEX=1 and PIP_FIND_LINKS=FOLDER, with Horovod's source and the missing
# wheels in FOLDER.
#
# Variables: PYTHON (base interpreter, default python3), HVD_ADAM_VENV (default .venv of this repository),
# XDG_CACHE_HOME (contains Horovod's wheel), HOROVOD_BUILD_CUDA_CC_LIST (see build_horovod.sh).
set -euo pipefail

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then self=$(readlink -f "$self"); fi
here=$(CDPATH='' cd "$(dirname "$self")" && pwd)
# shellcheck source=launch/lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=launch/lib/steps.sh
source "$here/lib/steps.sh"
# shellcheck source=launch/lib/torchvision.sh
source "$here/lib/torchvision.sh"

TORCH_PIN=2.13.0
TRITON_PIN=3.7.1
STAMP=$VENV/hvd_adam_setup
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0

parse_arguments() {
  device=auto mpi=true dev=false
  while (($#)); do
    case $1 in
      --cpu | --cuda)
        [[ $device == auto || $device == "${1#--}" ]] || fail "--cpu and --cuda exclude each other"
        device=${1#--}
        ;;
      --without-mpi) mpi=false ;;
      --dev) dev=true ;;
      -h | --help) print_usage; exit 0 ;;
      *) fail "unknown option $1; see --help" ;;
    esac
    shift
  done
}

# --- system packages ----------------------------------------------------------------------------------------

# missing_for_tests: print what only the tests need. Tests on several hosts, made of namespaces, need root.
missing_for_tests() {
  has_command shellcheck || echo shellcheck
  ((EUID == 0)) || return 0
  [[ -x /usr/sbin/sshd ]] || echo openssh-server
  has_command ip || echo iproute2
  has_command pkill || echo procps
  has_command slurmctld || printf '%s\n' slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
  has_command buildah || echo buildah
  [[ -x /usr/sbin/debootstrap ]] || echo debootstrap
  # The browser of the report's tests. Ubuntu has it as a snap only; there the tests are skipped.
  has_command chromedriver || ! grep -qx 'ID=debian' /etc/os-release || echo chromium-driver
}

# missing_packages: print Debian's names of the missing packages, one per line.
missing_packages() {
  if [[ $mpi == true ]]; then
    has_command mpicxx || printf '%s\n' libopenmpi-dev openmpi-bin
    has_command ssh || echo openssh-client
  fi
  has_command cmake || echo cmake
  has_command g++ || echo g++
  has_command make || echo make
  if [[ $dev == true ]]; then missing_for_tests; fi
  if ! has_command "$base"; then
    printf '%s\n' python3 python3-venv python3-dev
  else
    can_make_venv || echo python3-venv
    "$base" -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null || echo python3-dev
  fi
}

# can_make_venv: whether base can make an environment with its own pip or with access to base's pip (see make_venv).
can_make_venv() {
  "$base" -c 'import ensurepip, venv' 2>/dev/null || { is_venv "$base" && has_pip "$base" && has_torch "$base"; }
}

# check_mpi: refuse an incomplete MPI, because apt would complete it with parts of another one.
check_mpi() {
  local half=
  if [[ $mpi == false ]]; then return; fi
  if has_command mpicxx && ! has_command mpirun; then half="mpicxx ($(command -v mpicxx)) but no mpirun"; fi
  if has_command mpirun && ! has_command mpicxx && [[ $(command -v mpirun) != /usr/bin/mpirun ]]; then
    half="mpirun ($(command -v mpirun)) but no mpicxx"
  fi
  [[ -z $half ]] || fail "there is $half on PATH: load the module, or install the package, that has both"
}

install_system_packages() {
  local missing hint=
  check_mpi
  mapfile -t missing < <(missing_packages)
  if ((${#missing[@]} == 0)); then return; fi
  if [[ ${missing[*]} == *openmpi* ]]; then hint=" (on a single machine MPI is optional: --without-mpi)"; fi
  has_command apt-get || fail "missing: ${missing[*]} (Debian's names): install them first$hint"
  ((EUID == 0)) ||
    fail "system packages are missing; as root: apt-get update && apt-get install -y --no-install-recommends ${missing[*]}$hint"
  run_step apt "Installing system packages: ${missing[*]}" install_with_apt "${missing[@]}"
}

install_with_apt() {
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

# --- virtual environment and torch --------------------------------------------------------------------------

is_venv() { "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; }

has_pip() { "$1" -I -c 'import pip' 2>/dev/null; }

# has_torch PYTHON: whether it can import torch 2.1 or newer.
has_torch() {
  "$1" -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 1)' 2>/dev/null
}

# make_venv: if base has torch, the new environment sees base's packages.
make_venv() {
  local options=() shared=false
  if has_pip "$venv_python"; then return; fi
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$base is $("$base" -V), but Python 3.10 or newer is needed: set PYTHON to another one"
  if [[ -e $VENV && ! -e $VENV/pyvenv.cfg &&
    -n $(find "$VENV" -mindepth 1 -maxdepth 1 ! -name log -print -quit) ]]; then
    fail "$VENV is not a virtual environment: move it away, or set HVD_ADAM_VENV to another folder"
  fi
  if has_torch "$base"; then
    # --system-site-packages would give access to the packages of the Python below base, not to those of base.
    if is_venv "$base"; then shared=true; else options+=(--system-site-packages); fi
  fi
  "$base" -c 'import ensurepip' 2>/dev/null || options+=(--without-pip)
  run_step venv "Making the virtual environment $VENV" create_or_repair_venv "${options[@]}"
}

create_or_repair_venv() {
  create_venv "$@"
  # Files of an older or another Python do not work: start from an empty folder.
  has_pip "$venv_python" || create_venv --clear "$@"
}

create_venv() {
  "$base" -m venv "$@" "$VENV"
  if [[ $shared == true ]]; then share_packages; fi
}

# share_packages: add the packages of base's environment to the new one, after its own.
share_packages() {
  local folder
  folder=$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$base" -c 'import site; print("import site;", *(f"site.addsitedir({path!r});" for path in site.getsitepackages()))' \
    >"$folder/hvd_adam_shared.pth"
}

pip() { "$venv_python" -m pip "$@"; }

# install_compiled ARGUMENTS...: install many packages with pip, which alone would compile their modules on one core.
install_compiled() {
  pip install --no-compile "$@" || return
  # Some packages contain files for other versions of Python, which do not compile.
  "$venv_python" -m compileall -qq -j 0 "$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" ||
    true
}

install_torch() {
  if ! has_torch "$venv_python"; then
    run_step torch "Installing torch $TORCH_PIN" install_compiled "torch==$TORCH_PIN" numpy
    has_torch "$venv_python" || fail "torch $TORCH_PIN is installed but cannot be imported; see: $venv_python -c 'import torch'" 1
  fi
  read -r torch torch_cuda < <("$venv_python" -c 'import torch; print(torch.__version__, torch.version.cuda or "none")')
}

# choose_device: use NCCL only if torch supports it and this machine has a GPU or the toolkit to build for one.
choose_device() {
  if [[ $device != auto ]]; then return; fi
  device=cpu
  if [[ $torch_cuda != none ]] && { (($(count_gpus) > 0)) || has_command nvcc; }; then device=cuda; fi
  if [[ $torch_cuda == none ]] && (($(count_gpus) > 0)); then
    echo "This machine has a GPU, but torch $torch is a CPU build: Horovod is built without NCCL."
  fi
}

# install_torchvision: release 0.(N+15) belongs to torch 2.N. Its dependencies would replace torch.
install_torchvision() {
  local release=${torch%%[+a-z]*} wanted
  wanted=0.$(($(cut -d. -f2 <<<"$release") + 15))
  if [[ $(installed_version torchvision) == "$wanted".* ]]; then return; fi
  run_step torchvision "Installing torchvision $wanted" pip_install_torchvision "$wanted" "${release##*.}"
}

pip_install_torchvision() { pip install --no-deps "torchvision==$1.$2" || pip install --no-deps "torchvision==$1.*"; }

installed_version() {
  "$venv_python" -I -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$1" 2>/dev/null || true
}

# --- Horovod, mpi4py and the project ------------------------------------------------------------------------

install_horovod() {
  local key record=$VENV/horovod_key build=("$ROOT/hvd_adam/build_horovod/build_horovod.sh" "--$device")
  if [[ $mpi == false ]]; then build+=(--without-mpi); fi
  key=$(PYTHON=$venv_python bash "${build[@]}" --print-key)
  if [[ -f $record && $(<"$record") == "$key" ]] && imports_horovod; then return; fi
  local message="Building Horovod (3 to 5 minutes on two cores)"
  if PYTHON=$venv_python bash "${build[@]}" --check >/dev/null; then message="Installing Horovod from the cache"; fi
  run_step horovod "$message" env "PYTHON=$venv_python" bash "${build[@]}" --install
  echo "$key" >"$record"
}

imports_horovod() { "$venv_python" -I -c 'import horovod.torch' >/dev/null 2>&1; }

install_mpi4py() {
  if [[ $mpi == false ]] || mpi4py_works; then return; fi
  run_step mpi4py "Installing mpi4py" build_mpi4py
}

# mpi4py_works: whether mpi4py loads with the installed MPI. Does not initialize MPI.
mpi4py_works() {
  "$venv_python" -I -c 'import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; MPI.Get_library_version()' \
    >/dev/null 2>&1
}

# build_mpi4py: the prebuilt wheel finds common MPIs at run time. If it does not, mpi4py is compiled with this mpicc.
build_mpi4py() {
  pip install mpi4py
  mpi4py_works || pip install --no-cache-dir --no-binary mpi4py --force-reinstall --no-deps mpi4py
  mpi4py_works
}

# install_project: the constraints keep pip from replacing the packages that were installed before.
install_project() {
  local extras=all constraints=$VENV/constraints.txt name
  if [[ $dev == true ]]; then extras=all,dev; fi
  for name in torch torchvision horovod; do echo "$name==$(installed_version "$name")"; done >"$constraints"
  run_step project "Installing the project and its dependencies" install_editable "$constraints" "${ROOT}[$extras]"
}

# install_editable: without build isolation, so that pip downloads no second set of build tools.
install_editable() {
  pip install 'setuptools>=64,<81' wheel
  install_compiled --no-build-isolation --constraint "$1" --editable "$2"
}

# install_triton: for the tests of the GPU kernel, if torch did not install it. In its own folder, because it slows down
# torch's import.
install_triton() {
  if [[ $dev == false || -d $VENV/triton ]] || "$venv_python" -I -c 'import triton' 2>/dev/null; then return; fi
  run_step triton "Installing Triton $TRITON_PIN" pip_install_triton
}

pip_install_triton() {
  rm -rf "$VENV/triton.new"
  pip install --no-deps --target "$VENV/triton.new" "triton==$TRITON_PIN"
  mv "$VENV/triton.new" "$VENV/triton"
}

# --- check --------------------------------------------------------------------------------------------------

check_installation() {
  run_step check "Checking the build" check_build
  run_step allreduce "Running an allreduce on two ranks" env "HVD_ADAM_PYTHON=$venv_python" "PYTHONPATH=$ROOT" \
    timeout 120 "$here/horovodrun.sh" -np 2 --module hvd_adam.launch.check_allreduce
}

check_build() {
  local report part parts=(PyTorch Gloo)
  if [[ $mpi == true ]]; then parts+=(MPI); fi
  if [[ $device == cuda ]]; then parts+=(NCCL); fi
  report=$("$VENV/bin/horovodrun" --check-build)
  echo "$report"
  for part in "${parts[@]}"; do
    grep -qF "[X] $part" <<<"$report" || fail "this Horovod was built without $part" 1
  done
}

# --- fast check that nothing has changed --------------------------------------------------------------------

# fingerprint: print everything that this set-up depends on. If it is unchanged, there is nothing to do. Imports neither
# torch nor Horovod.
fingerprint() {
  echo "options $device $dev $mpi"
  cat "$ROOT"/{setup.cfg,pyproject.toml,launch/setup.sh,launch/lib/{common,torchvision}.sh} \
    "$ROOT"/hvd_adam/{build_horovod/*.{sh,cmake},models/torchvision_operators.py} | sha256sum
  if has_command mpirun; then grep -m1 '[0-9]' <<<"$(mpirun --version 2>&1)"; fi
  command -v mpirun mpicxx || true
  count_gpus
  "$venv_python" -I "$here/lib/describe_environment.py"
}

is_up_to_date() {
  [[ -f $STAMP ]] && [[ -z $(missing_packages) ]] && has_pip "$venv_python" && cmp -s "$STAMP" <(fingerprint 2>/dev/null)
}

main() {
  parse_arguments "$@"
  base=${PYTHON:-python3} venv_python=$VENV/bin/python
  # A missing python3 is installed with the other packages.
  [[ -z ${PYTHON:-} ]] || has_command "$base" || fail "PYTHON=$PYTHON is not a program"
  { mkdir -p "$CACHE" && [[ -w $CACHE ]]; } 2>/dev/null ||
    fail "no write access to $CACHE: set XDG_CACHE_HOME to a folder that you may write to"
  exec 8>"$CACHE/setup-$(sha256sum <<<"$VENV" | cut -c1-12).lock"
  flock --nonblock 8 || { echo "Waiting for another set-up of $VENV." && flock 8; }
  # An environment that was set up with --dev keeps these tools.
  if [[ -f $STAMP ]] && grep -Eq '^(asked|options) [a-z]* true\b' "$STAMP"; then dev=true; fi
  if is_up_to_date; then
    echo "Everything is set up in $VENV."
    return
  fi
  local requested_device=$device
  rm -f "$STAMP"
  install_system_packages
  make_venv
  install_torch
  choose_device
  install_torchvision
  install_horovod
  install_mpi4py
  install_project
  complete_torchvision "$torch"
  install_triton
  check_installation
  device=$requested_device
  fingerprint >"$STAMP.new"
  mv "$STAMP.new" "$STAMP"
  echo "Everything is set up in $VENV (torch $torch)."
}

main "$@"
