#!/usr/bin/env bash
# Sets up what is missing, then checks style, types and documents, and runs the tests:
#   bash tests/run.sh [ARGUMENTS OF PYTEST]
# The tests that need no ranks, hosts, Slurm or images take under three minutes on two cores:
#   bash tests/run.sh -m "not (multirank or cluster or slurm or image)"
set -euo pipefail

CDPATH='' cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
venv=${HVD_ADAM_VENV:-$PWD/.venv}
bash launch/setup.sh --dev
PATH=$venv/bin:$PATH

ruff check
ruff format --check
mypy
lint-imports
find . -path ./.venv -prune -o -name '*.sh' -print0 | xargs -0 shellcheck -x .ci/run
codespell
site=$(mktemp -d)
mkdocs build --strict --quiet --site-dir "$site"
rm -r "$site"
# Three at a time, by file: most of the time goes to launches (ranks, Slurm, lost hosts), which leave cores idle.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
