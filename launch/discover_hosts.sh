#!/usr/bin/env bash
# Says which hosts an elastic job may use now, one "HOST:SLOTS" a line: those of a host file, or of the Slurm allocation,
# that answer on their ssh port. launch/elastic.sh has horovodrun call it every second.
#
#   launch/discover_hosts.sh FILE [PORT]       FILE has lines "HOST slots=N"; it may change while the job runs
#   launch/discover_hosts.sh slurm [PORT]      the nodes of this allocation, with its tasks per node
#
# A host that does not answer within two seconds is left out until it does. This machine is always there.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/options.sh
source "$here/options.sh"

# answers HOST PORT: whether something listens there.
answers() {
  # shellcheck disable=SC2016  # the inner shell expands it
  [[ $1 == localhost || $1 == "$HOSTNAME" ]] || timeout 2 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$1" "$2" 2>/dev/null
}

case ${1:-} in
  '' | -h | --help) print_usage; exit 0 ;;
  slurm)
    have scontrol || stop "slurm: there is no scontrol here"
    slots=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    for host in $(scontrol show hostnames "${SLURM_JOB_NODELIST:?not in a Slurm allocation}"); do
      hosts+=${hosts:+,}$host:$slots
    done
    ;;
  *) hostfile=$1; read_hostfile ;;
esac

for host in ${hosts//,/ }; do
  if answers "${host%%:*}" "${2:-22}"; then echo "$host"; fi &
done
wait
