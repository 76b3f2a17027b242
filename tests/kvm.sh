#!/bin/sh
# What a machine's process is on KVM: confined, small, with its memory given back, with network,
# volume and folder at work. For a host with KVM, or the KVM test bed; needs nothing but busybox there.
#
#   tests/kvm.sh [--hypervisor kvm] [--own KIB] [--forbidden PROGRAM]
#
# --own: the most memory of the process beside its guest's, in KiB (6144); --forbidden: the test program of
# that name (cargo test --release -p skerry-confine --no-run), which tries what each role of threads is kept from.
# SKERRY names the program. Prints a line a check and ends with "N passed, M failed".
set -u
hypervisor=kvm own=6144 forbidden=
while [ $# -gt 0 ]; do
  case $1 in
    --hypervisor) hypervisor=$2; shift 2;;
    --own) own=$2; shift 2;;
    --forbidden) forbidden=$2; shift 2;;
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
process() { sk inspect --sample 10ms "$1" | tr -d ' ,"' | sed -n 's/^pid://p' | head -n 1; }
# KiB of private pages beside the guest's memory. That ends where the last piece of its file does (the kernel's
# own tables are at the top, so that is never given back), and has no other mappings in between.
beside() {
  awk -v memory="$((512 << 20))" '
    function number(hex, n, i) {
      n = 0
      for (i = 1; i <= length(hex); i++) n = n * 16 + index("0123456789abcdef", substr(hex, i, 1)) - 1
      return n
    }
    $1 ~ /^[0-9a-f]+-[0-9a-f]+$/ {
      split($1, range, "-"); count++; first[count] = number(range[1])
      if (/\/snapshots\/|\/memfd:skerry-memory/) end = number(range[2])
    }
    $1 == "Private_Dirty:" { dirty[count] = $2 }
    END {
      for (i = 1; i <= count; i++) if (first[i] < end - memory || first[i] >= end) own += dirty[i]
      print end ? own + 0 : 0
    }' "/proc/$1/smaps"
}
anonymous() { awk '$1 == "Anonymous:" { print int($2 / 1024) }' "/proc/$1/smaps_rollup"; }

sk doctor | tee "$work/doctor"
# What this host's kernel has; strict asks for all of it.
confine=strict
grep -q '^  no ' "$work/doctor" && confine=auto
sk run --hypervisor "$hypervisor" -m 512M --confine $confine demo true
check "a command, --confine $confine" $?
mkdir "$work/folder"
echo from-the-host >"$work/folder/in"
sk run -d --name a --hypervisor "$hypervisor" -m 512M --confine $confine -p 127.0.0.1:18080:80 \
  -v data:/volume -v "$work/folder:/folder" demo sleep 100000 >/dev/null
check "a machine with network, volume and folder" $?
pid=$(process a)
unconfined=0 threads=0
for task in /proc/"$pid"/task/*; do
  threads=$((threads + 1))
  # Root's server of a folder makes files of any owner; processors have no rights at all.
  rights=.
  case $(cat "$task/comm") in vcpu* | network) rights=0 ;; esac
  grep -q '^Seccomp:.*2$' "$task/status" && grep -q '^NoNewPrivs:.*1$' "$task/status" &&
    grep -q "^CapEff:[[:space:]]*$rights*\$" "$task/status" || { unconfined=$((unconfined + 1)); cat "$task/comm"; }
done
[ "$unconfined" = 0 ] && [ "$threads" -gt 4 ]
check "all $threads threads are confined" $?
[ "$(sk exec a sh -c 'cat /folder/in; echo from-the-guest >/folder/out')" = from-the-host ] && [ "$(cat "$work/folder/out")" = from-the-guest ]
check "a folder, both ways" $?
sk exec a sh -c 'dd if=/dev/urandom of=/volume/x bs=1M count=8 2>/dev/null; sync; md5sum </volume/x >/volume/sum; echo 3 >/proc/sys/vm/drop_caches; [ "$(md5sum </volume/x)" = "$(cat /volume/sum)" ]'
check "a volume keeps what is written" $?
sk exec -d a sh -c 'while :; do printf "HTTP/1.0 200 OK\r\n\r\nhello" | nc -l -p 80; done' >/dev/null 2>&1 ||
  sk exec a sh -c '(while :; do printf "HTTP/1.0 200 OK\r\n\r\nhello" | nc -l -p 80; done) >/dev/null 2>&1 </dev/null &'
answer=
for _ in 1 2 3 4 5 6 7 8 9 10; do
  answer=$(wget -q -O - http://127.0.0.1:18080/ 2>/dev/null) && break
  sleep 1
done
[ "$answer" = hello ]
check "a published port answers: $answer" $?

sk run -d --name idle --hypervisor "$hypervisor" -m 512M demo sleep 100000 >/dev/null && sk exec idle true
check "an idle machine" $?
for name in idle a; do
  taken=$(beside "$(process $name)")
  [ "$taken" -gt 0 ] && [ "$taken" -le "$own" ]
  check "the process of $name takes $taken KiB beside its guest (at most $own)" $?
done

fill='mkdir -p /m; mount -t tmpfs -o size=300m t /m 2>/dev/null; dd if=/dev/zero bs=1M count=200 2>/dev/null | tr "\0" x >/m/x; md5sum </m/x'
pid=$(process idle)
before=$(anonymous "$pid")
sum=$(sk exec idle sh -c "$fill")
filled=$(anonymous "$pid")
sk exec idle rm /m/x
for _ in $(seq 60); do
  freed=$(anonymous "$pid")
  [ "$freed" -lt $((before + 40)) ] && break
  sleep 1
done
[ "$filled" -ge $((before + 195)) ] && [ "$freed" -lt $((before + 40)) ]
check "what a guest frees goes back: $before -> $filled -> $freed MiB" $?
[ "$(sk exec idle sh -c "$fill")" = "$sum" ]
check "and is as good as new" $?
sk stop -t 1 a idle >/dev/null && sk rm a idle >/dev/null
check "they stop" $?
# By another machine, from the volume's file.
sk run --hypervisor "$hypervisor" -m 512M -v data:/volume demo sh -c '[ "$(md5sum </volume/x)" = "$(cat /volume/sum)" ]'
check "the volume is whole afterwards" $?
if [ -n "$forbidden" ]; then
  "$forbidden" >"$work/forbidden" 2>&1
  status=$?
  tail -n 3 "$work/forbidden"
  check "no role of threads does what is forbidden" $status
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
