#!/usr/bin/env bash
# Sets up what is missing, checks style and types, and runs the tests, of which some check the documents:
#   bash tests/run.sh [ARGUMENTS OF PYTEST]
# The quick ones, which need no ranks, hosts, Slurm or images, take two minutes on two cores:
#   bash tests/run.sh -m "not (slow or multirank or cluster or slurm or image)"
set -euo pipefail

CDPATH='' cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
venv=${HVD_ADAM_VENV:-$PWD/.venv}
bash launch/setup.sh --dev
PATH=$venv/bin:$PATH

types=$(mktemp)
trap 'rm "$types"' EXIT
mypy >"$types" 2>&1 & # the longest check, next to the first tests
mypy=$!
ruff check
ruff format --check
lint-imports
find . -path ./.venv -prune -o -name '*.sh' -print0 | xargs -0 shellcheck -x .ci/run
codespell
status=0
# Two at a time, by file. Three take longer: ranks that wait under MPI take the cores from those that compute.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
wait "$mypy" || { cat "$types" && exit 1; }
exit "$status"
