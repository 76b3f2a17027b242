#!/bin/bash
# Builds guests that are part of the host library, and puts each into its folder with the checksum of what
# it was made from.
#
#   guest/sandbox-rt/guests/build.sh [NAME…]
#
# The names are those of embedded.txt, all of them unless told. NAME is the folder, sandbox-NAME the package
# and NAME-x86_64 the program.
#
# Needs the Rust toolchain of rust-version for x86_64-unknown-linux-gnu.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../target}
cd "$here/.."
mapfile -t known <"$here/embedded.txt"
names=("${@:-${known[@]}}")
for name in "${names[@]}"; do
    printf '%s\n' "${known[@]}" | grep -qx -e "$name" || {
        echo "no guest $name in embedded.txt" >&2
        exit 2
    }
done

# Nothing unwinds, so that the tables for it are left out. Paths are cut so that the result doesn't depend
# on where it was built.
export CARGO_TARGET_DIR=$target
# What the script engine hashes with is made up when it is compiled, unless it is told.
export CONST_RANDOM_SEED=skerry
root=$(cd ../.. && pwd)
export CARGO_ENCODED_RUSTFLAGS=$(printf '%s\x1f' \
    -Ctarget-cpu=x86-64 \
    -Cforce-unwind-tables=no \
    -Clink-arg=-Wl,--build-id=none \
    "--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo" \
    "--remap-path-prefix=$root=/skerry")
CARGO_ENCODED_RUSTFLAGS=${CARGO_ENCODED_RUSTFLAGS%$'\x1f'}
# One at a time: built together they would share features of dependencies, and a program would depend on
# which others were asked for.
for name in "${names[@]}"; do
    cargo build --quiet --locked --profile embedded --target x86_64-unknown-linux-gnu -p "sandbox-$name"
    cp "$target/x86_64-unknown-linux-gnu/embedded/sandbox-$name" "$here/$name/$name-x86_64"
done
unset CARGO_ENCODED_RUSTFLAGS
cd "$root"
SKERRY_BUILT_GUESTS="${names[*]}" cargo test --quiet --locked --release -p skerry-sandbox --test guests_fresh
for name in "${names[@]}"; do
    ls -l "$here/$name/$name-x86_64"
done
