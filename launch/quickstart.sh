#!/usr/bin/env bash
# Sets everything up on a fresh machine, then trains a network on the embedded data set on two ranks.
#
#   bash launch/quickstart.sh [--cpu | --cuda] [--without-mpi] [-- ARGUMENTS OF THE TRAINING]
#
#   --cpu | --cuda, --without-mpi   options of launch/setup.sh, which runs first
#   -- ARGUMENTS                    arguments of python -m hvd_adam.train, for example: -- --epochs 3
set -euo pipefail

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then self=$(readlink -f "$self"); fi
here=$(CDPATH='' cd "$(dirname "$self")" && pwd)
# shellcheck source=launch/lib/common.sh
source "$here/lib/common.sh"

setup_options=()
while (($#)); do
  case $1 in
    --cpu | --cuda | --without-mpi) setup_options+=("$1") ;;
    -h | --help) print_usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option $1; options of the training go after --, see --help" ;;
  esac
  shift
done

bash "$here/setup.sh" "${setup_options[@]}"
cd "$ROOT"
export HVD_ADAM_PYTHON=$VENV/bin/python
echo "Training on two ranks: horovodrun -np 2 python -m hvd_adam.train $*"
"$here/horovodrun.sh" -np 2 -- "$@"
echo "Next: 'source ${VENV#"$ROOT"/}/bin/activate', then 'horovodrun -np 2 python -m hvd_adam.train --help' and README.md."
