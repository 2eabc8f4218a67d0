#!/usr/bin/env bash
# Builds or installs Horovod for the Python that PYTHON names (default: python3), from a clone of the repository:
# python -m hvd_adam.build_horovod without an installed package. The options are the same; see --help.
set -euo pipefail

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then self=$(readlink -f "$self"); fi
here=$(CDPATH='' cd "$(dirname "$self")" && pwd)

exec bash "$here/../hvd_adam/build_horovod/build_horovod.sh" "$@"
