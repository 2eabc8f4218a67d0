#!/usr/bin/env bash
# From nothing to a trained network: sets everything up, then trains on the embedded data set on two ranks.
#
#   bash launch/quickstart.sh [--cpu | --cuda] [--without-mpi] [-- ARGUMENTS OF THE TRAINING]
#
#   --cpu | --cuda, --without-mpi   as for launch/setup.sh, which this runs first
#   -- ARGUMENTS                    go to python -m hvd_adam.train, for example: -- --epochs 3
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

setup_options=()
while (($#)); do
  case $1 in
    --cpu | --cuda | --without-mpi) setup_options+=("$1") ;;
    -h | --help) print_usage; exit 0 ;;
    --) shift; break ;;
    *) stop "unknown option $1; options of the training go after --, see --help" ;;
  esac
  shift
done

bash "$here/setup.sh" "${setup_options[@]}"
cd "$ROOT"
export HVD_ADAM_PYTHON=$VENV/bin/python
echo "Training on two ranks: horovodrun -np 2 python -m hvd_adam.train $*"
"$here/horovodrun.sh" -np 2 -- "$@"
echo "Next: 'source ${VENV#"$ROOT"/}/bin/activate', then 'horovodrun -np 2 python -m hvd_adam.train --help' and README.md."
