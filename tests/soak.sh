#!/usr/bin/env bash
# The long form of the end-to-end tests: many boots, many runs, much data, on one backend.
#
#   tests/soak.sh [--hypervisor soft] [--soft-mode MODE] [--boots 20] [--cpus "1 2"] [--runs 50]
#                 [--kernel FILE]... [--image REF]
#
# --boots boots a kernel so often to a shell script that powers off, with each number of --cpus;
# --kernel adds kernels to the built-in one (Debian's: unpack linux-image-cloud-amd64);
# --runs runs so many commands in a row, after 200 MB through their streams (0: neither);
# --image names an image with bash and coreutils (default: demo). Prints a line a check, what a boot
# that failed said last, and ends with "N passed, M failed".
set -u
on=(--hypervisor soft) boots=20 cpus="1 2" runs=50 image=demo kernels=("")
while [ $# -gt 0 ]; do
  case $1 in
    --hypervisor) on=(--hypervisor "$2" "${on[@]:2}"); shift 2;;
    --soft-mode) on+=("$1" "$2"); shift 2;;
    --boots) boots=$2; shift 2;;
    --cpus) cpus=$2; shift 2;;
    --runs) runs=$2; shift 2;;
    --kernel) kernels+=("$2"); shift 2;;
    --image) image=$2; shift 2;;
    *) echo "unknown option $1" >&2; exit 2;;
  esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
skerry=${SKERRY:-${CARGO_TARGET_DIR:-$root/target}/release/skerry}
[ -x "$skerry" ] || { echo "no $skerry: cargo build --release first" >&2; exit 2; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
export XDG_DATA_HOME=$work/data
passed=0 failed=0
check() { # NAME STATUS
  if [ "$2" = 0 ]; then passed=$((passed + 1)); echo "ok      $1"
  else failed=$((failed + 1)); echo "FAILED  $1"; fi
}

# An initrd that counts its processors and powers off.
mkdir -p "$work/initrd/"{bin,dev,proc}
cp "$(command -v busybox)" "$work/initrd/bin/busybox"
cat > "$work/initrd/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox echo "BOOT-OK cpus=$(/bin/busybox grep -c ^processor /proc/cpuinfo)"
/bin/busybox poweroff -f
INIT
chmod +x "$work/initrd/init"
(cd "$work/initrd" && find . | cpio -o -H newc -R 0:0 --quiet) > "$work/initrd.cpio"

for kernel in "${kernels[@]}"; do
  for n in $cpus; do
    good=0
    for boot in $(seq "$boots"); do
      out=$("$skerry" boot "${on[@]}" ${kernel:+--kernel "$kernel"} --cpus "$n" \
        --initrd "$work/initrd.cpio" --timeout 300 </dev/null 2>&1)
      status=$?
      if [ $status = 0 ] && [[ $out == *"BOOT-OK cpus=$n"* ]]; then good=$((good + 1))
      else echo "boot $boot: status $status"; tail -n 5 <<< "$out"; fi
    done
    [ "$good" = "$boots" ]
    check "${kernel:-built-in kernel}, $n CPUs: $good of $boots boots" $?
  done
done

if [ "$runs" != 0 ]; then
  run() { "$skerry" run "${on[@]}" --timeout 600 "$@"; }
  head -c 100000000 /dev/urandom > "$work/bytes"
  want=$(sha256sum < "$work/bytes")
  got=$(run -i "$image" sha256sum < "$work/bytes"); [ "$got" = "$want" ]
  check "100 MB through stdin, summed inside" $?
  got=$(run -i "$image" cat < "$work/bytes" | sha256sum); [ "$got" = "$want" ]
  check "100 MB through stdin and stdout" $?

  processes() { pgrep -c -f "$skerry" || true; }
  before=$(awk '/^MemAvailable/{print $2}' /proc/meminfo) processes_before=$(processes)
  good=0
  for n in $(seq "$runs"); do
    [ "$(run "$image" sh -c "echo run $n > /tmp/x; cat /tmp/x" 2>/dev/null)" = "run $n" ] && good=$((good + 1))
  done
  [ "$good" = "$runs" ]; check "$good of $runs runs in a row" $?
  [ "$(processes)" = "$processes_before" ]; check "no process is left" $?
  [ -z "$(ls -A "$XDG_DATA_HOME/skerry/scratch")" ]; check "no scratch file is left" $?
  after=$(awk '/^MemAvailable/{print $2}' /proc/meminfo)
  [ $((before - after)) -lt 200000 ]
  check "memory available: $((before / 1024)) MiB before, $((after / 1024)) MiB after" $?
fi

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
