#!/usr/bin/env bash
# The long form of the tests of snapshots, restores and forks: many clones, many cycles, kills at any
# moment, and a database's log under load. Everything on the software processor.
#
#   tests/clones.sh                                              short, for CI: under a minute
#   tests/clones.sh --clones 500 --unique 1000 --cycles 10000 --runs 500 --kills 200 --wal 100
#
#   --clones N   N children of one machine at once, each answering; memory before, with them, after
#   --unique N   N clones of one snapshot in batches: no random number, UUID, boot or machine id, or
#                clone id twice, neither in new processes nor in one that was drawing all the time
#   --cycles N   N times restore, run, end in one process (bench-cycles): nothing is left
#   --runs N     N times `run --from-snapshot` by the command line: nothing is left
#   --kills N    kill -9 of the machine's process or of the command at N moments of
#                `snapshot create`: the snapshot is absent or whole, and nothing is left
#   --wal N      N live snapshots of a guest that writes a write-ahead log, each restored: the log has
#                every record that was acknowledged, also when its process is killed and what is
#                cached dropped, and goes on
#
# 0 leaves a part out. SKERRY names the program (default: the release build; bench-cycles lies beside
# it), SKERRY_TEST_SOFT_MODE a mode of the software processor (--soft-mode). Prints a line a check and
# ends with "N passed, M failed".
set -u
clones=20 unique=20 cycles=60 runs=10 kills=8 wal=4
while [ $# -gt 0 ]; do
  case $1 in
    --clones|--unique|--cycles|--runs|--kills|--wal) declare "${1#--}=$2"; shift 2;;
    *) echo "unknown option $1" >&2; exit 2;;
  esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
skerry=${SKERRY:-${CARGO_TARGET_DIR:-$root/target}/release/skerry}
[ -x "$skerry" ] || { echo "no $skerry: cargo build --release first" >&2; exit 2; }
work=$(mktemp -d)
export XDG_DATA_HOME=$work/data
store=$XDG_DATA_HOME/skerry/snapshots
soft=(--hypervisor soft ${SKERRY_TEST_SOFT_MODE:+--soft-mode "$SKERRY_TEST_SOFT_MODE"})
RANDOM=${SEED:-1}
clean() {
  "$skerry" ps -q --no-trunc | xargs -r "$skerry" rm -f >/dev/null 2>&1
  rm -rf "$work"
}
trap clean EXIT
trap 'exit 130' INT TERM

