#!/usr/bin/env bash
# A just-in-time compiler in the guest: LuaJIT runs tests/guests/jit.lua natively and in machines, in
# each mode of the software processor; the output must be the same.
#
#   tests/guest-jit.sh [--rounds 1] [--cpus 1] [--modes "interpreter jit jit-stress"]
#
# Needs `cargo build --release` and, the first time, apt-get to download Debian's packages of luajit
# into ${XDG_CACHE_HOME:-~/.cache}/skerry-tests.
set -u
rounds=1 cpus=1 modes="interpreter jit jit-stress"
while [ $# -gt 0 ]; do
  case $1 in
    --rounds) rounds=$2; shift 2;;
    --cpus) cpus=$2; shift 2;;
    --modes) modes=$2; shift 2;;
    *) echo "unknown option $1" >&2; exit 2;;
  esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
skerry=${SKERRY:-${CARGO_TARGET_DIR:-$root/target}/release/skerry}
[ -x "$skerry" ] || { echo "no $skerry: cargo build --release first" >&2; exit 2; }
cache=${XDG_CACHE_HOME:-$HOME/.cache}/skerry-tests/luajit
if [ ! -x "$cache/rootfs/usr/bin/luajit" ]; then
  mkdir -p "$cache/packages" "$cache/rootfs"
  (cd "$cache/packages" && apt-get download -q \
    luajit libluajit-5.1-2 libluajit-5.1-common libc6 libgcc-s1) || { echo "no packages" >&2; exit 2; }
  for package in "$cache"/packages/*.deb; do dpkg-deb -x "$package" "$cache/rootfs"; done
fi
cp "$root/tests/guests/jit.lua" "$cache/rootfs/jit.lua"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
export XDG_DATA_HOME=$work/data
lua=/usr/bin/luajit
libraries=$cache/rootfs/lib/x86_64-linux-gnu:$cache/rootfs/usr/lib/x86_64-linux-gnu
"$cache/rootfs/lib64/ld-linux-x86-64.so.2" --library-path "$libraries" "$cache/rootfs$lua" \
  "$cache/rootfs/jit.lua" "$rounds" > "$work/native" || { echo "luajit doesn't run here" >&2; exit 2; }
failed=0
for mode in $modes; do
  for compiled in on off; do
    [ "$mode $compiled" = "interpreter off" ] && continue
    started=$(date +%s.%N)
    timeout 1200 "$skerry" run --rm --hypervisor soft --soft-mode "$mode" --cpus "$cpus" \
      "dir:$cache/rootfs" -- "$lua" -j"$compiled" /jit.lua "$rounds" > "$work/out" 2> "$work/err"
    status=$?
    seconds=$(echo "$(date +%s.%N) - $started" | bc)
    if [ $status = 0 ] && cmp -s "$work/native" "$work/out"; then
      printf 'ok      %s, LuaJIT -j%s: %.1f s\n' "$mode" "$compiled" "$seconds"
    else
      failed=$((failed + 1))
      printf 'FAILED  %s, LuaJIT -j%s: status %s\n' "$mode" "$compiled" $status
      diff "$work/native" "$work/out" | head -5; tail -3 "$work/err"
    fi
  done
done
echo "$failed failed"
[ $failed = 0 ]
