#!/usr/bin/env bash
# Tests the GPU code on this machine: sets everything up with NCCL, runs the tests that need a GPU, then two benchmarks.
#
#   tests/gpu/run.sh [--carried FOLDER] [--minutes N] [--no-gpu] [--without-mpi]
#   tests/gpu/run.sh --pack [--carried FOLDER] [--python VERSION]
#
#   --carried FOLDER   the packages from which a machine without a network installs (default: .carried of this
#                      repository). If the folder does not exist, pip uses its index
#   --minutes N        stop tests and benchmarks so that the script ends after N minutes (default: no limit)
#   --no-gpu           set up, then collect and skip the tests, on a machine without a GPU: this checks only the set-up
#   --without-mpi      build Horovod for Gloo alone, as launch/setup.sh does (default: with MPI if it is installed)
#   --pack             fill FOLDER instead, on a machine with a network
#   --python VERSION   the Python version to pack for, as in 3.12 (default: this machine's)
#
# python3, or PYTHON, must have what is too large to carry: a CUDA build of torch with its NCCL, torchvision, numpy,
# scikit-learn, tensorboard and matplotlib. Needs nvcc, cmake and g++; uses MPI if it is installed.
# NCCL needs a GPU for each rank. On a machine with a single GPU, tests on two ranks use a second build of Horovod, which
# copies tensors through host memory.
#
# Output is also written to ${OUT:-runs/gpu}: setup.log, tests.log, tests*.xml (JUnit), adam.json, step.json, and
# bench.txt with both tables.
#
# Exit code: 0 success; 1 the set-up or a test failed, or no test ran; 2 bad arguments, or something is missing, for
# example a GPU; 3 the tests passed and a benchmark failed.
set -euo pipefail

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then self=$(readlink -f "$self"); fi
launch=$(CDPATH='' cd "$(dirname "$self")/../../launch" && pwd)
# shellcheck source=launch/lib/common.sh
source "$launch/lib/common.sh"

# The small requirements of the project, its tests and Horovod's build.
CARRIED=(
  'setuptools>=64,<81' wheel packaging cloudpickle psutil pyyaml cffi
  jsonargparse filelock tqdm mpi4py
  pytest pytest-timeout pytest-xdist hypothesis
)

parse_arguments() {
  action=test gpu=true mpi=true minutes='' version='' carried=$ROOT/.carried
  while (($#)); do
    case $1 in
      --pack) action=pack ;;
      --no-gpu) gpu=false ;;
      --without-mpi) mpi=false ;;
      --carried | --minutes | --python)
        [[ $# -ge 2 && -n $2 ]] || fail "$1 needs a value; see --help"
        case $1 in --carried) carried=$2 ;; --minutes) minutes=$2 ;; --python) version=$2 ;; esac
        shift
        ;;
      -h | --help) print_usage; exit 0 ;;
      *) fail "unknown option $1; see --help" ;;
    esac
    shift
  done
  [[ $minutes =~ ^([1-9][0-9]*)?$ ]] || fail "--minutes $minutes: must be a whole number of at least 1"
  [[ $version =~ ^(3\.[0-9]+)?$ ]] || fail "--python $version: must have the form 3.12"
  has_command "$base" || fail "$base does not exist: set PYTHON to a Python"
}

