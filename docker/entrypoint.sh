#!/usr/bin/env bash
# The image's entry point: docker run [--gpus all] IMAGE [COMMAND [ARGUMENTS]]
#
#   (nothing), options, or train [OPTIONS]   trains, one rank on each GPU of the machine (one rank without any)
#   quickstart [OPTIONS]                     trains on two ranks, as launch/quickstart.sh does
#   evaluate | bench | doctor [ARGUMENTS]    python -m hvd_adam.NAME
#   sshd                                     waits for ranks of other hosts: docker/sshd.sh
#   ssh-keys                                 makes the key pair for that in ~/.ssh, a volume, unless there is one
#   anything else                            is run as it is
set -euo pipefail

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if (($# == 0)) || [[ $1 == -* ]]; then set -- train "$@"; fi
command=$1
case $command in
  train) shift; exec "$home/launch/mpirun.sh" -- "$@" ;;
  quickstart) shift; exec "$home/launch/horovodrun.sh" -np 2 -- "$@" ;;
  evaluate | bench | doctor) shift; exec python -m "hvd_adam.$command" "$@" ;;
  sshd | ssh-keys) shift; exec "$home/docker/${command//-/_}.sh" "$@" ;;
  *) exec "$@" ;;
esac
