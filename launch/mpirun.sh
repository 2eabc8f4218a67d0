#!/usr/bin/env bash
# Trains with Open MPI's mpirun, on this machine, on several hosts, or in a Slurm allocation.
#
#   launch/mpirun.sh -np 2
#   launch/mpirun.sh -np 8 -H host1:4,host2:4 -i eth0 -- --epochs 20 --lr 1e-3
#   launch/mpirun.sh -np 2 --module hvd_adam.evaluate -- --checkpoint runs/a/checkpoints/latest
#
#   -np N                 number of ranks (default: all slots of the hosts; the tasks of the Slurm allocation; on this
#                         machine one per GPU, or 1)
#   -H HOST:N,HOST:N      hosts with their slots, the number of ranks that each can run (default: this machine, or the
#                         Slurm allocation)
#   --hostfile FILE       the same as lines "HOST slots=N" of a file
#   -i, --network-interface NAME[,NAME]   network interface(s) for MPI, NCCL and Gloo
#   -x NAME[=VALUE]       set a variable for the ranks, in addition to PATH, LD_LIBRARY_PATH, PYTHONPATH, OMP_*,
#                         HOROVOD_* and NCCL_*, which are always passed on; may be repeated
#   --ssh-port PORT       ssh port of the hosts
#   --ssh-key FILE        ssh private key
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
# shellcheck source=launch/lib/slurm_allocation.sh
source "$here/lib/slurm_allocation.sh"

# default_rank_count: replaces the function of options.sh, because mpirun uses the nodes of a Slurm allocation.
default_rank_count() {
  local tasks=0
  if [[ -n ${SLURM_JOB_ID:-} ]]; then tasks=$(count_tasks); fi
  if ((tasks > 0)); then echo "$tasks"; else count_gpus; fi
}

# list_exported_variables: print the names of the variables that every rank gets, one per line, each once.
list_exported_variables() {
  local name
  {
    for name in PATH LD_LIBRARY_PATH PYTHONPATH; do [[ -z ${!name+set} ]] || echo "$name"; done
    compgen -e | grep -E '^(OMP|HOROVOD|NCCL)_' || true
    for name in "${pass_variables[@]}"; do echo "${name%%=*}"; done
  } | awk '!seen[$0]++'
}

parse_options '' "$@"
has_command mpirun || fail "no mpirun found: run 'bash launch/setup.sh', or load your cluster's MPI module"
python=$(find_python)
export PATH=${python%/*}:$PATH
if [[ -n $interface ]]; then
  export NCCL_SOCKET_IFNAME=$interface HOROVOD_GLOO_IFACE=${interface%%,*}
fi

# The flags are those of Horovod's documentation (docs/mpi.rst): no binding, because a rank has several threads; by slot,
# because hosts may have different numbers of slots; TCP for MPI's own messages, because NCCL carries the large ones.
command=("$python" -I "$ROOT/hvd_adam/launch/signal_proxy.py" mpirun -np "$ranks")
if [[ -n $hosts || -z ${SLURM_JOB_ID:-} ]]; then command+=(-H "${hosts:-localhost:$ranks}"); fi
if ((EUID == 0)); then command+=(--allow-run-as-root); fi
command+=(--bind-to none --map-by slot --mca pml ob1 --mca btl ^openib)
if [[ -n $interface ]]; then command+=(--mca btl_tcp_if_include "$interface"); fi
ssh_arguments=${ssh_port:+-p $ssh_port}${ssh_port:+${ssh_key:+ }}${ssh_key:+-i $ssh_key}
if [[ -n $ssh_arguments ]]; then command+=(--mca plm_rsh_args "$ssh_arguments"); fi
variables=$(list_exported_variables)
while read -r variable; do command+=(-x "$variable"); done <<<"$variables"
# Open MPI also accepts subnets, as in 10.0.0.0/8.
if [[ -n $interface && $interface != */* && $dry_run == false ]] && ranks_run_here; then
  "$python" -I "$ROOT/hvd_adam/launch/interfaces.py" mpirun.sh "$interface" || exit $?
fi
check_hosts "$python"
exec_launcher "$python" "${command[@]}" "$python" -m "$module" "${module_arguments[@]}"
