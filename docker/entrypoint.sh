#!/usr/bin/env bash
# The image's entry point. Without a command, or with options alone, it trains on all GPUs of the machine (one rank
# where there is none); otherwise it runs the command:
#
#   docker run --gpus all IMAGE
#   docker run --gpus all IMAGE --epochs 20
#   docker run IMAGE python -m hvd_adam.train --epochs 1
set -euo pipefail

if (($# == 0)) || [[ $1 == -* ]]; then
  exec /opt/hvd_adam/launch/mpirun.sh -- "$@"
fi
exec "$@"
