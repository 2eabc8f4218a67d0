#!/usr/bin/env bash
# Trains with horovodrun, on this machine or on several hosts.
#
#   launch/horovodrun.sh -np 2
#   launch/horovodrun.sh -np 8 -H host1:4,host2:4 -- --epochs 20 --lr 1e-3
#   launch/horovodrun.sh -np 2 --gloo --module hvd_adam.evaluate -- --checkpoint runs/a/checkpoints/latest
#
#   -np N                 number of ranks (default: all slots of the hosts; on this machine one per GPU, or 1)
#   -H HOST:N,HOST:N      hosts with their slots, the number of ranks that each can run (default: this machine)
#   --hostfile FILE       the same as lines "HOST slots=N" of a file
#   -i, --network-interface NAME[,NAME]   network interface(s) to use (default: horovodrun probes)
#   -x NAME[=VALUE]       set a variable for the ranks; horovodrun also passes on the whole environment
#   --ssh-port PORT       ssh port of the hosts
#   --ssh-key FILE        ssh private key
#   --gloo | --mpi        controller (default: MPI if Horovod was built with it)
#   --module NAME         Python module to run (default: hvd_adam.train)
#   --no-check            do not check first that the module exists, SSH login works on all hosts, and their software is the same
#   --dry-run             print the command instead of running it
#   -- ARGUMENTS          arguments of the module
#
# The Python is $HVD_ADAM_PYTHON, else the one that launch/setup.sh installed, else python3.
# Exit code: 0 on success, else that of the failed rank (2 bad arguments or input, 75 stopped by pre-emption), and 130
# after Ctrl-C.
set -euo pipefail

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then self=$(readlink -f "$self"); fi
here=$(CDPATH='' cd "$(dirname "$self")" && pwd)
# shellcheck source=launch/lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=launch/lib/options.sh
source "$here/lib/options.sh"

parse_options '--gloo --mpi' "$@"
python=$(find_python)
export PATH=${python%/*}:$PATH

command=("$python" "$ROOT/hvd_adam/launch/horovodrun.py" -np "$ranks" -H "${hosts:-localhost:$ranks}")
if [[ -n $interface ]]; then command+=(--network-interfaces "$interface"); fi
if [[ -n $ssh_port ]]; then command+=(--ssh-port "$ssh_port"); fi
if [[ -n $ssh_key ]]; then command+=(--ssh-identity-file "$ssh_key"); fi
if [[ -n $controller ]]; then command+=("$controller"); fi
check_hosts "$python"
exec_launcher "$python" "${command[@]}" "$python" -m "$module" "${module_arguments[@]}"
