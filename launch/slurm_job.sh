# shellcheck shell=bash
# Sourced by slurm.sh and slurm_container.sh: the job, from its arguments to its end.

launcher='' interface='' module=hvd_adam.train arguments=()
container_options=() container_command=() # srun's options, and what the ranks run in place of the Python of here

# Seconds until the ranks have started Python.
STARTED_SECONDS=10

# Seconds until a node that does not answer is given up; Slurm itself notices after its SlurmdTimeout (300 s).
NODE_ANSWERS_SECONDS=60
SLURM_NOTICES_SECONDS=900

run_job() {
  parse_job "$@"
  require_job
  settle_output
  choose_launcher
  share_cores
  training_command
  echo "Starting $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST by $started_by, start $((${SLURM_RESTART_COUNT:-0} + 1))"
  train
  end_job
}

parse_job() {
  while (($#)); do
    case $1 in
      --launcher) choose "${2:-}"; shift ;;
      -i | --network-interface) interface=${2:?"$1 needs a value"}; shift ;;
      --module) module=${2:?"$1 needs a value"}; shift ;;
      -h | --help) print_usage; exit 0 ;;
      --) shift; arguments=("$@"); break ;;
      *) stop "unknown option $1; options of the training go after --" ;;
    esac
    shift
  done
}

choose() {
  [[ $1 =~ ^(srun|mpirun|horovodrun)$ ]] || stop "--launcher $1: srun, mpirun or horovodrun"
  launcher=$1
}

