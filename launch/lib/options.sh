# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source this use the variables
# Sourced by horovodrun.sh, mpirun.sh and elastic.sh: their common options, and the values derived from them.

ranks='' hosts='' hostfile='' interface='' ssh_port='' ssh_key='' controller=''
module=hvd_adam.train
dry_run=false check=true
MOST_SLOTS=999999 # of ranks and slots: mpirun takes all memory for huge numbers, and larger ones overflow
pass_variables=() module_arguments=()

# parse_options ALLOWED_CONTROLLERS ARGUMENTS...
parse_options() {
  local controllers=$1
  shift
  while (($#)); do
    case $1 in
      -np | -n | --num-proc) require_value "$@"; ranks=$2; shift ;;
      -H | --hosts) require_value "$@"; hosts=$2; shift ;;
      --hostfile | -hostfile) require_value "$@"; hostfile=$2; shift ;;
      -i | --network-interface) require_value "$@"; interface=$2; shift ;;
      -x) require_value "$@"; pass_variables+=("$2"); shift ;;
      --ssh-port) require_value "$@"; ssh_port=$2; shift ;;
      --ssh-key) require_value "$@"; ssh_key=$2; shift ;;
      --module) require_value "$@"; module=$2; shift ;;
      --dry-run) dry_run=true ;;
      --no-check) check=false ;;
      -h | --help) print_usage; exit 0 ;;
      --) shift; module_arguments=("$@"); break ;;
      *) accept_controller "$controllers" "$1" ;;
    esac
    shift
  done
  hide_tune
  check_options
}