passed=0 failed=0
check() { # NAME STATUS
  if [ "$2" = 0 ]; then passed=$((passed + 1)); echo "ok      $1"
  else failed=$((failed + 1)); echo "FAILED  $1"; fi
}
mib() { awk '/^MemAvailable/{print int($2 / 1024)}' /proc/meminfo; }
now() { date +%s%N; }
since() { # BEGUN, in seconds
  awk -v ns=$(($(now) - $1)) 'BEGIN { printf "%.1f", ns / 1e9 }'
}
# Field of a machine in `ps`.
field() { # NAME FIELD
  "$skerry" ps -a --format json --no-trunc | awk -v name="\"name\": \"$1\"," -v field="\"$2\":" '
    index($0, name) { found = 1 } found && $1 == field { gsub(/[",]/, "", $2); print $2; exit }'
}
same_as_before() { # WHAT: scratch files, machines, processes
  for _ in $(seq 100); do
    left=$(ls -A "$XDG_DATA_HOME/skerry/scratch" | wc -l)
    vms=$(ls -A "$XDG_DATA_HOME/skerry/vms" | grep -cv '^names$')
    [ "$left" = 0 ] && [ "$vms" = 0 ] && [ "$(hosts)" = "$hosts_before" ] && break
    sleep 0.1
  done
  [ "$left" = 0 ] && [ "$vms" = 0 ] && [ "$(hosts)" = "$hosts_before" ]; status=$?
  check "$1: no machine, process or scratch file is left ($vms, $(($(hosts) - hosts_before)), $left)" "$status"
}
# Processes of this program, as Linux has it: by the file that they run.
hosts() { find /proc -maxdepth 2 -name exe -lname "$(readlink -f "$skerry")" 2>/dev/null | wc -l; }
hosts_before=$(hosts)

# The demo image is converted and its start kept here, once.
"$skerry" run "${soft[@]}" demo true || { echo "skerry can't run demo" >&2; exit 1; }

# Memory of a machine's process, its share of what is shared included: the mean of all that run, in KiB.
pss() {
  "$skerry" ps --format json | awk '$1 == "\"pid\":" { print "/proc/" $2 + 0 "/smaps_rollup" }' |
    xargs awk '/^Pss:/ { sum += $2; n++ } END { printf "%d", sum / n }'
}

part_clones() {
  "$skerry" run -d "${soft[@]}" --name base demo sleep 100000 >/dev/null
  before=$(mib) begun=$(now)
  "$skerry" fork --count "$clones" --name clone --rm base > "$work/ids"
  [ "$(wc -l < "$work/ids")" = "$clones" ]; status=$?
  check "$clones children at once in $(since "$begun") s" "$status"
  sleep 2
  idle=$(pss)
  begun=$(now)
  answers=$(xargs -P 4 -I{} "$skerry" exec {} sh -c 'echo $((6 * 7))' < "$work/ids" | grep -c '^42$')
  [ "$answers" = "$clones" ]; status=$?
  check "$answers of $clones answer, in $(since "$begun") s" "$status"
  during=$(mib)
  [ "$during" -gt 1024 ]; status=$?
  check "memory available: $before MiB before, $during MiB with them; PSS of each $idle KiB idle, $(pss) KiB after that" "$status"
  begun=$(now)
  xargs "$skerry" rm -f < "$work/ids" >/dev/null; status=$?
  check "all removed in $(since "$begun") s" "$status"
  "$skerry" rm -f base >/dev/null
  same_as_before "children"
  after=$(mib)
  # Others use the machine too.
  [ $((before - after)) -lt 1024 ]
  check "memory available: $after MiB after" $?
}

draws='cd /run/skerry; n=0; { read g; read first; } <clone; while [ $n -lt 60 ]; do
  { read g; read a; } <clone; read u </proc/sys/kernel/random/uuid; { read g; read b; } <clone
  echo "drawn ${a#id } ${b#id } $u"; [ "$a" = "$first" ] || n=$((n+1)); done; exec sleep 100000'
finds='cd /proc/sys/kernel/random; echo "uuid $(cat uuid)"; echo "boot $(cat boot_id)"
  echo "machine $(cat /etc/machine-id)"; echo "random $(head -c 16 /dev/urandom | od -An -tx1 | tr -d " ")"
  echo "clone $(sed -n "s/^id //p" /run/skerry/clone)"; echo "time $(date +%s)"'
look() { # NAME: what a new process finds there, then what the old one drew
  "$skerry" exec "$1" sh -c "$finds" > "$work/found/$1"
  for _ in $(seq 100); do
    [ "$("$skerry" logs "$1" 2>/dev/null | wc -l)" -ge 60 ] && break
    sleep 0.1
  done
  "$skerry" logs "$1" >> "$work/found/$1"
}
export -f look; export skerry work finds

part_unique() {
  "$skerry" run -d "${soft[@]}" --name base demo sh -c "$draws" >/dev/null
  "$skerry" exec base sh -c 'echo 0123456789abcdef0123456789abcdef > /etc/machine-id'
  sleep 0.5
  "$skerry" snapshot create base unique >/dev/null
  "$skerry" rm -f base >/dev/null
  mkdir "$work/found"
  begun=$(now) first=1 clock=$(date +%s)
  while [ "$first" -le "$unique" ]; do
    last=$((first + 49)); [ "$last" -gt "$unique" ] && last=$unique
    seq "$first" "$last" | xargs -P 4 -I{} "$skerry" restore -d "${soft[@]}" --rm --name u{} unique >/dev/null
    seq "$first" "$last" | xargs -P 4 -I{} bash -c 'look u{}'
    seq "$first" "$last" | sed 's/^/u/' | xargs "$skerry" rm -f >/dev/null
    first=$((last + 1))
  done
  took=$(since "$begun")
  count=$(cat "$work"/found/* | grep -c '^clone ................................$')
  [ "$count" = "$unique" ]; check "$count clones of one snapshot in $took s" $?
  for kind in uuid boot machine random clone; do
    all=$(cat "$work"/found/* | grep "^$kind ." | sort | uniq | wc -l)
    [ "$all" = "$unique" ]; check "$kind: $all different of $unique" $?
  done
  late=$(cat "$work"/found/* | awk -v clock="$clock" '$1 == "time" && $2 < clock' | wc -l)
  [ "$late" = 0 ]; check "the time of day is now: $late wrong" $?
  # Of one's own: both identities are the clone's. At most one was on its way when it was taken.
  for file in "$work"/found/*; do
    awk '$1 == "clone" { id = $2 } $1 == "drawn" && NF == 4 { if ($2 == id && $3 == id) print "own", $4; else print "before" }' "$file" > "$file.drawn"
    [ "$(grep -c before "$file.drawn")" -le 1 ] && [ "$(grep -c own "$file.drawn")" -ge 59 ] || echo "$file"
  done > "$work/early"
  [ ! -s "$work/early" ]; status=$?
  check "no old process drew before its clone was one of its own: $(wc -l < "$work/early") did" "$status"
  drawn=$(cat "$work"/found/*.drawn | grep -c own) twice=$(cat "$work"/found/*.drawn | grep own | sort | uniq -d | wc -l)
  [ "$twice" = 0 ]; check "$drawn numbers drawn by old processes: $twice twice" $?
  "$skerry" snapshot rm unique >/dev/null
  same_as_before "unique clones"
}

part_cycles() {
  bench=$(dirname "$skerry")/bench-cycles
  if [ ! -x "$bench" ]; then
    echo "left out: $cycles cycles in one process (no $bench: cargo build --release -p skerry-benches)"
    return
  fi
  "$bench" --cycles "$cycles" > "$work/cycles" 2>&1
  status=$?
  sed 's/^/        /' "$work/cycles"
  check "$cycles cycles in one process" "$status"
}

part_runs() {
  "$skerry" run -d "${soft[@]}" --name base demo sleep 100000 >/dev/null
  "$skerry" snapshot create base runs >/dev/null
  "$skerry" rm -f base >/dev/null
  before=$(mib) size=$(du -s --apparent-size "$XDG_DATA_HOME" | cut -f1) good=0 begun=$(now)
  for n in $(seq "$runs"); do
    [ "$("$skerry" run "${soft[@]}" --from-snapshot runs echo "run $n" 2>&1)" = "run $n" ] && good=$((good + 1))
  done
  [ "$good" = "$runs" ]; status=$?
  check "$good of $runs restores by the command line, in $(since "$begun") s" "$status"
  same_as_before "restores"
  grown=$(($(du -s --apparent-size "$XDG_DATA_HOME" | cut -f1) - size)) after=$(mib)
  [ "$grown" -lt 64 ]; check "everything kept has grown by $grown KiB" $?
  [ $((before - after)) -lt 1024 ]; check "memory available: $before MiB before, $after MiB after" $?
  "$skerry" snapshot rm runs >/dev/null
}

# Names of what is in the store, whole or not.
stored() { ls -A "$store" | grep -v '^\.lock$\|^names.json$' | sort; }

part_kills() {
  load='i=0; while :; do i=$((i+1)); echo $i > /n; mv /n /count; head -c 200000 /dev/urandom > /dev/shm/x; cp /dev/shm/x /file; done'
  "$skerry" run -d "${soft[@]}" --name base demo sh -c "$load" >/dev/null
  sleep 0.5
  "$skerry" snapshot create base kills >/dev/null
  "$skerry" rm -f base >/dev/null
  known=$(stored)
  "$skerry" restore -d "${soft[@]}" --name victim kills >/dev/null
  # How long one takes, so that the kills fall all over it and a little behind.
  begun=$(now)
  for _ in 1 2 3; do "$skerry" snapshot create victim probe >/dev/null; done
  span=$((($(now) - begun) / 3 * 13 / 10))
  "$skerry" snapshot ls -q | while read -r id; do
    [[ $known == *"${id#sha256:}"* ]] || "$skerry" snapshot rm "$id" >/dev/null
  done
  absent=0 whole=0 broken=0 begun=$(now)
  for n in $(seq "$kills"); do
    pid=$(field victim pid) difference=()
    [ $((n % 4)) -lt 2 ] && difference=(--diff)
    "$skerry" snapshot create "${difference[@]}" victim "kill-$n" >/dev/null 2>&1 &
    command=$!
    sleep "$(awk -v span="$span" -v part="$((RANDOM * 32768 + RANDOM))" 'BEGIN { printf "%.6f", span / 1e9 * part / 1073741824 }')"
    if [ $((n % 2)) = 0 ]; then kill -9 "$pid"; else kill -9 "$command" 2>/dev/null; fi
    wait "$command" 2>/dev/null
    if [ $((n % 2)) = 0 ]; then
      "$skerry" rm -f victim >/dev/null
    else
      # The machine's process may be at it yet.
      for _ in $(seq 200); do ls -l "/proc/$pid/fd" | grep -q "$store/.new-" || break; sleep 0.05; done
      "$skerry" exec victim true || echo "the machine doesn't answer after kill $n"
    fi
    found=0
    for id in $("$skerry" snapshot ls -q 2>"$work/damaged"); do
      [[ $known == *"${id#sha256:}"* ]] && continue
      found=$((found + 1))
      if "$skerry" snapshot inspect "$id" >/dev/null && "$skerry" restore -d "${soft[@]}" --name whole "$id" >/dev/null &&
        [ -n "$("$skerry" exec whole cat /count)" ]; then whole=$((whole + 1)); else broken=$((broken + 1)); fi
      "$skerry" rm -f whole >/dev/null 2>&1
      "$skerry" snapshot rm "$id" >/dev/null
    done
    [ "$found" = 0 ] && absent=$((absent + 1))
    if [ -s "$work/damaged" ]; then broken=$((broken + 1)); cat "$work/damaged"; fi
    [ $((n % 2)) = 0 ] && "$skerry" restore -d "${soft[@]}" --name victim kills >/dev/null
  done
  # One whose command was killed early may appear a round later.
  [ "$broken" = 0 ] && [ $((absent + whole)) -ge "$kills" ]; status=$?
  check "$kills kills within $((span / 1000000)) ms of a snapshot: $absent times none, $whole whole ones, $broken broken, in $(since "$begun") s" "$status"
  "$skerry" rm -f victim >/dev/null
  # A kept start goes where nothing is a difference to it.
  "$skerry" snapshot prune >/dev/null 2>&1
  [ -z "$(comm -13 <(echo "$known") <(stored))" ]; check "nothing of them is left in the store" $?
  "$skerry" snapshot inspect kills >/dev/null; check "what was there is whole" $?
  "$skerry" snapshot rm kills >/dev/null
  same_as_before "kills"
}

part_wal() {
  rustc -O --edition 2024 -C target-feature=+crt-static -C relocation-model=static -o "$work/wal" "$root/tests/guests/wal.rs" ||
    { check "the guest program is built" 1; return; }
  "$skerry" run -d "${soft[@]}" --name db demo sh -c \
    'until [ -x /wal ]; do sleep 0.05; done; while :; do /wal write /db.log; done' >/dev/null
  "$skerry" exec -i db sh -c 'cat > /wal.new; chmod +x /wal.new; mv /wal.new /wal' < "$work/wal"
  # From the file itself: it has very many lines.
  last() { tail -n 1 "$XDG_DATA_HOME/skerry/vms/names/$1/log" 2>/dev/null | sed -n 's/.*"text":"\([0-9]*\).*/\1/p'; }
  until [ -n "$(last db)" ]; do sleep 0.05; done
  begun=$(now) lost=0 stuck=0 gaps=0 pauses=() records=0
  for n in $(seq "$wal"); do
    # A chain of nine differences to each full one.
    difference=(); [ $((n % 10)) != 1 ] && difference=(--diff)
    before=$(last db)
    pauses+=("$("$skerry" snapshot create --format json "${difference[@]}" db "wal-$n" | awk '$1 == "\"pause_us\":" { print $2 + 0 }')")
    "$skerry" restore -d "${soft[@]}" --name clone "wal-$n" >/dev/null
    # By what it is in memory, while it goes on.
    kept=$("$skerry" exec clone /wal check /db.log 2>>"$work/wal.errors")
    [ "${kept:-0}" -ge "$before" ] || { lost=$((lost + 1)); echo "wal-$n: $before acknowledged, log has ${kept:-nothing}"; }
    # Killed in the middle, and replayed by the one that takes its place.
    "$skerry" exec clone sh -c 'kill -9 $(pidof wal)'
    here=$(last clone)
    for _ in $(seq 100); do [ "$(last clone)" -gt "$((${here:-0} + 3))" ] 2>/dev/null && break; sleep 0.05; done
    # By what the disk has: stopped, and read again.
    "$skerry" exec clone sh -c 'kill -STOP $(pidof wal)'
    sleep 0.05
    here=$(last clone)
    kept=$("$skerry" exec clone sh -c 'echo 3 > /proc/sys/vm/drop_caches; /wal check /db.log' 2>>"$work/wal.errors")
    { [ "${kept:-0}" -ge "${here:-0}" ] && [ -n "$here" ]; } || { lost=$((lost + 1)); echo "wal-$n: clone acknowledged $here, disk has ${kept:-nothing}"; }
    "$skerry" exec clone sh -c 'kill -CONT $(pidof wal)'
    for _ in $(seq 100); do [ "$(last clone)" -gt "$here" ] 2>/dev/null && break; sleep 0.05; done
    [ "$(last clone)" -gt "$here" ] || { stuck=$((stuck + 1)); echo "wal-$n: stands still at $here"; }
    # One number may lack where the process was killed: on the disk, and not yet said.
    "$skerry" logs clone 2>/dev/null | awk 'NR > 1 && $1 != p + 1 { if ($1 != p + 2 || n++) bad = 1 } { p = $1 } END { exit bad }' || { gaps=$((gaps + 1)); echo "wal-$n: gaps"; }
    first=$("$skerry" logs clone 2>/dev/null | sed -n 1p)
    [ "${first:-0}" -gt "$before" ] || { gaps=$((gaps + 1)); echo "wal-$n: went on at $first, before $before"; }
    "$skerry" rm -f clone >/dev/null
    [ $((n % 10)) = 0 ] || [ "$n" = "$wal" ] && for old in $(seq "$n" -1 1); do
      "$skerry" snapshot inspect "wal-$old" >/dev/null 2>&1 || break
      # The newest is what the next could be a difference to; a full one comes next.
      "$skerry" snapshot rm "wal-$old" >/dev/null
    done
  done
  took=$(since "$begun") records=$(last db)
  [ "$lost" = 0 ] || tail -n 5 "$work/wal.errors"
  [ "$lost" = 0 ]; check "$wal live snapshots of a log of $records records, in $took s: $lost lost something" $?
  [ "$stuck" = 0 ]; check "each clone went on writing: $stuck did not" $?
  [ "$gaps" = 0 ]; check "what each acknowledged went on from there: $gaps did not" $?
  kept=$("$skerry" exec db sh -c 'kill -STOP $(pidof wal); echo 3 > /proc/sys/vm/drop_caches; /wal check /db.log' 2>>"$work/wal.errors")
  [ "${kept:-0}" -ge "$records" ]; check "the parent has all $records: $kept" $?
  "$skerry" logs db | awk 'NR > 1 && $1 != p + 1 { bad = 1 } { p = $1 } END { exit bad }'
  check "and said each once" $?
  middle=$(printf '%s\n' "${pauses[@]}" | sort -n | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)], a[NR] }')
  check "pause under load in µs, median and longest: $middle" 0
  "$skerry" rm -f db >/dev/null
  same_as_before "log"
}

for part in clones unique cycles runs kills wal; do
  [ "${!part}" = 0 ] || { begun_part=$(now); "part_$part"; echo "        ($part: $(since "$begun_part") s)"; }
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
