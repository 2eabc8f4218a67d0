# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source this use the variables
# Sourced by horovodrun.sh and mpirun.sh: their common command line, and the values that follow from it.

ranks='' hosts='' hostfile='' interface='' ssh_port='' ssh_key='' controller=''
module=hvd_adam.train
dry_run=false check=true
pass_variables=() module_arguments=()

# need_value OPTION ARGUMENTS...: checks that the option is followed by a value.
need_value() { [[ $# -ge 2 && -n $2 && $2 != -- ]] || stop "$1 needs a value; see --help"; }

# parse_options ALLOWED_CONTROLLERS ARGUMENTS...
parse_options() {
  local controllers=$1
  shift
  while (($#)); do
    case $1 in
      -np | -n | --num-proc) need_value "$@"; ranks=$2; shift ;;
      -H | --hosts) need_value "$@"; hosts=$2; shift ;;
      --hostfile | -hostfile) need_value "$@"; hostfile=$2; shift ;;
      -i | --network-interface) need_value "$@"; interface=$2; shift ;;
      -x) need_value "$@"; pass_variables+=("$2"); shift ;;
      --ssh-port) need_value "$@"; ssh_port=$2; shift ;;
      --ssh-key) need_value "$@"; ssh_key=$2; shift ;;
      --module) need_value "$@"; module=$2; shift ;;
      --dry-run) dry_run=true ;;
      --no-check) check=false ;;
      -h | --help) print_usage; exit 0 ;;
      --) shift; module_arguments=("$@"); break ;;
      *) accept_controller "$controllers" "$1" ;;
    esac
    shift
  done
  check_options
}

accept_controller() {
  [[ " $1 " == *" $2 "* ]] || stop "unknown option $2; options of the training go after --, see --help"
  [[ -z $controller || $controller == "$2" ]] || stop "$controller and $2 exclude each other"
  controller=$2
}

check_options() {
  [[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || stop "-np $ranks: a number of ranks of at least 1 is needed"
  [[ -z $hosts || -z $hostfile ]] || stop "-H and --hostfile exclude each other"
  [[ -z $hosts || $hosts =~ ^[A-Za-z0-9_.-]+:[0-9]+(,[A-Za-z0-9_.-]+:[0-9]+)*$ ]] ||
    stop "-H $hosts: write it as host1:4,host2:4, each host with its number of ranks"
  [[ -z $ssh_port || $ssh_port =~ ^[0-9]+$ ]] || stop "--ssh-port $ssh_port is not a port number"
  [[ -z $ssh_key || -r $ssh_key ]] || stop "--ssh-key $ssh_key: no such readable file"
  [[ -z $hostfile ]] || read_hostfile
  export_variables
  settle_ranks
}

# read_hostfile: lines "host slots=N", blank lines and comments apart, become the value of -H, because the
# launchers disagree on what else a host file may hold.
read_hostfile() {
  [[ -r $hostfile ]] || stop "--hostfile $hostfile: no such readable file"
  local line
  while read -r line || [[ -n $line ]]; do
    line=${line%%#*}
    [[ -n ${line//[[:space:]]/} ]] || continue
    [[ $line =~ ^([A-Za-z0-9_.-]+)[[:space:]]+slots=([0-9]+)[[:space:]]*$ ]] ||
      stop "--hostfile $hostfile: '$line' is not of the form 'host slots=4'"
    hosts+=${hosts:+,}${BASH_REMATCH[1]}:${BASH_REMATCH[2]}
  done <"$hostfile"
  [[ -n $hosts ]] || stop "--hostfile $hostfile names no host"
}

# export_variables: -x NAME=VALUE sets the variable here, -x NAME takes the one that is set; both reach all ranks.
export_variables() {
  local variable name
  for variable in "${pass_variables[@]}"; do
    name=${variable%%=*}
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || stop "-x $variable: '$name' is not a variable's name"
    if [[ $variable == *=* ]]; then export "$name=${variable#*=}"; fi
    [[ -n ${!name+set} ]] || stop "-x $name: no such variable is set here"
  done
}

# settle_ranks: as many ranks as the hosts offer; on this machine alone, one a GPU, or one.
settle_ranks() {
  local host slots=0
  for host in ${hosts//,/ }; do slots=$((slots + 10#${host##*:})); done
  if [[ -z $hosts ]]; then
    [[ -n $ranks ]] || ranks=$(count_gpus)
    ((ranks > 0)) || ranks=1
  else
    ranks=${ranks:-$slots}
    ((ranks <= slots)) || stop "-np $ranks: the hosts offer $slots (${hosts})"
    ((ranks > 0)) || stop "-H $hosts offers no rank"
  fi
}

# check_hosts PYTHON: ends with one line where a host does not let us in, or has not the software that is here. A launcher
# would say so in many words, or start ranks that fail.
check_hosts() {
  if [[ -z $hosts || $dry_run == true || $check == false || -n ${OMPI_MCA_plm_rsh_agent:-} ]]; then return; fi
  "$1" -m hvd_adam.doctor.hosts --hosts "$hosts" ${ssh_port:+--ssh-port "$ssh_port"} ${ssh_key:+--ssh-key "$ssh_key"} ||
    exit $?
}

# launch PYTHON COMMAND...: becomes the command, so that signals and the exit code are its own. Where they repeat
# what a rank has said itself (exit codes 2 and 75), the filter takes that repetition out of stderr.
launch() {
  local python=$1
  shift
  if [[ $dry_run == true ]]; then
    printf '%q ' "$@" | sed 's/ $/\n/'
    exit 0
  fi
  exec "$@" 2> >(exec "$python" -I "$ROOT/launch/filter_stderr.py" >&2)
}
