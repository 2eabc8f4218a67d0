# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source this use the variables
# Sourced by the scripts in launch/: paths, and functions that several of them need.

# Symbolic links in the path stay as they are: on another host they may point elsewhere.
ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=${HVD_ADAM_VENV:-$ROOT/.venv}
if [[ $VENV != /* ]]; then VENV=$PWD/$VENV; fi # other hosts and folders start the same Python
# shellcheck source=hvd_adam/build_horovod/shell.sh
source "$ROOT/hvd_adam/build_horovod/shell.sh"

# require_value OPTION ARGUMENTS...: check that the option is followed by a value.
require_value() { [[ $# -ge 2 && -n $2 && $2 != -- ]] || fail "$1 needs a value; see --help"; }

# check_module NAME: check that `python -m NAME` can work; a file's path is a common slip.
check_module() {
  local name=${1#./}
  name=${name%.py}
  case $1 in
    /* | *[[:space:]]* | -* | .[!/]* | *. | *..*) ;;
    *.py) fail "--module $1: name a module, not a file: ${name//\//.}" ;;
    */*) ;;
    *) return 0 ;;
  esac
  fail "--module $1: must be the name of a Python module, as in examples.mine"
}

# require_module PYTHON NAME: exit with one line if this Python finds no such module; each rank would report it.
require_module() { "$1" "$ROOT/hvd_adam/launch/find_module.py" "$(basename "$0")" "$2" || exit $?; }

# require_home: without HOME and an entry in passwd, Open MPI crashes, and horovodrun writes to a folder "~". A home in /tmp
# would be another one on each host, so none is chosen here.
require_home() {
  [[ -n ${HOME:-} ]] || getent passwd "$EUID" >/dev/null ||
    fail "HOME is not set and user $EUID has no entry in passwd: set HOME to a folder of yours"
}

# find_python: print the absolute path of the Python that trains, so that other hosts start the same one.
find_python() {
  local path
  if [[ -n ${HVD_ADAM_PYTHON:-} ]]; then
    path=$(command -v "$HVD_ADAM_PYTHON") || fail "HVD_ADAM_PYTHON=$HVD_ADAM_PYTHON is not a program"
    printf '%s/%s\n' "$(cd "$(dirname "$path")" && pwd)" "${path##*/}"
  elif [[ -x $VENV/bin/python ]]; then
    printf '%s\n' "$VENV/bin/python"
  elif [[ -n ${HVD_ADAM_VENV:-} ]]; then
    fail "HVD_ADAM_VENV=$HVD_ADAM_VENV has no bin/python: run 'bash launch/setup.sh', which makes it, or unset the variable"
  else
    command -v python3 || fail "no python3 found: run 'bash launch/setup.sh', or set HVD_ADAM_PYTHON"
  fi
}

# count_gpus: print the number of GPUs of this machine, 0 without a driver.
count_gpus() {
  local listing=
  if has_command nvidia-smi; then listing=$(nvidia-smi --list-gpus 2>/dev/null) || listing=; fi
  grep -c '^GPU ' <<<"$listing" || true
}
