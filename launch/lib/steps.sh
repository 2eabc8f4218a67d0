# shellcheck shell=bash
# Sourced by setup.sh: runs long steps with a log and progress messages, and prints the end of the log if a step fails.

step_log='' # log of the current or the last step

# run_step NAME MESSAGE COMMAND...: run the command with its output in NAME.log. On a terminal, one line counts the
# seconds; otherwise a line is printed at the start, every 30 seconds, and at the end.
run_step() {
  local name=$1 message=$2 status=0
  shift 2
  step_log=$VENV/log/$name.log
  mkdir -p "$VENV/log"
  SECONDS=0
  [[ -t 1 ]] || echo "$message ..."
  # A process group of its own, so that an interrupted set-up also ends the compilers.
  set -m
  "$@" >"$step_log" 2>&1 </dev/null &
  step_group=$!
  set +m
  watch_step "$message"
  wait "$step_group" || status=$?
  step_group=
  end_step "$message" "$status"
}

# watch_step MESSAGE: print progress until the step has ended.
watch_step() {
  local pause=30 next
  if [[ -t 1 ]]; then pause=1; fi
  next=$pause
  while kill -0 "$step_group" 2>/dev/null; do
    if ((SECONDS >= next)); then
      if [[ -t 1 ]]; then printf '\r%s ... %d s' "$1" "$SECONDS"; else echo "  still running after $SECONDS s"; fi
      next=$((SECONDS + pause))
    fi
    sleep 0.1
  done
}

end_step() {
  if [[ -t 1 ]]; then printf '\r%s ... ' "$1"; else printf '  '; fi
  if (($2 == 0)); then
    echo "done in $SECONDS s"
    return
  fi
  echo "FAILED after $SECONDS s"
  {
    tail -n 20 "$step_log" | sed 's/^/  | /'
    echo "$(basename "$0"): this step failed: $1. Full log: $step_log"
  } >&2
  exit 1
}

# stop_step: end all processes of the running step when the set-up itself is stopped.
stop_step() { [[ -z $step_group ]] || kill -TERM -- "-$step_group" 2>/dev/null || true; }
step_group=''
trap stop_step EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
