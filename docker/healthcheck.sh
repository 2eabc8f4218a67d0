#!/usr/bin/env bash
# The image's HEALTHCHECK. It detects failures that would otherwise show only when the next job fails:
#
#   the GPUs are gone (the host's driver was updated, or its systemd reloaded);
#   sshd does not respond, if it was started;
#   torch and Horovod do not load: checked only once, because it takes seconds of a core.
#
# It does not detect a job that hangs: the watchdog ends the job, and the container with it.
set -euo pipefail

folder=/run/hvd_adam
if [[ -e /dev/nvidiactl ]]; then
  nvidia-smi --list-gpus | grep '^GPU ' >/dev/null ||
    { echo "the GPUs are gone: restart the container" && exit 1; }
fi
if [[ -e $folder/sshd.pid ]]; then
  port=$(awk '$1 == "Port" { print $2 }' "$folder/sshd_config")
  { exec 3<>"/dev/tcp/127.0.0.1/$port" && read -r -t 5 banner <&3 && [[ $banner == SSH-* ]]; } 2>/dev/null ||
    { echo "sshd does not respond on port $port" && exit 1; }
fi
if [[ ! -e $folder/loads ]]; then
  python -c 'from hvd_adam.distributed.context import horovod; horovod()'
  touch "$folder/loads" 2>/dev/null || true # with --user, the folder belongs to another user: check again then
fi
