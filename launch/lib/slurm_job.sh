# shellcheck shell=bash
# Sourced by slurm.sh and slurm_container.sh: the job, from its arguments to its exit.

# shellcheck source=launch/lib/slurm_allocation.sh
source launch/lib/slurm_allocation.sh

job='' # this job, as Slurm's commands name it
interrupted=false # by Ctrl-C
launcher='' interface='' module=hvd_adam.train arguments=()
container_options=() container_command=() # further options of srun, and the command that replaces Python

# Seconds until the ranks have started Python.
STARTUP_SECONDS=10

# Seconds to wait for the response of a node. Slurm itself notices a lost node after its SlurmdTimeout (300 s).
NODE_RESPONSE_SECONDS=60
SLURM_DETECTION_SECONDS=900

run_job() {
  parse_job "$@"
  require_job
  set_output_dir
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
      --launcher) set_launcher "${2:-}"; shift ;;
      -i | --network-interface) require_value "$@"; interface=$2; shift ;;
      --module) require_value "$@"; check_module "$2"; module=$2; shift ;;
      -h | --help) print_usage; exit 0 ;;
      --) shift; arguments=("$@"); break ;;
      *) fail "unknown option $1; options of the training go after --" ;;
    esac
    shift
  done
}

set_launcher() {
  [[ $1 =~ ^(srun|mpirun|horovodrun)$ ]] || fail "--launcher $1: must be srun, mpirun or horovodrun"
  launcher=$1
}

require_job() {
  local gpus=${SLURM_GPUS_ON_NODE:-0} per_node tasks counts
  [[ -n ${SLURM_JOB_ID:-} ]] || fail "this is not a Slurm job; submit it: sbatch launch/slurm.sh"
  # The number of an array's last task is that of the whole array, to which Slurm's commands would then apply.
  job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
  tasks=$(count_tasks)
  mapfile -t counts < <(tasks_of_nodes)
  if ((tasks == 0)); then
    echo "Slurm does not give the number of tasks: starting one rank; use sbatch --ntasks-per-node=N for more" >&2
    tasks=1
  fi
  if ((${SLURM_HET_SIZE:-1} > 1)); then
    echo "This job has $SLURM_HET_SIZE components, and ranks start on the first one only" >&2
  fi
  per_node=${counts[0]:-$((tasks / ${SLURM_JOB_NUM_NODES:-1}))}
  export SLURM_NTASKS=$tasks # srun reads it
  SLURM_JOB_NODELIST=${SLURM_JOB_NODELIST:-this node}
  ((gpus == 0 || gpus == per_node)) ||
    fail "$gpus GPUs but $per_node tasks per node: use sbatch --ntasks-per-node=$gpus, for one rank per GPU"
  # Of programs of one's own, it is not known whether they use GPUs. --device may be abbreviated.
  if [[ $module == hvd_adam.train && ! " ${arguments[*]} " =~ \ --dev(i|ic|ice)?[\ =]cpu\  ]] &&
    ((gpus == 0)) && partition_has_gpus; then
    fail "partition $SLURM_JOB_PARTITION has GPUs, but this job has none: use sbatch --gpus-per-node=N, or -- --device cpu"
  fi
}

partition_has_gpus() {
  # Not grep -q, here and elsewhere: it ends at the first match, and the command in front of it then fails by SIGPIPE.
  sinfo --noheader --partition "${SLURM_JOB_PARTITION:-}" --format %G 2>/dev/null | grep gpu >/dev/null
}

