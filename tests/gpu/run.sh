#!/usr/bin/env bash
# Proves the GPU path on this machine: sets everything up with NCCL, runs the tests that need a GPU, then two benchmarks.
#
#   tests/gpu/run.sh [--carried FOLDER] [--minutes N] [--no-gpu]
#   tests/gpu/run.sh --pack [--carried FOLDER] [--python VERSION]
#
#   --carried FOLDER   what a machine without a network is to install from (default: .carried of this repository). Where
#                      the folder is not there, pip asks its index
#   --minutes N        cut tests and benchmarks off, so that the whole ends after N minutes (default: no limit)
#   --no-gpu           set up, collect the tests and let them skip, without a GPU: this proves the set-up alone
#   --pack             fill FOLDER instead, on a machine with a network
#   --python VERSION   for which Python (default: this machine's), as in 3.12
#
# python3, or PYTHON, must have what is too large to carry: a CUDA build of torch with its NCCL, torchvision, numpy,
# scikit-learn, tensorboard and matplotlib. Needs nvcc, cmake and g++; MPI is used where there is one.
# NCCL wants a GPU for each rank. Where there is only one, tests of two ranks run with a second Horovod, which sends
# tensors through the host's memory.
#
# What is said is also written to ${OUT:-runs/gpu}: setup.log, tests.log, tests*.xml (JUnit), adam.json, step.json, and
# bench.txt with both tables.
#
# Exit code: 0 all well; 1 the set-up or a test failed, or none ran; 2 bad arguments, or something is missing, as a GPU;
# 3 the tests passed and a benchmark failed.
set -euo pipefail

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../launch" && pwd)
# shellcheck source=launch/common.sh
source "$launch/common.sh"

# What the project, its tests and Horovod's build ask for, as far as it is small.
CARRIED=(
  'setuptools>=64,<81' wheel packaging cloudpickle psutil pyyaml cffi
  jsonargparse filelock tqdm mpi4py
  pytest pytest-timeout pytest-xdist hypothesis
)

parse_arguments() {
  action=test gpu=true minutes='' version='' carried=$ROOT/.carried
  while (($#)); do
    case $1 in
      --pack) action=pack ;;
      --no-gpu) gpu=false ;;
      --carried | --minutes | --python)
        [[ $# -ge 2 && -n $2 ]] || stop "$1 needs a value; see --help"
        case $1 in --carried) carried=$2 ;; --minutes) minutes=$2 ;; --python) version=$2 ;; esac
        shift
        ;;
      -h | --help) print_usage; exit 0 ;;
      *) stop "unknown option $1; see --help" ;;
    esac
    shift
  done
  [[ $minutes =~ ^([1-9][0-9]*)?$ ]] || stop "--minutes $minutes: a whole number of at least 1 is needed"
  [[ $version =~ ^(3\.[0-9]+)?$ ]] || stop "--python $version: write it as 3.12"
  have "$base" || stop "there is no $base: name a Python in PYTHON"
}

# pack: Horovod as source, for it is built where it runs; the others as wheels for the other machine's Python.
pack() {
  local glibc platforms=()
  version=${version:-$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
  for glibc in 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_$(uname -m)"); done
  mkdir -p "$carried"
  "$base" -m pip download --dest "$carried" --no-deps --no-binary horovod "horovod==$HOROVOD_VERSION"
  "$base" -m pip download --dest "$carried" --only-binary :all: --implementation cp --python-version "$version" \
    "${platforms[@]}" "${CARRIED[@]}"
  echo "$carried holds $(du -sh "$carried" | cut -f1) for Python $version."
}

# --- set-up -------------------------------------------------------------------------------------------------

check_machine() {
  if [[ $gpu == true ]]; then
    (($(count_gpus) > 0)) || stop "no NVIDIA GPU here: nothing to test (--no-gpu tries the set-up all the same)"
  else
    export CUDA_VISIBLE_DEVICES=
  fi
  [[ -d $carried ]] || return 0
  compgen -G "$carried/horovod-*.tar.gz" >/dev/null ||
    stop "$carried holds no source of Horovod: fill it with --pack where there is a network, or remove it"
  "$base" -c 'import torch' 2>/dev/null ||
    stop "$(command -v "$base") cannot import torch, which is too large to carry: name a Python that has it in PYTHON"
  PIP_FIND_LINKS=$(cd "$carried" && pwd)
  export PIP_FIND_LINKS PIP_NO_INDEX=1
}

# set_up: all logs of the set-up become one file, also of one that fails.
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

# start_second_build: beside the tests, for it takes as long as the first. Ended with this script.
start_second_build() {
  set -m
  PYTHON=$python "$launch/build_horovod.sh" --cpu "${without_mpi[@]}" >"$VENV/log/second_horovod.log" 2>&1 &
  second_build=$!
  set +m
  trap 'kill -- "-$second_build" 2>/dev/null || true' EXIT
}

# install_second_build: into a folder that PYTHONPATH puts before the first.
install_second_build() {
  local status=0
  echo "Waiting for a Horovod that sends tensors through the host's memory"
  wait "$second_build" || status=$?
  collect_logs
  ((status == 0)) || { echo "that build failed: see $OUT/setup.log" >&2 && return 1; }
  "$python" -m pip install --quiet --no-deps --upgrade --target "$VENV/second_horovod" \
    "$(tail -n 1 "$VENV/log/second_horovod.log")"
}

# --- tests and benchmarks -----------------------------------------------------------------------------------

# in_time COMMAND...: cut off where --minutes ends.
in_time() {
  local left=$((60 * ${minutes:-0} - SECONDS))
  if [[ -z $minutes ]]; then
    "$@"
  else
    timeout --kill-after=10 "$((left > 0 ? left : 1))" "$@"
  fi
}

# run_pytest NAME ARGUMENTS...: fails also where every test was skipped, with which pytest is content.
run_pytest() {
  local name=$1
  shift
  # The three files side by side: most of the time a GPU waits for processes to start.
  in_time "$python" -m pytest -m gpu -n 3 --dist loadfile -rs --junitxml "$OUT/$name.xml" "$@" 2>&1 |
    tee -a "$OUT/tests.log" || return
  if [[ $gpu == false ]] || tail -n 1 "$OUT/tests.log" | grep -q '[0-9] passed'; then return; fi
  echo "no test has passed: see why they were skipped" >&2
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

# bench NAME ARGUMENTS...: measures once, and makes the table out of the JSON.
bench() {
  local name=$1
  echo "python -m hvd_adam.bench $*"
  in_time "$python" -m hvd_adam.bench "$@" --device cuda --json >"$OUT/$name.json" || return
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
    ((tests == 0)) || stop "without a GPU: the set-up works, but pytest ended with $tests; see above" 1
    echo "Without a GPU: the set-up works, and the tests were collected and skipped. Nothing was tested on a GPU."
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
have mpicxx && have mpirun || without_mpi=(--without-mpi)
check_machine
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
set_up
cd "$ROOT"
export PATH=$VENV/bin:$PATH
run_all
