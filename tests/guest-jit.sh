#!/usr/bin/env bash
# Just-in-time compilers in the guest, in each mode of the software processor: LuaJIT runs
# tests/guests/jit.lua, WebKit's JavaScriptCore (jsc) and V8 (node) run tests/guests/jit.js. The output
# must be the same as natively; that of both JavaScript engines is the same.
#
#   tests/guest-jit.sh [--rounds 1] [--cpus 1] [--modes "interpreter jit jit-stress"]
#                      [--engines "luajit jsc node"]
#
# Needs `cargo build --release` and, the first time, apt-get to download Debian's packages of them
# into ${XDG_CACHE_HOME:-~/.cache}/skerry-tests (150 MB; nothing is installed).
set -u
rounds=1 cpus=1 modes="interpreter jit jit-stress" engines="luajit jsc node"
while [ $# -gt 0 ]; do
  case $1 in
    --rounds) rounds=$2; shift 2;;
    --cpus) cpus=$2; shift 2;;
    --modes) modes=$2; shift 2;;
    --engines) engines=$2; shift 2;;
    *) echo "unknown option $1" >&2; exit 2;;
  esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
skerry=${SKERRY:-${CARGO_TARGET_DIR:-$root/target}/release/skerry}
[ -x "$skerry" ] || { echo "no $skerry: cargo build --release first" >&2; exit 2; }
cache=${XDG_CACHE_HOME:-$HOME/.cache}/skerry-tests/guest-jit
guest=$cache/rootfs
if [ ! -e "$cache/complete" ]; then
  rm -rf "$cache"; mkdir -p "$cache/archives/partial" "$guest"/usr/{bin,sbin,lib,lib64}
  # As if nothing were installed, so that every dependency is among what is downloaded.
  : > "$cache/status"
  apt-get -q -y -o Debug::NoLocking=1 -o "Dir::State::status=$cache/status" -o APT::Sandbox::User= \
    -o "Dir::Cache::archives=$cache/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
    -o APT::Install-Recommends=false --download-only install luajit libjavascriptcoregtk-4.0-bin nodejs \
    >&2 || { echo "no packages" >&2; exit 2; }
  for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$guest/$folder"; done
  for package in "$cache"/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink --no-same-owner -C "$guest" ||
      exit 2
  done
  rm -rf "$cache/archives" "$guest"/usr/share/{doc,locale,man,info}
  : > "$cache/complete"
fi
cp "$root"/tests/guests/jit.{lua,js} "$guest"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
export XDG_DATA_HOME=$work/data

natively() { # TO PROGRAM ARGUMENTS: with the guest's own libraries
  "$guest/lib64/ld-linux-x86-64.so.2" --library-path "$guest/usr/lib/x86_64-linux-gnu" \
    "$guest/usr/bin/$2" "${@:3}" > "$work/$1" || { echo "$2 doesn't run here" >&2; exit 2; }
}
natively lua luajit "$guest/jit.lua" "$rounds"
# Debian's node reads files of its own by their absolute names, so it isn't run natively.
natively js jsc "$guest/jit.js" -- "$rounds"

failed=0
hold() { # MODE WANTED PROGRAM ARGUMENTS
  begun=$(date +%s%N)
  timeout 1200 "$skerry" run --rm --hypervisor soft --soft-mode "$1" --cpus "$cpus" --memory 1G \
    "dir:$guest" -- "/usr/bin/$3" "${@:4}" > "$work/out" 2> "$work/err"
  status=$?
  took=$((($(date +%s%N) - begun) / 100000000))
  if [ $status = 0 ] && cmp -s "$work/$2" "$work/out"; then
    echo "ok      $1, ${*:3}: $((took / 10)).$((took % 10)) s"
  else
    failed=$((failed + 1))
    echo "FAILED  $1, ${*:3}: status $status"
    diff "$work/$2" "$work/out" | head -5; tail -3 "$work/err"
  fi
}
for mode in $modes; do
  for engine in $engines; do
    case $engine in
      luajit)
        # Its interpreter, in assembly, too.
        [ "$mode" = interpreter ] || hold "$mode" lua luajit -joff /jit.lua "$rounds"
        hold "$mode" lua luajit -jon /jit.lua "$rounds";;
      jsc) hold "$mode" js jsc /jit.js -- "$rounds";;
      node) hold "$mode" js node /jit.js "$rounds";;
      *) echo "unknown engine $engine" >&2; exit 2;;
    esac
  done
done
echo "$failed failed"
[ $failed = 0 ]
