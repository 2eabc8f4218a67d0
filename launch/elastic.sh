#!/usr/bin/env bash
# Trains with an elastic horovodrun (Gloo): training survives the loss of ranks, hosts and links, and uses hosts that are
# added while it runs.
#
#   launch/elastic.sh -np 4 --min-np 2 --hostfile hosts -- --epochs 20
#   launch/elastic.sh -np 4 --min-np 2 --max-np 8 --discovery ./my_hosts.sh -- --epochs 20
#
#   -np N                 wait at the start until the hosts have N slots (default: all slots of the hosts, at most
#                         --max-np). Ranks use all slots, up to --max-np
#   --min-np N            pause while fewer ranks are left (default: 1)
#   --max-np N            maximum number of ranks (default: all slots of the hosts)
#   --hostfile FILE       lines "HOST slots=N"; the file may change while the job runs. Default without --discovery: the
#                         hosts of the Slurm allocation
#   --discovery COMMAND   a command that prints the current hosts instead, "HOST:SLOTS" per line (see
#                         launch/discover_hosts.sh)
#   --cooldown MIN MAX    seconds during which a failed host is not used, at most 3600 (default: 10 60)
#   --gloo-timeout S      seconds after which a rank that does not respond counts as lost (default: 30)
#   -i, --network-interface NAME[,NAME]   network interface(s) to use (default: horovodrun probes, for which it waits for
#                         a second host)
#   -x NAME[=VALUE]       set a variable for the ranks; horovodrun also passes on the whole environment
#   --ssh-port PORT       ssh port of the hosts
#   --ssh-key FILE        ssh private key
#   --module NAME         Python module to run (default: hvd_adam.train, with --elastic)
#   --dry-run             print the command instead of running it
#   -- ARGUMENTS          arguments of the module
#
# At least two hosts are needed to survive the loss of a rank: horovodrun does not use the host of a failed rank during
# the cooldown. Exit code: as for launch/horovodrun.sh.
set -euo pipefail

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then self=$(readlink -f "$self"); fi
here=$(CDPATH='' cd "$(dirname "$self")" && pwd)
# shellcheck source=launch/lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=launch/lib/options.sh
source "$here/lib/options.sh"

min_ranks=1 max_ranks='' discovery='' cooldown=(10 60) gloo_timeout=30 found='' launcher_arguments=()

# set_cooldown MIN MAX: Horovod accepts at most an hour.
set_cooldown() {
  local number='^[1-9][0-9]{0,3}$'
  [[ ${1:-} =~ $number && ${2:-} =~ $number && $1 -le $2 && $2 -le 3600 ]] ||
    fail "--cooldown $*: needs two whole numbers of seconds, MIN and MAX, with 1 <= MIN <= MAX <= 3600"
  cooldown=("$1" "$2")
}

# set_rank_count: replaces the function of options.sh, because the hosts change while the job runs.
set_rank_count() { [[ -z $hosts || -n $hostfile ]] || fail "-H cannot change while the job runs: use --hostfile"; }

# find_hosts: set `found` to the lines that the discovery prints. Wrong ones are internal errors in horovodrun.
find_hosts() {
  local line host slots named=' '
  found=$(bash -c "$discovery") || fail "the discovery command failed with exit code $?: $discovery"
  found=$(sed '/^$/d' <<<"$found")
  [[ -n $found ]] || return 0
  while IFS= read -r line; do
    [[ $line =~ ^([A-Za-z0-9_.-]+)(:[0-9]+)?[[:space:]]*$ ]] ||
      fail "the discovery command prints '$line', which is not of the form HOST or HOST:SLOTS: $discovery"
    host=${BASH_REMATCH[1]}
    [[ $named != *" $host "* ]] || fail "the discovery command prints the host $host twice: $discovery"
    slots=${BASH_REMATCH[2]#:}
    [[ ${slots:-1} =~ ^0*[0-9]{1,6}$ ]] ||
      fail "the discovery command prints $slots slots for the host $host: use at most $MOST_SLOTS: $discovery"
    named+="$host "
  done <<<"$found"
}

while (($#)); do
  case $1 in
    --min-np) require_positive "${@:1:2}"; min_ranks=$2; shift ;;
    --max-np) require_positive "${@:1:2}"; max_ranks=$2; shift ;;
    --gloo-timeout) require_positive "${@:1:2}"; gloo_timeout=$2; shift ;;
    --cooldown) set_cooldown "${@:2:2}"; shift 2 ;;
    --discovery) require_value "$@"; discovery=$2; shift ;;
    --) launcher_arguments+=("$@"); break ;;
    *) launcher_arguments+=("$1") ;;
  esac
  shift
done
parse_options '' "${launcher_arguments[@]}"
[[ -z $hostfile || -z $discovery ]] || fail "--hostfile and --discovery exclude each other"
if [[ -z $discovery ]]; then
  [[ -n $hostfile || -n ${SLURM_JOB_NODELIST:-} ]] ||
    fail "no hosts given: use --hostfile or --discovery, or start it in a Slurm allocation"
  printf -v discovery '%q ' bash "$here/discover_hosts.sh" "${hostfile:-slurm}" "${ssh_port:-22}"
fi
if [[ -z $ranks || $dry_run == false ]]; then find_hosts; fi
slots=$(awk -F: 'NF { sum += NF > 1 ? $2 : 1 } END { print sum + 0 }' <<<"$found")
if [[ -z $ranks ]]; then
  [[ -n $found ]] || fail "no host is reachable: $discovery prints none"
  ranks=$slots
  if [[ -n $max_ranks ]] && ((max_ranks < ranks)); then ranks=$max_ranks; fi
fi
((min_ranks <= ranks)) || fail "--min-np $min_ranks is more than the $ranks ranks to wait for (-np)"
((ranks <= ${max_ranks:-ranks})) || fail "--max-np $max_ranks is less than the $ranks ranks to wait for (-np)"
if [[ $dry_run == false ]] && ((slots < ranks)); then
  echo "elastic.sh: waiting: the hosts have $slots slot(s), -np needs $ranks" >&2
fi
if [[ -z $interface && $dry_run == false && $(wc -l <<<"$found") == 1 ]]; then
  echo "elastic.sh: waiting for a second host, to find a network interface that both have; to start with" \
    "${found:-the first host} alone, name the interface, as in -i eth0 (on one machine: -i lo)" >&2
fi
python=$(find_python)
export PATH=${python%/*}:$PATH
if [[ $module == hvd_adam.train ]]; then module_arguments=(--elastic "${module_arguments[@]}"); fi

command=("$python" "$ROOT/hvd_adam/launch/horovodrun.py" -np "$ranks" --min-np "$min_ranks")
if [[ -n $max_ranks ]]; then command+=(--max-np "$max_ranks"); fi
command+=(--host-discovery-script "$discovery" --slots-per-host 1)
command+=(--blacklist-cooldown-range "${cooldown[@]}" --gloo-timeout-seconds "$gloo_timeout")
if [[ -n $interface ]]; then command+=(--network-interfaces "$interface"); fi
if [[ -n $ssh_port ]]; then command+=(--ssh-port "$ssh_port"); fi
if [[ -n $ssh_key ]]; then command+=(--ssh-identity-file "$ssh_key"); fi
exec_launcher "$python" "${command[@]}" "$python" -m "$module" "${module_arguments[@]}"
