#!/usr/bin/env bash
# The image's entry point: docker run [--gpus all] IMAGE [COMMAND [ARGUMENTS]]
#
#   (nothing), options, or train [OPTIONS]   trains, one rank on each GPU of the machine (one rank without GPUs)
#   quickstart [OPTIONS]                     trains on two ranks, like launch/quickstart.sh
#   evaluate | bench | doctor [ARGUMENTS]    python -m hvd_adam.NAME
#   sshd                                     waits for launchers on other hosts: docker/sshd.sh
#   ssh-keys                                 makes the key pair for them in ~/.ssh, a volume, if there is none
#   anything else                            is run unchanged
set -euo pipefail

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then self=$(readlink -f "$self"); fi
home=$(CDPATH='' cd "$(dirname "$self")/.." && pwd)
if (($# == 0)) || [[ $1 == -* ]]; then set -- train "$@"; fi
command=$1
case $command in
  train) shift; exec "$home/launch/mpirun.sh" -- "$@" ;;
  quickstart) shift; exec "$home/launch/horovodrun.sh" -np 2 -- "$@" ;;
  evaluate | bench | doctor) shift; exec python -m "hvd_adam.$command" "$@" ;;
  sshd | ssh-keys) shift; exec "$home/docker/${command//-/_}.sh" "$@" ;;
  *) exec "$@" ;;
esac
