#!/usr/bin/env bash
# Starts the training through Open MPI's mpirun, on this machine, over several hosts, or in a Slurm allocation.
#
#   launch/mpirun.sh -np 2
#   launch/mpirun.sh -np 8 -H host1:4,host2:4 -i eth0 -- --epochs 20 --lr 1e-3
#   launch/mpirun.sh -np 2 --module hvd_adam.evaluate -- --checkpoint runs/a/checkpoints/latest
#
#   -np N                 number of ranks (default: all that the hosts offer; here, one a GPU, or 1)
#   -H HOST:N,HOST:N      hosts and how many ranks each takes (default: this machine, or Slurm's allocation)
#   --hostfile FILE       the same from a file with lines "HOST slots=N"
#   -i, --network-interface NAME[,NAME]   network interface(s) for MPI, NCCL and Gloo
#   -x NAME[=VALUE]       a variable to hand to the ranks, besides PATH, LD_LIBRARY_PATH, PYTHONPATH, OMP_*,
#                         HOROVOD_* and NCCL_*, which they get in any case; may be repeated
#   --ssh-port PORT       ssh port of the hosts
#   --ssh-key FILE        ssh private key
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

# handed_on_variables: names of the variables that every rank gets, one a line, each once.
handed_on_variables() {
  local name
  {
    for name in PATH LD_LIBRARY_PATH PYTHONPATH; do [[ -z ${!name+set} ]] || echo "$name"; done
    compgen -e | grep -E '^(OMP|HOROVOD|NCCL)_' || true
    for name in "${pass_variables[@]}"; do echo "${name%%=*}"; done
  } | awk '!seen[$0]++'
}

parse_options '' "$@"
have mpirun || stop "no mpirun found: run 'bash launch/setup.sh', or load your cluster's MPI module"
python=$(find_python)
export PATH=${python%/*}:$PATH
if [[ -n $interface ]]; then
  export NCCL_SOCKET_IFNAME=$interface HOROVOD_GLOO_IFACE=${interface%%,*}
fi

# The flags are those of Horovod's documentation (docs/mpi.rst): no binding, because a rank has several threads;
# by slot, for hosts of different shapes; TCP for MPI's own messages, because NCCL carries the heavy ones.
command=("$python" -I "$here/pass_signals.py" mpirun -np "$ranks")
if [[ -n $hosts || -z ${SLURM_JOB_ID:-} ]]; then command+=(-H "${hosts:-localhost:$ranks}"); fi
if ((EUID == 0)); then command+=(--allow-run-as-root); fi
command+=(--bind-to none --map-by slot --mca pml ob1 --mca btl ^openib)
if [[ -n $interface ]]; then command+=(--mca btl_tcp_if_include "$interface"); fi
ssh_arguments=${ssh_port:+-p $ssh_port}${ssh_port:+${ssh_key:+ }}${ssh_key:+-i $ssh_key}
if [[ -n $ssh_arguments ]]; then command+=(--mca plm_rsh_args "$ssh_arguments"); fi
variables=$(handed_on_variables)
while read -r variable; do command+=(-x "$variable"); done <<<"$variables"
check_hosts "$python"
launch "$python" "${command[@]}" "$python" -m "$module" "${module_arguments[@]}"
