#!/usr/bin/env bash
# Measures the figures of the README and of docs/ again: one log per command in FOLDER, and a note of the machine.
#
#   docs/make_figures.sh [FOLDER]      default: runs/figures
#   docs/make_figures.sh --list        print the commands instead
#
# Takes about an hour on two cores. Run it on an idle machine, in the environment that launch/setup.sh made.
# The commands on hosts (tests/recovery.py, bench wire --link) need root.
set -euo pipefail

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." >/dev/null

# A name of the log, and the command.
FIGURES=(
  "quickstart|bash launch/quickstart.sh"
  "adam|python -m hvd_adam.bench adam --repeats 40"
  "step|python -m hvd_adam.bench step --models mlp,cnn --repeats 6 --steps 10"
  "step-resnet18|python -m hvd_adam.bench step --models resnet18 --repeats 3 --steps 5"
  "step-gloo|python -m hvd_adam.bench step --models mlp,cnn --repeats 6 --steps 10 --launcher gloo"
  "step-gloo-resnet18|python -m hvd_adam.bench step --models resnet18 --repeats 3 --steps 5 --launcher gloo"
  "step-deferred-mlp|python -m hvd_adam.bench step --models mlp --variants hvd_adam-allreduce,hvd_adam-allreduce-deferred,hvd_adam-sharded,hvd_adam-sharded-deferred,ddp-fused --repeats 6"
  "step-deferred-cnn|python -m hvd_adam.bench step --models cnn --variants hvd_adam-allreduce,hvd_adam-allreduce-deferred,ddp-fused --repeats 6"
  "allreduce|python -m hvd_adam.bench allreduce --sizes 40"
  "memory|python -m hvd_adam.bench memory"
  "step-released|python -m hvd_adam.bench step --models mlp --variants hvd_adam-allreduce,hvd_adam-allreduce-deferred,hvd_adam-allreduce-released --repeats 6 --steps 8"
  "checkpoint|python -m hvd_adam.bench checkpoint --models cnn --every 10 --steps 100 --repeats 11"
  "data|python -m hvd_adam.bench data --images 1000,8000"
  "state-formats|python -m hvd_adam.bench adam --workloads resnet18 --dtype float32,bfloat16-master --repeats 31"
  "state-formats-quality|python docs/state_formats_quality.py"
  "adam-details|python docs/adam_figures.py"
  "compare|horovodrun -np 2 python -m hvd_adam.compare"
  "compare-he|horovodrun -np 2 python -m hvd_adam.compare --initialization he"
  "compare-sgd|python -m hvd_adam.compare --optimizers sgd --lrs 0.1 --batch-size 16"
  "compare-initialization|horovodrun -np 2 python -m hvd_adam.compare --study initialization"
  "compare-vanishing|horovodrun -np 2 python -m hvd_adam.compare --study vanishing"
  "compare-batch-size|horovodrun -np 2 python -m hvd_adam.compare --study batch-size"
  "report|python docs/report_figure.py"
  "wire|python -m hvd_adam.bench wire --link 1Gbit --steps 8 --repeats 3"
  "wire-gloo|python -m hvd_adam.bench wire --link 1Gbit --launcher gloo"
  "wire-100Mbit|python -m hvd_adam.bench wire --link 100Mbit --steps 4 --repeats 2"
  "compression-quality|horovodrun -np 2 python docs/compression_quality.py"
  "recovery|python tests/recovery.py"
)

if [[ ${1:-} == --list ]]; then
  printf '%s\n' "${FIGURES[@]#*|}"
  exit 0
fi

folder=${1:-runs/figures}
mkdir -p "$folder"
{
  date -u +%Y-%m-%dT%H:%MZ
  uname -srm
  grep -m1 'model name' /proc/cpuinfo || true
  nproc
  python -c 'import torch; print("torch", torch.__version__)'
  python -c 'import horovod; print("Horovod", horovod.__version__)'
  sed -n 1p <<<"$(mpirun --version)"
} >"$folder/machine.txt"

failed=0
for figure in "${FIGURES[@]}"; do
  name=${figure%%|*} command=${figure#*|}
  echo "$command"
  bash -euo pipefail -c "$command" >"$folder/$name.log" 2>&1 || { echo "failed: see $folder/$name.log" >&2; failed=1; }
done
echo "The figures are in $folder."
exit "$failed"