# pack: download Horovod as source, because it is built on the other machine, and the others as wheels for its Python.
pack() {
  local glibc platforms=()
  version=${version:-$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
  for glibc in 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_$(uname -m)"); done
  mkdir -p "$carried"
  "$base" -m pip download --dest "$carried" --no-deps --no-binary horovod "horovod==$HOROVOD_VERSION"
  "$base" -m pip download --dest "$carried" --only-binary :all: --implementation cp --python-version "$version" \
    "${platforms[@]}" "${CARRIED[@]}"
  echo "$carried contains $(du -sh "$carried" | cut -f1) for Python $version."
}

# --- set-up -------------------------------------------------------------------------------------------------

check_machine() {
  if [[ $gpu == true ]]; then
    (($(count_gpus) > 0)) || fail "no NVIDIA GPU here: nothing to test (--no-gpu checks the set-up without one)"
  else
    export CUDA_VISIBLE_DEVICES=
  fi
  [[ -d $carried ]] || return 0
  compgen -G "$carried/horovod-*.tar.gz" >/dev/null ||
    fail "$carried contains no source of Horovod: fill it with --pack on a machine with a network, or remove it"
  "$base" -c 'import torch' 2>/dev/null ||
    fail "$(command -v "$base") cannot import torch, which is too large to carry: set PYTHON to a Python that has it"
  PIP_FIND_LINKS=$(cd "$carried" && pwd)
  export PIP_FIND_LINKS PIP_NO_INDEX=1
}

# set_up: all logs of the set-up are collected in one file, even if it fails.
set_up() {
  local status=0
  bash "$launch/setup.sh" --cuda "${without_mpi[@]}" || status=$?
  collect_logs
  ((status == 0)) || exit "$status"
  "$python" -m pip install --quiet 'pytest>=7' pytest-timeout pytest-xdist hypothesis
  "$python" -c 'import horovod.torch as hvd, torch
assert hvd.nccl_built(), "this Horovod was built without NCCL"
print(f"Horovod with NCCL {hvd.nccl_built()} for torch {torch.__version__}, CUDA {torch.version.cuda}")'
}

collect_logs() { if compgen -G "$VENV/log/*.log" >/dev/null; then tail -n +1 "$VENV"/log/*.log >"$OUT/setup.log"; fi; }

# start_second_build: build during the tests, because it takes minutes. The build ends with this script.
start_second_build() {
  set -m
  PYTHON=$python "$launch/build_horovod.sh" --cpu "${without_mpi[@]}" >"$VENV/log/second_horovod.log" 2>&1 &
  second_build=$!
  set +m
  trap 'kill -- "-$second_build" 2>/dev/null || true' EXIT
}

# install_second_build: install into a folder that precedes the first build on PYTHONPATH.
install_second_build() {
  local status=0
  echo "Waiting for the build of Horovod that copies tensors through host memory"
  wait "$second_build" || status=$?
  collect_logs
  ((status == 0)) || { echo "this build failed: see $OUT/setup.log" >&2 && return 1; }
  "$python" -m pip install --quiet --no-deps --upgrade --target "$VENV/second_horovod" \
    "$(tail -n 1 "$VENV/log/second_horovod.log")"
}

# --- tests and benchmarks -----------------------------------------------------------------------------------

# run_in_time COMMAND...: stop the command when --minutes have passed.
run_in_time() {
  local left=$((60 * ${minutes:-0} - SECONDS))
  if [[ -z $minutes ]]; then
    "$@"
  else
    timeout --kill-after=10 "$((left > 0 ? left : 1))" "$@"
  fi
}

# run_pytest NAME ARGUMENTS...: also fails if every test was skipped, which pytest counts as success.
run_pytest() {
  local name=$1
  shift
  # In parallel, because most of the time the GPU is idle while processes start.
  run_in_time "$python" -m pytest -m gpu -n 6 --dist worksteal -rs --junitxml "$OUT/$name.xml" "$@" 2>&1 |
    tee -a "$OUT/tests.log" || return
  if [[ $gpu == false ]] || tail -n 1 "$OUT/tests.log" | grep '[0-9] passed' >/dev/null; then return; fi
  echo "no test has passed; the reasons for skipping are above" >&2
  return 1
}

run_tests() {
  local status=0
  rm -f "$OUT"/tests*
  if (($(count_gpus) == 1)) && [[ $gpu == true ]]; then start_second_build; fi
  run_pytest tests tests/gpu || status=$?
  if [[ -n $second_build ]]; then
    install_second_build && PYTHONPATH=$VENV/second_horovod HVD_ADAM_THROUGH_HOST=1 \
      run_pytest tests_through_host tests/gpu/test_gpu_distributed.py || status=$?
  fi
  return "$status"
}

# bench NAME ARGUMENTS...: run the benchmark once and make the table from its JSON.
bench() {
  local name=$1
  echo "python -m hvd_adam.bench $*"
  run_in_time "$python" -m hvd_adam.bench "$@" --device cuda --json >"$OUT/$name.json" || return
  "$python" - "$OUT/$name.json" <<'PY' | tee -a "$OUT/bench.txt"
import importlib, json, sys
from hvd_adam.bench.report import describe, table
shown = json.load(open(sys.argv[1]))
columns = importlib.import_module(f"hvd_adam.bench.{shown['command']}").COLUMNS
failed = [f"failed: {row['error']}" for row in shown["rows"] if "error" in row]
print(f"hvd_adam.bench {shown['command']}", describe(shown["machine"]), table(columns, shown["rows"]), sep="\n")
print(*failed, *shown["notes"], "", sep="\n")
PY
}

run_all() {
  local tests=0 failed=()
  run_tests || tests=$?
  if [[ $gpu == false ]]; then
    ((tests == 0)) || fail "without a GPU: the set-up works, but pytest exited with $tests; see above" 1
    echo "Without a GPU: the set-up works; the tests were collected and skipped. Nothing was tested on a GPU."
    exit
  fi
  rm -f "$OUT/bench.txt"
  bench adam || failed+=("bench adam ($?)")
  bench step --np 1 --models resnet18 --batch-size 512 --precision bf16 --channels-last --compile ||
    failed+=("bench step ($?)")
  echo "tests: $( ((tests == 0)) && echo passed || echo "FAILED ($tests)"), benchmarks: ${failed[*]:-done}; all in $OUT, after $SECONDS s"
  ((tests == 0)) || exit 1
  ((${#failed[@]} == 0)) || exit 3
}

base=${PYTHON:-python3}
parse_arguments "$@"
if [[ $action == pack ]]; then
  pack
  exit
fi
OUT=${OUT:-$ROOT/runs/gpu} python=$VENV/bin/python second_build='' without_mpi=()
if [[ $mpi == false ]] || ! has_command mpicxx || ! has_command mpirun; then without_mpi=(--without-mpi); fi
check_machine
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
set_up
cd "$ROOT"
export PATH=$VENV/bin:$PATH
run_all
