# shellcheck shell=bash
# Sourced by setup.sh: runs long steps with a log, a sign of life, and the log's end where one fails.

step_log='' # log of the step that runs, or ran last

# step NAME MESSAGE COMMAND...: runs the command with its output in the log NAME.log. On a terminal one line counts the
# seconds; elsewhere there is a line at the start, every half minute, and at the end.
step() {
  local name=$1 message=$2 status=0
  shift 2
  step_log=$VENV/log/$name.log
  mkdir -p "$VENV/log"
  SECONDS=0
  [[ -t 1 ]] || echo "$message ..."
  # A process group of its own, so that an interrupted set-up takes the compilers with it.
  set -m
  "$@" >"$step_log" 2>&1 </dev/null &
  step_group=$!
  set +m
  watch_step "$message"
  wait "$step_group" || status=$?
  step_group=
  end_step "$message" "$status"
}

# watch_step MESSAGE: a sign of life until the step has ended.
watch_step() {
  local pause=30 next
  if [[ -t 1 ]]; then pause=1; fi
  next=$pause
  while kill -0 "$step_group" 2>/dev/null; do
    if ((SECONDS >= next)); then
      if [[ -t 1 ]]; then printf '\r%s ... %d s' "$1" "$SECONDS"; else echo "  still at it after $SECONDS s"; fi
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
    echo "$(basename "$0"): this step failed: $1. The whole log: $step_log"
  } >&2
  exit 1
}

# Ends what the running step started, when the set-up itself is stopped.
stop_step() { [[ -z $step_group ]] || kill -TERM -- "-$step_group" 2>/dev/null || true; }
step_group=''
trap stop_step EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
