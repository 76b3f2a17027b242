#!/usr/bin/env bash
# The long form of the tests of machines' lives: many at once, and killed at any moment.
#
#   tests/lifecycle.sh [--vms 200] [--procs 8] [--kills 200]
#
# --vms machines are created, started, used, stopped and removed by --procs processes at once;
# --kills: the process of a machine is killed so often at a random moment, and the machine started
# again from its disk. After each, lists are right and the store is whole (skerry system check, where
# there is one). Prints a line a check and ends with "N passed, M failed".
set -u
vms=200 procs=8 kills=200
while [ $# -gt 0 ]; do
  case $1 in
    --vms) vms=$2; shift 2;;
    --procs) procs=$2; shift 2;;
    --kills) kills=$2; shift 2;;
    *) echo "unknown option $1" >&2; exit 2;;
  esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
skerry=${SKERRY:-${CARGO_TARGET_DIR:-$root/target}/release/skerry}
[ -x "$skerry" ] || { echo "no $skerry: cargo build --release first" >&2; exit 2; }
work=$(mktemp -d)
export XDG_DATA_HOME=$work/data
sk() { "$skerry" "$@"; }
trap 'sk ps -aq | xargs -r "$skerry" rm -f >/dev/null 2>&1; rm -rf "$work"' EXIT
passed=0 failed=0
check() { # NAME STATUS
  if [ "$2" = 0 ]; then passed=$((passed + 1)); echo "ok      $1"
  else failed=$((failed + 1)); echo "FAILED  $1"; fi
}
# Nothing is listed as running without a process that holds its lock; images and snapshots are whole.
consistent() {
  local id pid
  while read -r id pid; do
    # Between the list and the look it may have ended: then it is no longer listed.
    kill -0 "$pid" 2>/dev/null || ! sk ps -q --no-trunc | grep -q "$id" || { echo "$id runs without $pid"; return 1; }
  done < <(sk ps --format json | tr -d ' ",' | awk -F: '$1=="id"{id=$2} $1=="pid"{print id, $2}')
  sk ps -a >/dev/null && sk images >/dev/null && sk snapshot ls >/dev/null || return 1
  if sk system check --help >/dev/null 2>&1; then sk system check >"$work/check" 2>&1 || { cat "$work/check"; return 1; }; fi
}

sk create --hypervisor soft --name seed demo true >/dev/null && sk start seed >/dev/null 2>&1 && sk wait seed >/dev/null && sk rm seed >/dev/null
check "a first machine" $?

# One machine's life, in a process of its own.
life() {
  local name=v$1 got
  sk create --hypervisor soft -m 64M --name "$name" demo sh -c 'echo $(hostname) >>/lives; sync; while :; do sleep 0.1; done' >/dev/null || return 1
  for wanted in 1 2; do
    sk start "$name" >/dev/null 2>"$work/err-$name" || { cat "$work/err-$name"; return 1; }
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      got=$(sk exec "$name" sh -c 'wc -l </lives 2>/dev/null') && [ "$got" = $wanted ] && break
      sleep 0.2
    done
    [ "$got" = $wanted ] || { echo "$name: $got lives, not $wanted"; return 1; }
    sk stop -t 0.1 "$name" >/dev/null || return 1
    [ $(($1 % 4)) = 0 ] || break
  done
  sk rm "$name" >/dev/null
}
export -f life sk; export skerry work
seq "$vms" | xargs -P "$procs" -I{} bash -c 'life {} || { echo "machine {}: failed"; exit 1; }'
check "$vms machines by $procs processes" $?
[ -z "$(sk ps -aq)" ] && [ "$(ls "$XDG_DATA_HOME/skerry/vms")" = names ] && [ -z "$(ls -A "$XDG_DATA_HOME/skerry/vms/names")" ] && [ -z "$(ls -A "$XDG_DATA_HOME/skerry/scratch")" ]
check "nothing is left of them" $?
consistent; check "consistent" $?

sk create --hypervisor soft -m 64M --name victim demo sh -c \
  'n=$(cat /n 2>/dev/null || echo 0); echo first $n; while :; do n=$((n+1)); echo $n >/n.new; sync; mv /n.new /n; sync; echo $n; done' >/dev/null
bad=0
for kill in $(seq "$kills"); do
  sk start victim >/dev/null 2>&1 &
  starter=$!
  sleep "$((RANDOM % 3)).$((RANDOM % 900 + 100))"
  # Its process leads a session: the one whose number the registry has.
  pid=$(sk inspect victim 2>/dev/null | tr -d ' ",' | awk -F: '$1=="pid"{print $2; exit}')
  sk ps -q | grep -q . && [ -n "$pid" ] && [ "$pid" != 0 ] && kill -9 "$pid" 2>/dev/null
  wait $starter
  for _ in $(seq 50); do [ -z "$(sk ps -q)" ] && break; sleep 0.05; done
  [ -z "$(sk ps -q)" ] || { echo "kill $kill: still listed"; bad=1; sk rm -f victim; break; }
  consistent || { bad=1; break; }
done
check "killed $kills times" $bad
# What was written back before it was said is there after the next start: numbers never fall.
sk logs victim | grep -v first | sort -n -c
check "no number was lost" $?
sk start victim >/dev/null 2>&1 && sk exec victim cat /n >/dev/null
check "it starts still" $?
sk rm -f victim >/dev/null
[ -z "$(sk ps -aq)" ]; check "it goes" $?
echo "$passed passed, $failed failed"
[ $failed = 0 ]
