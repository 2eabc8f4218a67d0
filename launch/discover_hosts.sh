#!/usr/bin/env bash
# Prints the hosts that an elastic job may use now, one "HOST:SLOTS" per line: those of a host file or of the Slurm
# allocation whose ssh port accepts connections. launch/elastic.sh has horovodrun call it every second.
#
#   launch/discover_hosts.sh FILE [PORT]       FILE has lines "HOST slots=N"; it may change while the job runs
#   launch/discover_hosts.sh slurm [PORT]      the nodes of this allocation, with their tasks, or GPUs
#
# A host that does not accept a connection within two seconds is left out until it does. This machine is always listed.
set -euo pipefail

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then self=$(readlink -f "$self"); fi
here=$(CDPATH='' cd "$(dirname "$self")" && pwd)
# shellcheck source=launch/lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=launch/lib/options.sh
source "$here/lib/options.sh"
# shellcheck source=launch/lib/slurm_allocation.sh
source "$here/lib/slurm_allocation.sh"

# is_reachable HOST PORT: whether HOST accepts connections to PORT.
is_reachable() {
  # shellcheck disable=SC2016  # the inner shell expands it
  [[ $1 == localhost || $1 == "$HOSTNAME" ]] || timeout 2 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$1" "$2" 2>/dev/null
}

case ${1:-} in
  '' | -h | --help) print_usage; exit 0 ;;
  slurm)
    has_command scontrol || fail "slurm: there is no scontrol on this machine"
    [[ -n ${SLURM_JOB_NODELIST:-} ]] || fail "slurm: this is not a Slurm allocation"
    if [[ -z ${SLURM_NTASKS_PER_NODE:-} ]] && ((${SLURM_GPUS_ON_NODE:-0} > 0)); then
      SLURM_TASKS_PER_NODE="$SLURM_GPUS_ON_NODE(x${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}})" # salloc without tasks
    fi
    hosts=$(job_hosts)
    ;;
  *) hostfile=$1; read_hostfile; name_hosts_once ;;
esac

for host in ${hosts//,/ }; do
  if is_reachable "${host%%:*}" "${2:-22}"; then echo "$host"; fi &
done
wait
