# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source this use the variables
# Sourced by build_horovod.sh and by the scripts in launch/: constants and functions that both need.

# With CDPATH, `cd` prints the folder that it finds, which would end up in $(cd FOLDER && pwd).
unset CDPATH

CACHE=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/hvd_adam # cron and systemd may set no HOME
HOROVOD_VERSION=0.28.1

# fail MESSAGE [STATUS]: print one line on stderr and exit. The default status, 2, means bad arguments or a missing
# prerequisite.
fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit "${2:-2}"
}

has_command() { command -v "$1" >/dev/null 2>&1; }

# print_usage: print the comment at the top of the calling script, which is its manual.
print_usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }
