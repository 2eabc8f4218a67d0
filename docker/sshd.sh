#!/usr/bin/env bash
# Waits for launchers on other hosts, as the container's own user, without privileges.
#
#   SSHD_PORT         the port (default 2222, which the image's ssh uses too)
#   AUTHORIZED_KEYS   the keys that may log in (default ~/.ssh/authorized_keys): a file that must be mounted
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
echo "waiting for launchers on port $port" >&2
exec /usr/sbin/sshd -D -e -f "$folder/sshd_config"
