#!/usr/bin/env bash
# The public x86 test kernels (kvm-unit-tests) on the software processor, in each of its modes: what
# they find must be the same in all of them.
#
#   tests/kvm-unit-tests.sh [--modes "interpreter jit jit-stress"] [--only "NAME…"] [--seconds 600]
#                           [--tries 3] DIR
#
# DIR has the project's sources; they are copied, and built beside the other tests' things in
# ${XDG_CACHE_HOME:-~/.cache}/skerry-tests. Needs gcc, binutils and make, and `cargo build --release`.
#
# A kernel's outcome is its status, and its lines of what passed, failed and was skipped, without the
# numbers that differ from run to run. One that doesn't pass, or not as the first mode's, is run again up
# to --tries times: some measure time, and a busy host upsets them. --seconds bounds each run. Prints a
# line a kernel, what differs, and ends with "N alike, M not"; status 0 if all are alike and none has
# failed but for what is known below. Left out are kernels for what isn't there: nested virtualization,
# performance counters, QEMU's, Hyper-V's and VMware's devices, forced emulation.
set -u
modes="interpreter jit jit-stress" only="" seconds=600 tries=3 sources=""
while [ $# -gt 0 ]; do
  case $1 in
    --modes) modes=$2; shift 2;;
    --only) only=" $2 "; shift 2;;
    --seconds) seconds=$2; shift 2;;
    --tries) tries=$2; shift 2;;
    -*) echo "unknown option $1" >&2; exit 2;;
    *) sources=$1; shift;;
  esac
done
# Name, kernel, processors, command line (NOW is the time of day).
kernels=(
  "access access_test 1"
  "apic apic 1"
  "debug debug 1"
  "dummy dummy 1"
  "emulator emulator 1"
  "eventinj eventinj 1"
  "hypercall hypercall 1"
  "idt idt_test 1"
  "ioapic ioapic 2"
  "kvmclock kvmclock_test 2 100000 NOW"
  "la57 la57 1"
  "lam lam 1"
  "memory memory 1"
  "msr msr 1"
  "pcid pcid 1"
  "rdpru rdpru 1"
  "realmode realmode 1"
  "rmap rmap_chain 1"
  "setjmp setjmp 1"
  "sieve sieve 1"
  "smap smap 1"
  "smp2 smptest 2"
  "smp3 smptest 3"
  "syscall syscall 1"
  "tsc tsc 1"
  "tsc_adjust tsc_adjust 1"
  "tscdeadline tscdeadline_latency 1"
  "umip umip 1"
  "xsave xsave 1"
)
# Code breakpoints behind MOV SS are held back, as Intel's processors do, whatever vendor CPUID tells.
known="FAIL: no fep: #DB occurred after MOV SS"

[ -x "$sources/configure" ] && [ -d "$sources/x86" ] ||
  { echo "'$sources' is no folder with the sources of kvm-unit-tests" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
skerry=${SKERRY:-${CARGO_TARGET_DIR:-$root/target}/release/skerry}
[ -x "$skerry" ] || { echo "no $skerry: cargo build --release first" >&2; exit 2; }
sources=$(realpath "$sources")
built=${XDG_CACHE_HOME:-$HOME/.cache}/skerry-tests/kvm-unit-tests
from="$sources $(git -C "$sources" rev-parse HEAD 2>/dev/null)"
if [ "$(cat "$built/from" 2>/dev/null)" != "$from" ]; then
  rm -rf "$built"; mkdir -p "$built"
  tar -C "$sources" --exclude=.git --exclude='*.o' --exclude='*.elf' --exclude='*.flat' --exclude='.*.d' \
    -cf - . | tar -C "$built" -xf -
  # It waits for an interrupt that QEMU's test device raises.
  sed -i '/^[[:space:]]*test_sti_inhibit();/d' "$built/x86/realmode.c"
  (cd "$built" && ./configure --arch=x86_64 && make -j"$(nproc)") > "$built/log" 2>&1 ||
    { tail -n 5 "$built/log" >&2; echo "the kernels can't be built" >&2; exit 2; }
  echo "$from" > "$built/from"
fi
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT

# Runs a kernel once; leaves its console, its outcome and its status in files of that name.
run() { # MODE KERNEL CPUS COMMAND-LINE
  printf 'NR_CPUS=%s\nMEMSIZE=256\nTEST_DEVICE=0\n' "$3" > "$work/env"
  "$skerry" boot --hypervisor soft --soft-mode "$1" --kernel "$built/x86/$2.flat" --initrd "$work/env" \
    ${4:+--cmdline "${4/NOW/$(date +%s)}"} --cpus "$3" --memory 256M --debug-exit 0xf4 --no-reboot --timeout "$seconds" \
    </dev/null > "$work/console" 2>&1
  status=$?
  { tr -d '\r' < "$work/console" | grep -aE '^(PASS|FAIL|XFAIL|XPASS|SKIP|SUMMARY)|out of' |
      sed -E 's/0x[0-9a-f]+/0x…/g'
    echo "status $status"; } > "$work/outcome"
}
passed() { # what is known to fail is no failure
  grep -qx 'status 1' "$work/outcome" && return
  grep -qx 'status 3' "$work/outcome" && ! grep -a '^FAIL' "$work/outcome" | grep -qvxF "$known"
}

alike=0 unlike=0
printf '%-12s' kernel; printf '%32s' $modes; echo
for kernel in "${kernels[@]}"; do
  read -r name file cpus line <<< "$kernel"
  [ -z "$only" ] || [[ $only == *" $name "* ]] || continue
  printf '%-12s' "$name"
  verdict=alike; rm -f "$work/first"
  for mode in $modes; do
    for try in $(seq "$tries"); do
      begun=$(date +%s%N)
      run "$mode" "$file" "$cpus" "$line"
      took=$((($(date +%s%N) - begun) / 10000000))
      passed && { [ ! -e "$work/first" ] || cmp -s "$work/first" "$work/outcome"; } && break
    done
    passed || verdict=FAILED
    if [ ! -e "$work/first" ]; then cp "$work/outcome" "$work/first"
    elif ! cmp -s "$work/first" "$work/outcome"; then
      verdict=DIFFERS; diff "$work/first" "$work/outcome" | sed "s/^/    $mode: /" >> "$work/different"
    fi
    counts="$(grep -ac ^PASS "$work/outcome") passed"
    bad=$(grep -acE '^FAIL|^XPASS' "$work/outcome"); [ "$bad" = 0 ] || counts+=", $bad failed"
    [ "$try" = 1 ] || counts+=", try $try"
    printf '%32s' "$counts, $((took / 100)).$(printf %02d $((took % 100))) s"
  done
  echo "  $verdict"
  if [ "$verdict" = alike ]; then alike=$((alike + 1)); else
    unlike=$((unlike + 1))
    [ "$verdict" = FAILED ] && grep -aE '^FAIL|^status' "$work/outcome" | head -5 | sed 's/^/    /'
    [ ! -e "$work/different" ] || head -10 "$work/different"
  fi
  rm -f "$work/different"
done
echo "$alike alike, $unlike not"
[ "$unlike" = 0 ]
