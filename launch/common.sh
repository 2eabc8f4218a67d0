# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source this use the variables
# Sourced by the scripts of this folder: where things are, and how a script stops.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${HVD_ADAM_VENV:-$ROOT/.venv}
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/hvd_adam
HOROVOD_VERSION=0.28.1

# stop MESSAGE [STATUS]: one line on stderr. Status 2, the default, means bad arguments or a missing prerequisite.
stop() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit "${2:-2}"
}

have() { command -v "$1" >/dev/null 2>&1; }

# print_usage: the comment at the top of the calling script is its manual.
print_usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# find_python: the interpreter that trains, as a full path, so that other hosts start the same one.
find_python() {
  local path
  if [[ -n ${HVD_ADAM_PYTHON:-} ]]; then
    path=$(command -v "$HVD_ADAM_PYTHON") || stop "HVD_ADAM_PYTHON=$HVD_ADAM_PYTHON is not a program"
    printf '%s/%s\n' "$(cd "$(dirname "$path")" && pwd)" "${path##*/}"
  elif [[ -x $VENV/bin/python ]]; then
    printf '%s\n' "$VENV/bin/python"
  else
    command -v python3 || stop "no python3 found: run 'bash launch/setup.sh', or set HVD_ADAM_PYTHON"
  fi
}

# count_gpus: how many GPUs this machine shows, 0 without a driver.
count_gpus() {
  local listing=
  if have nvidia-smi; then listing=$(nvidia-smi --list-gpus 2>/dev/null) || listing=; fi
  grep -c '^GPU ' <<<"$listing" || true
}