# hide_tune: write --tune VALUE of the module as --tune=VALUE. Open MPI's mpirun takes the former for an option of its
# own, wherever it is, and reports that there is no file VALUE.
hide_tune() {
  local i
  for ((i = 0; i + 1 < ${#module_arguments[@]}; i++)); do
    if [[ ${module_arguments[i]} == --tune ]]; then
      module_arguments=("${module_arguments[@]:0:i}" "--tune=${module_arguments[i + 1]}" "${module_arguments[@]:i + 2}")
    fi
  done
}

accept_controller() {
  [[ " $1 " == *" $2 "* ]] || fail "unknown option $2; options of the training go after --, see --help"
  [[ -z $controller || $controller == "$2" ]] || fail "$controller and $2 exclude each other"
  controller=$2
}

# require_positive OPTION VALUE
require_positive() {
  [[ ${2:-} =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1 ${2:-}: must be a whole number from 1 to $MOST_SLOTS"
}

check_options() {
  require_home
  if [[ -n $ranks ]]; then require_positive -np "$ranks"; fi
  [[ -z $hosts || -z $hostfile ]] || fail "-H and --hostfile exclude each other"
  [[ -z $hosts || $hosts =~ ^[A-Za-z0-9_.-]+:[0-9]+(,[A-Za-z0-9_.-]+:[0-9]+)*$ ]] ||
    fail "-H $hosts: must have the form host1:4,host2:4, each host with its number of ranks"
  [[ -z $ssh_port || $ssh_port =~ ^[1-9][0-9]{0,4}$ && $ssh_port -le 65535 ]] ||
    fail "--ssh-port $ssh_port: must be a port number from 1 to 65535"
  [[ -z $ssh_key || -f $ssh_key && -r $ssh_key ]] || fail "--ssh-key $ssh_key: no such readable file"
  check_module "$module"
  [[ -z $hostfile ]] || read_hostfile
  name_hosts_once
  export_variables
  set_rank_count
}

# read_hostfile: convert the lines "host slots=N" to the value of -H, because the launchers disagree on the format of a
# host file. Blank lines and comments are skipped.
read_hostfile() {
  [[ -r $hostfile && ! -d $hostfile ]] || fail "--hostfile $hostfile: no such readable file"
  local line
  while read -r line || [[ -n $line ]]; do
    line=${line%%#*}
    [[ -n ${line//[[:space:]]/} ]] || continue
    [[ $line =~ ^([A-Za-z0-9_.-]+)[[:space:]]+slots=([0-9]+)[[:space:]]*$ ]] ||
      fail "--hostfile $hostfile: '$line' is not of the form 'host slots=4'"
    hosts+=${hosts:+,}${BASH_REMATCH[1]}:${BASH_REMATCH[2]}
  done <"$hostfile"
  [[ -n $hosts ]] || fail "--hostfile $hostfile names no host"
}

# name_hosts_once: add up the slots of a host that is named several times, as in the node file of PBS. horovodrun
# with Gloo would fail, and an elastic one wait for ever.
name_hosts_once() {
  local host name names=() source=-H
  if [[ -n $hostfile ]]; then source="--hostfile $hostfile"; fi
  local -A slots_of=()
  for host in ${hosts//,/ }; do
    name=${host%%:*}
    [[ ${host##*:} =~ ^0*[0-9]{1,6}$ ]] ||
      fail "$source: host $name has ${host##*:} slots: use at most $MOST_SLOTS"
    [[ -n ${slots_of[$name]:-} ]] || names+=("$name")
    slots_of[$name]=$((${slots_of[$name]:-0} + 10#${host##*:}))
  done
  hosts=
  for name in "${names[@]}"; do hosts+=${hosts:+,}$name:${slots_of[$name]}; done
}

# export_variables: -x NAME=VALUE sets the variable, -x NAME passes on the current value; both reach all ranks.
export_variables() {
  local variable name
  for variable in "${pass_variables[@]}"; do
    name=${variable%%=*}
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "-x $variable: '$name' is not a valid variable name"
    if [[ $variable == *=* ]]; then export "$name=${variable#*=}"; fi
    [[ -n ${!name+set} ]] || fail "-x $name: this variable is not set"
  done
}

# default_rank_count: print the number of ranks without -np and hosts; 0 if nothing gives one.
default_rank_count() { count_gpus; }

# set_rank_count: by default one rank per slot of the hosts; on this machine one per GPU, or one.
set_rank_count() {
  local host slots=0
  for host in ${hosts//,/ }; do slots=$((slots + 10#${host##*:})); done
  if [[ -z $hosts ]]; then
    [[ -n $ranks ]] || ranks=$(default_rank_count)
    if ((ranks == 0)); then
      ranks=1
      echo "$(basename "$0"): starting one rank, because this machine has no GPU; use -np N for more" >&2
    fi
  else
    ((slots <= MOST_SLOTS)) || fail "the hosts have $slots slots: use at most $MOST_SLOTS"
    ranks=${ranks:-$slots}
    ((ranks <= slots)) || fail "-np $ranks: the hosts have only $slots slot(s) (${hosts})"
    ((ranks > 0)) || fail "-H $hosts has no slots"
  fi
}

# check_hosts PYTHON: exit with one line if SSH login fails on a host or if its software differs from this machine's.
# Launchers report this in many lines, or start ranks that fail.
check_hosts() {
  if [[ -z $hosts || $dry_run == true || $check == false || -n ${OMPI_MCA_plm_rsh_agent:-} ]]; then return; fi
  require_module "$1" hvd_adam.doctor.hosts
  "$1" -m hvd_adam.doctor.hosts --hosts "$hosts" ${ssh_port:+--ssh-port "$ssh_port"} ${ssh_key:+--ssh-key "$ssh_key"} ||
    exit $?
}

# ranks_run_here: whether this machine is one of the hosts. Other hosts may have other network interfaces.
ranks_run_here() {
  if [[ -n $hosts ]]; then
    [[ ,$hosts =~ ,(localhost|127\.0\.0\.1): || ,$hosts == *",$HOSTNAME:"* ]]
  else
    [[ -z ${SLURM_JOB_ID:-} || -n ${SLURMD_NODENAME:-} ]] # in an allocation: on a node, not where salloc was called
  fi
}

# exec_launcher PYTHON COMMAND...: replace this process by the command, so that signals and the exit code are the
# command's. After exit codes 2 and 75 the filter removes what only repeats a rank's own message from stderr.
exec_launcher() {
  local python=$1
  shift
  if [[ $dry_run == true ]]; then
    printf '%q ' "$@" | sed 's/ $/\n/'
    exit 0
  fi
  if [[ $check == true ]] && ranks_run_here; then require_module "$python" "$module"; fi
  exec "$@" 2> >(exec "$python" -I "$ROOT/hvd_adam/launch/stderr_filter.py" >&2)
}
