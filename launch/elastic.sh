#!/usr/bin/env bash
# Starts a training that survives the loss of ranks, hosts and links, and takes up hosts that are added, through an
# elastic horovodrun (Gloo).
#
#   launch/elastic.sh -np 4 --min-np 2 --hostfile hosts -- --epochs 20
#   launch/elastic.sh -np 4 --min-np 2 --max-np 8 --discovery ./my_hosts.sh -- --epochs 20
#
#   -np N                 ranks to begin with (default: all that the hosts offer)
#   --min-np N            wait where fewer ranks are left (default: 1)
#   --max-np N            never more ranks than that (default: as many as the hosts offer)
#   --hostfile FILE       lines "HOST slots=N"; the file may change while the job runs. Without it, and without
#                         --discovery: the hosts of the Slurm allocation
#   --discovery COMMAND   prints the hosts of now, "HOST:SLOTS" a line, instead (see launch/discover_hosts.sh)
#   --cooldown MIN MAX    seconds for which a host that has failed is left out (default: 10 60)
#   --gloo-timeout S      seconds after which a rank that does not answer counts as lost (default: 30)
#   -i, --network-interface NAME[,NAME]   network interface(s) to use (default: horovodrun probes, for which it waits for
#                         a second host)
#   -x NAME[=VALUE]       a variable the ranks must have; horovodrun hands on the whole environment as well
#   --ssh-port PORT       ssh port of the hosts
#   --ssh-key FILE        ssh private key
#   --module NAME         Python module to run (default: hvd_adam.train, with --elastic)
#   --dry-run             print the command instead of running it
#   -- ARGUMENTS          go to the module
#
# At least two hosts are needed to survive a rank: horovodrun leaves the host of a failed rank alone for a while.
# Exit code: as launch/horovodrun.sh.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/options.sh
source "$here/options.sh"

min_ranks=1 max_ranks='' discovery='' cooldown=(10 60) gloo_timeout=30 others=()

# need_number OPTION VALUE
need_number() { [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || stop "$1 ${2:-}: a whole number of at least 1 is needed"; }

# settle_ranks: instead of the one of options.sh; how many ranks there are is for the hosts of each moment to say.
settle_ranks() { [[ -z $hosts || -n $hostfile ]] || stop "-H cannot change while the job runs: use --hostfile"; }

while (($#)); do
  case $1 in
    --min-np) need_number "${@:1:2}"; min_ranks=$2; shift ;;
    --max-np) need_number "${@:1:2}"; max_ranks=$2; shift ;;
    --gloo-timeout) need_number "${@:1:2}"; gloo_timeout=$2; shift ;;
    --cooldown) need_number "$1" "${2:-}"; need_number "$1" "${3:-}"; cooldown=("$2" "$3"); shift 2 ;;
    --discovery) need_value "$@"; discovery=$2; shift ;;
    --) others+=("$@"); break ;;
    *) others+=("$1") ;;
  esac
  shift
done
parse_options '' "${others[@]}"
[[ -z $hostfile || -z $discovery ]] || stop "--hostfile and --discovery exclude each other"
if [[ -z $discovery ]]; then
  [[ -n $hostfile || -n ${SLURM_JOB_NODELIST:-} ]] ||
    stop "which hosts? give --hostfile or --discovery, or start it in a Slurm allocation"
  printf -v discovery '%q ' bash "$here/discover_hosts.sh" "${hostfile:-slurm}" "${ssh_port:-22}"
fi
if [[ -z $ranks ]]; then
  ranks=$(bash -c "$discovery" | awk -F: '{ sum += NF > 1 ? $2 : 1 } END { print sum + 0 }')
  ((ranks > 0)) || stop "no host answers: $discovery names none"
fi
((min_ranks <= ranks)) || stop "--min-np $min_ranks is more than the $ranks ranks to begin with"
python=$(find_python)
export PATH=${python%/*}:$PATH
if [[ $module == hvd_adam.train ]]; then module_arguments=(--elastic "${module_arguments[@]}"); fi

command=("$python" "$here/run_horovod.py" -np "$ranks" --min-np "$min_ranks")
if [[ -n $max_ranks ]]; then command+=(--max-np "$max_ranks"); fi
command+=(--host-discovery-script "$discovery" --blacklist-cooldown-range "${cooldown[@]}")
command+=(--gloo-timeout-seconds "$gloo_timeout")
if [[ -n $interface ]]; then command+=(--network-interfaces "$interface"); fi
if [[ -n $ssh_port ]]; then command+=(--ssh-port "$ssh_port"); fi
if [[ -n $ssh_key ]]; then command+=(--ssh-identity-file "$ssh_key"); fi
launch "$python" "${command[@]}" "$python" -m "$module" "${module_arguments[@]}"
