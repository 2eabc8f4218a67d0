#!/usr/bin/env bash
# Waits for launchers on other hosts, as the container's own user, without privileges.
#
#   SSHD_PORT         the port (default 2222, which the image's ssh uses too)
#   AUTHORIZED_KEYS   the keys that may log in (default ~/.ssh/authorized_keys): a file that must be mounted
#   STOP_SECONDS      time for the ranks to save a checkpoint after SIGTERM (default 110): less than the time after which
#                     the container is killed, terminationGracePeriodSeconds of Kubernetes or `docker stop --time`
#
# The host key is generated at each start, in the container's /run.
set -euo pipefail

port=${SSHD_PORT:-2222} authorized=${AUTHORIZED_KEYS:-$HOME/.ssh/authorized_keys} folder=/run/hvd_adam
if [[ ! -s $authorized ]]; then
  echo "sshd.sh: no keys in $authorized: mount a file with the launcher's public key there" >&2
  exit 2
fi
rm -f "$folder/host_key" "$folder/host_key.pub"
ssh-keygen -q -t ed25519 -N '' -C '' -f "$folder/host_key"
# A login does not inherit the container's environment: the variables that the ranks need are set here.
environment=
for name in PATH LD_LIBRARY_PATH $(compgen -e | grep -E '^(OMPI_MCA|NCCL|NVIDIA|CUDA)_' || true); do
  if [[ -n ${!name:-} && ${!name} != *[[:space:]\"]* ]]; then environment+=" $name=${!name}"; fi
done
# StrictModes: the owner of a mounted file depends on the mount. MaxStartups: a launcher connects for all ranks at once.
cat >"$folder/sshd_config" <<END
Port $port
HostKey $folder/host_key
PidFile $folder/sshd.pid
AuthorizedKeysFile $authorized
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
AllowTcpForwarding no
X11Forwarding no
PrintMotd no
MaxStartups 200
ClientAliveInterval 15
SetEnv$environment
END
# is_rank PID: whether this process has a rank's variables and handles SIGUSR1. A rank's workers may do both.
is_rank() {
  local mask
  { tr '\0' '\n' <"/proc/$1/environ" | grep -E '^(OMPI_COMM_WORLD|HOROVOD)_RANK=' >/dev/null; } 2>/dev/null || return 1
  mask=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) || return 1
  ((0x${mask:-0} & 1 << 9)) # bit n - 1 stands for signal n
}

# find_ranks: set `ranks` to the processes of the ranks of this container, without their workers.
find_ranks() {
  local process parent
  ranks=()
  for process in /proc/[0-9]*; do
    process=${process#/proc/}
    is_rank "$process" || continue
    parent=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$process/status" 2>/dev/null) || continue
    is_rank "$parent" || ranks+=("$process")
  done
}

# is_running PROCESSES...: whether any of them runs.
is_running() {
  local process
  for process; do if kill -0 "$process" 2>/dev/null; then return 0; fi; done
  return 1
}

# stop: ask the ranks to save a checkpoint and to stop, and end sshd when they have. Without this, the kernel kills them
# as soon as this script ends, if it is process 1. A launcher that is stopped too sends them the same signal.
stop() {
  local end=$((SECONDS + ${STOP_SECONDS:-110})) ranks
  find_ranks
  if ((${#ranks[@]})); then
    echo "asking ${#ranks[@]} rank(s) to save a checkpoint" >&2
    kill -USR1 "${ranks[@]}" 2>/dev/null || true
    while is_running "${ranks[@]}" && ((SECONDS < end)); do sleep 0.2; done
    sleep 1 # Open MPI's daemon sends the exit codes to the launcher
  fi
  stopping=false
  kill "$sshd" 2>/dev/null || true
}

echo "waiting for launchers on port $port" >&2
stopping=false
trap 'stopping=true' TERM INT
/usr/sbin/sshd -D -e -f "$folder/sshd_config" &
sshd=$!
while is_running "$sshd"; do
  wait "$sshd" || true # a signal ends the wait, not sshd
  if [[ $stopping == true ]]; then stop; fi
done
code=0
wait "$sshd" || code=$?
exit "$code"
