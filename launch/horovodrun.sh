#!/usr/bin/env bash
# Starts the training through horovodrun, on this machine or over several hosts.
#
#   launch/horovodrun.sh -np 2
#   launch/horovodrun.sh -np 8 -H host1:4,host2:4 -- --epochs 20 --lr 1e-3
#   launch/horovodrun.sh -np 2 --gloo --module hvd_adam.evaluate -- --checkpoint runs/a/checkpoints/latest
#
#   -np N                 number of ranks (default: all that the hosts offer; here, one a GPU, or 1)
#   -H HOST:N,HOST:N      hosts and how many ranks each takes (default: this machine)
#   --hostfile FILE       the same from a file with lines "HOST slots=N"
#   -i, --network-interface NAME[,NAME]   network interface(s) to use (default: horovodrun probes)
#   -x NAME[=VALUE]       a variable the ranks must have; horovodrun hands on the whole environment as well
#   --ssh-port PORT       ssh port of the hosts
#   --ssh-key FILE        ssh private key
#   --gloo | --mpi        controller (default: MPI where Horovod was built with it)
#   --module NAME         Python module to run (default: hvd_adam.train)
#   --no-check            do not look first whether all hosts let us in and have the same software
#   --dry-run             print the command instead of running it
#   -- ARGUMENTS          go to the module
#
# The Python is $HVD_ADAM_PYTHON, else the one that launch/setup.sh installed, else python3.
# Exit code: the failed rank's (2 bad arguments or input, 75 stopped by pre-emption), 0 when all is well.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
# shellcheck source=launch/options.sh
source "$here/options.sh"

parse_options '--gloo --mpi' "$@"
python=$(find_python)
export PATH=${python%/*}:$PATH

command=("$python" "$here/run_horovod.py" -np "$ranks" -H "${hosts:-localhost:$ranks}")
if [[ -n $interface ]]; then command+=(--network-interfaces "$interface"); fi
if [[ -n $ssh_port ]]; then command+=(--ssh-port "$ssh_port"); fi
if [[ -n $ssh_key ]]; then command+=(--ssh-identity-file "$ssh_key"); fi
if [[ -n $controller ]]; then command+=("$controller"); fi
check_hosts "$python"
launch "$python" "${command[@]}" "$python" -m "$module" "${module_arguments[@]}"
