#!/usr/bin/env bash
# restart.sh TIMES COMMAND...: run COMMAND, and again when it fails, at most TIMES more.
#
# Not when it is done (0), the user's input is wrong (2), or it stopped as it was asked to (75, or 130 by Ctrl-C): then it exits with
# that code, and whoever asked starts it again. SIGTERM and SIGUSR1 are passed on; SIGTERM ends the restarts, too.
set -u
left=$1
shift
stopped=
trap 'stopped=yes; kill -TERM "$child" 2>/dev/null' TERM
trap 'kill -USR1 "$child" 2>/dev/null' USR1
while true; do
  "$@" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done # which a signal ends before the child does
  wait "$child"
  code=$?
  case $code in 0 | 2 | 75 | 130) exit "$code" ;; esac
  if [ -n "$stopped" ] || [ "$left" -le 0 ]; then exit "$code"; fi
  left=$((left - 1))
  echo "restart.sh: exit code $code; starting again, $left times left" >&2
done