# set_output_dir: use the same run folder at every start of the job, and one for every task of an array.
set_output_dir() {
  local task=${SLURM_ARRAY_TASK_ID:-} folder value i
  [[ $module == hvd_adam.train ]] || return 0
  for ((i = 0; i < ${#arguments[@]}; i++)); do
    case ${arguments[i]} in # the option may be abbreviated
      --ou*=*) value=${arguments[i]#*=} ;;
      --ou*) i=$((i + 1)); value=${arguments[i]:-} ;;
      *) continue ;;
    esac
    [[ -n $value ]] || fail "--output-dir has an empty value: name a folder, or leave it out"
    arguments[i]+=${task:+/$task}
  done
  folder=runs/slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${task:+/$task}
  # If an option is given twice, the last value counts. A value in a --config file counts less than either.
  arguments=(--output-dir "$folder" ${task:+--seed "$task"} "${arguments[@]}")
}

choose_launcher() {
  local pmix=false
  if srun --mpi=list 2>&1 | grep -w pmix >/dev/null; then pmix=true; fi
  if [[ -z $launcher ]]; then
    if [[ $pmix == true ]]; then launcher=srun; elif has_command mpirun; then launcher=mpirun; else launcher=horovodrun; fi
  elif [[ $launcher == srun && $pmix == false ]]; then
    fail "--launcher srun: this Slurm has no PMIx (srun --mpi=list), which ranks need to connect: use mpirun"
  fi
}

# Slurm binds a rank to its --cpus-per-task. Without it, all ranks of a node share the job's cores on this node.
share_cores() {
  [[ -n ${SLURM_CPUS_PER_TASK:-} ]] || return 0
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05, srun does not inherit it from sbatch
}

# training_command: set `command`, which starts all ranks, and `started_by`, the name of the launcher.
training_command() {
  local python options=(${interface:+-i "$interface"} --module "$module" -- "${arguments[@]}")
  python=$(find_python)
  export PATH=${python%/*}:$PATH
  case $launcher in
    srun)
      started_by="srun --mpi=pmix"
      if ((${#container_command[@]} == 0)); then require_module "$python" "$module"; fi
      command=("$python" -m hvd_adam.launch.srun srun --mpi=pmix --kill-on-bad-exit=1 "${container_options[@]}")
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

# train: run the command, forward signals to it, and set `code` to its exit code.
train() {
  trap forward_signal USR1 USR2 TERM
  trap interrupt INT
  SECONDS=0
  "${command[@]}" &
  training=$!
  while kill -0 "$training" 2>/dev/null; do wait "$training" || true; done # a signal ends the wait, not the training
  code=0
  wait "$training" || code=$?
}

# forward_signal: forward Slurm's warnings (--signal, pre-emption, the end of the grace time) to the ranks as SIGUSR1,
# which means: save and stop. Before Python has started, the signal would kill a rank.
forward_signal() {
  if ((SECONDS < STARTUP_SECONDS)); then sleep $((STARTUP_SECONDS - SECONDS)); fi
  kill -USR1 "$training" 2>/dev/null || true
}

# interrupt: Ctrl-C, in a job of salloc. The ranks save a checkpoint and stop, and the job is not requeued. The command
# ignores SIGINT until its Python has started, like every background command of bash.
interrupt() {
  interrupted=true
  if ((SECONDS < 1)); then sleep 1; fi
  kill -INT "$training" 2>/dev/null || true
}

# end_job: exit with the training's code. After 75 the job is requeued, unless Slurm does so or the job was cancelled.
end_job() {
  if [[ $interrupted == true && $code != 0 ]]; then code=130; fi
  case $code in
    0 | 2 | 130) ;;
    75) requeue_job "the training has saved a checkpoint" ;;
    138 | 140 | 143) requeue_job "it was stopped before it could save a checkpoint" ;; # USR1, USR2, TERM
    *) if ! nodes_respond; then wait_for_slurm; fi ;;
  esac
  exit "$code"
}

# requeue_job REASON: requeue this job, but not the other tasks of its array. Prints what happens in every case.
requeue_job() {
  local state shown=$job
  if [[ -n ${SLURM_HET_SIZE:-} ]]; then shown+=+0; fi # its first component, where this script runs
  state=$(scontrol show job --oneliner "$shown" | grep -o ' JobState=[A-Z_]*') || state=
  state=${state#*=}
  case $state in
    RUNNING | '') ;; # without an answer, the attempt shows whether the job can be requeued
    CANCELLED) echo "Not requeueing the job, because it was cancelled; the same sbatch command with its --output-dir resumes"; return ;;
    *) echo "Not requeueing the job, because Slurm does so or has ended it: its state is $state"; return ;;
  esac
  echo "Requeueing the job: $1"
  scontrol requeue "$job" || echo "Requeueing failed: submit the job again with the same --output-dir to resume" >&2
}

nodes_respond() {
  local nodes=${SLURM_JOB_NUM_NODES:-1}
  ((nodes == 1)) || timeout "$NODE_RESPONSE_SECONDS" \
    srun --overlap --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --gpus=0 true >/dev/null 2>&1
}

# A failed node looks like a failed rank at first. A job that is requeued immediately might get the same node again.
wait_for_slurm() {
  echo "A node of the job does not respond: waiting for Slurm to detect this and to requeue the job"
  sleep "$SLURM_DETECTION_SECONDS" &
  wait $! || true
  requeue_job "Slurm has not detected the failed node"
}
