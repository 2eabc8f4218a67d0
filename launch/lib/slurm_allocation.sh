# shellcheck shell=bash
# Sourced by slurm_job.sh, mpirun.sh and discover_hosts.sh: nodes and tasks of the Slurm allocation.

# tasks_of_nodes: print the number of tasks of each node, for "2(x2),1" the lines 2, 2, 1; nothing if Slurm does not say.
tasks_of_nodes() {
  local part count times tasks=${SLURM_TASKS_PER_NODE:-}
  if [[ -z $tasks && -n ${SLURM_NTASKS_PER_NODE:-} ]]; then
    tasks="$SLURM_NTASKS_PER_NODE(x${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}})"
  fi
  for part in ${tasks//,/ }; do
    count=${part%%(*} times=1
    if [[ $part =~ x([0-9]+) ]]; then times=${BASH_REMATCH[1]}; fi
    for ((; times > 0; times--)); do echo "$count"; done
  done
}

# count_tasks: print the number of tasks of the allocation, 0 if Slurm does not say. SLURM_NTASKS is missing where the
# job was submitted without --ntasks, by some versions of Slurm and by wrappers of sbatch.
count_tasks() {
  local count sum=0
  if [[ -n ${SLURM_NTASKS:-} ]]; then
    sum=$SLURM_NTASKS
  else
    for count in $(tasks_of_nodes); do sum=$((sum + count)); done
  fi
  echo "$sum"
}

# job_hosts: print the nodes of the allocation with their tasks, as node1:2,node2:2.
job_hosts() {
  local host hosts='' counts
  mapfile -t counts < <(tasks_of_nodes)
  for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    hosts+=${hosts:+,}$host:${counts[0]:-1}
    counts=("${counts[@]:1}")
  done
  echo "$hosts"
}