require_job() {
  local gpus=${SLURM_GPUS_ON_NODE:-0} per_node=${SLURM_TASKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
  [[ -n ${SLURM_JOB_ID:-} ]] || stop "this is no Slurm job; submit it: sbatch launch/slurm.sh"
  per_node=${per_node%%[^0-9]*} # "2(x3),1": two tasks on each of the first three nodes
  SLURM_NTASKS=${SLURM_NTASKS:-1} SLURM_JOB_NODELIST=${SLURM_JOB_NODELIST:-this node}
  ((gpus == 0 || gpus == per_node)) ||
    stop "$gpus GPUs but $per_node tasks a node: give sbatch --ntasks-per-node=$gpus, for one rank a GPU"
  if ((gpus == 0)) && [[ " ${arguments[*]} " != *" --device"[\ =]"cpu "* ]] && partition_has_gpus; then
    stop "partition $SLURM_JOB_PARTITION has GPUs, but this job has none: give sbatch --gpus-per-node=N, or -- --device cpu"
  fi
}

partition_has_gpus() { sinfo --noheader --partition "${SLURM_JOB_PARTITION:-}" --format %G 2>/dev/null | grep -q gpu; }

# settle_output: the same run folder at every start of the job, another for every task of an array.
settle_output() {
  local task=${SLURM_ARRAY_TASK_ID:-} folder i
  [[ $module == hvd_adam.train ]] || return 0
  if [[ -n $task ]]; then
    for ((i = 0; i < ${#arguments[@]}; i++)); do
      case ${arguments[i]} in
        --output-dir | --output_dir) i=$((i + 1)); arguments[i]+=/$task ;;
        --output-dir=* | --output_dir=*) arguments[i]+=/$task ;;
      esac
    done
  fi
  folder=runs/slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${task:+/$task}
  # Of an option that is given twice the last one counts.
  arguments=(--output-dir "$folder" ${task:+--seed "$task"} "${arguments[@]}")
}

choose_launcher() {
  local pmix=false
  if srun --mpi=list 2>&1 | grep -qw pmix; then pmix=true; fi
  if [[ -z $launcher ]]; then
    if [[ $pmix == true ]]; then launcher=srun; elif have mpirun; then launcher=mpirun; else launcher=horovodrun; fi
  elif [[ $launcher == srun && $pmix == false ]]; then
    stop "--launcher srun: this Slurm has no PMIx (srun --mpi=list), by which ranks find each other: use mpirun"
  fi
}

# Slurm binds a rank to its --cpus-per-task; without, all ranks of a node share what the job has there.
share_cores() {
  [[ -n ${SLURM_CPUS_PER_TASK:-} ]] || return 0
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it over from sbatch
}

# training_command: `command` starts all ranks; `started_by` says how.
training_command() {
  local python options=(${interface:+-i "$interface"} --module "$module" -- "${arguments[@]}")
  python=$(find_python)
  export PATH=${python%/*}:$PATH
  case $launcher in
    srun)
      started_by="srun --mpi=pmix"
      command=("$python" "$ROOT/launch/run_srun.py" srun --mpi=pmix --kill-on-bad-exit=1 "${container_options[@]}")
      command+=("${container_command[@]:-$python}" -m "$module" "${arguments[@]}")
      ;;
    mpirun)
      started_by="mpirun"
      command=("$ROOT/launch/mpirun.sh" -np "$SLURM_NTASKS" "${options[@]}")
      ;;
    horovodrun)
      started_by="horovodrun --gloo"
      command=("$ROOT/launch/horovodrun.sh" --gloo -np "$SLURM_NTASKS" -H "$(job_hosts)" "${options[@]}")
      ;;
  esac
}

# job_hosts: the nodes of the job with their tasks, as node1:2,node2:2.
job_hosts() {
  local host hosts='' counts
  mapfile -t counts < <(tasks_of_nodes)
  for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    hosts+=${hosts:+,}$host:${counts[0]}
    counts=("${counts[@]:1}")
  done
  echo "$hosts"
}

# tasks_of_nodes: "2(x2),1" as the lines 2, 2, 1.
tasks_of_nodes() {
  local part count times
  for part in ${SLURM_TASKS_PER_NODE//,/ }; do
    count=${part%%(*} times=1
    if [[ $part =~ x([0-9]+) ]]; then times=${BASH_REMATCH[1]}; fi
    for ((; times > 0; times--)); do echo "$count"; done
  done
}

# train: runs the command to its end, and hands on signals; `code` is its exit code.
train() {
  trap hand_on USR1 USR2 TERM
  SECONDS=0
  "${command[@]}" &
  training=$!
  while kill -0 "$training" 2>/dev/null; do wait "$training" || true; done # a signal ends the wait, not the training
  code=0
  wait "$training" || code=$?
}

# hand_on: Slurm's warnings (--signal, pre-emption, the end of the grace time) tell the ranks: save and stop. Before
# they have started they could not hear it.
hand_on() {
  if ((SECONDS < STARTED_SECONDS)); then sleep $((STARTED_SECONDS - SECONDS)); fi
  kill -USR1 "$training" 2>/dev/null || true
}

# end_job: after 75 the job is queued anew, unless Slurm is doing so, or somebody has cancelled it.
end_job() {
  case $code in
    0 | 2) ;;
    75) queue_anew "the training has saved itself" ;;
    138 | 140 | 143) queue_anew "it was told to stop before it could save itself" ;; # USR1, USR2, TERM
    *) if ! nodes_answer; then await_slurm; fi ;;
  esac
  exit "$code"
}

queue_anew() {
  local state
  state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o ' JobState=[A-Z_]*') || state=
  [[ $state == " JobState=RUNNING" ]] || return 0
  echo "The job is queued anew: $1"
  scontrol requeue "$SLURM_JOB_ID" || echo "It cannot be: submit it again with --output-dir, and it goes on" >&2
}

nodes_answer() {
  local nodes=${SLURM_JOB_NUM_NODES:-1}
  ((nodes == 1)) || timeout "$NODE_ANSWERS_SECONDS" \
    srun --overlap --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --gpus=0 true >/dev/null 2>&1
}

# A dead node looks like a failed rank at first. Queued anew at once, the job might be given the same node.
await_slurm() {
  echo "A node of the job does not answer: waiting for Slurm to notice, which then starts the job anew"
  sleep "$SLURM_NOTICES_SECONDS" &
  wait $! || true
  queue_anew "Slurm has not noticed"
}
