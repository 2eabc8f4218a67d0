#!/usr/bin/env bash
# Sets up what is missing, then checks style and runs the tests: bash tests/run.sh [ARGUMENTS OF PYTEST]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh" --dev
cd "$root"
PATH=${HVD_ADAM_VENV:-$root/.venv}/bin:$PATH
ruff check
ruff format --check
find . -path ./.venv -prune -o -name '*.sh' -print0 | xargs -0 shellcheck -x .ci/run
# Three at a time, by file: what takes most of the time (launches of ranks, Slurm, hosts that are lost) leaves cores idle.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
