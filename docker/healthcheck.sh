#!/usr/bin/env bash
# The image's HEALTHCHECK. A job that hangs is not its business: the watchdog ends that, and the container with it.
# What goes wrong under a running container, and shows nowhere else until the next job fails, is:
#
#   the GPUs are gone (the host's driver was updated, or its systemd reloaded);
#   sshd does not answer, where it was asked for;
#   torch and Horovod do not load: asked once, on the first check, because it costs seconds of a core.
set -euo pipefail

folder=/run/hvd_adam
if [[ -e /dev/nvidiactl ]]; then
  nvidia-smi --list-gpus | grep -q '^GPU ' || { echo "the GPUs are gone: start the container anew" && exit 1; }
fi
if [[ -e $folder/sshd.pid ]]; then
  port=$(awk '$1 == "Port" { print $2 }' "$folder/sshd_config")
  { exec 3<>"/dev/tcp/127.0.0.1/$port" && read -r -t 5 banner <&3 && [[ $banner == SSH-* ]]; } 2>/dev/null ||
    { echo "sshd does not answer on port $port" && exit 1; }
fi
if [[ ! -e $folder/loads ]]; then
  python -c 'from hvd_adam.distributed.context import horovod; horovod()'
  touch "$folder/loads"
fi
