#!/bin/bash
# Builds the WebAssembly guest and puts it here with the checksum of what it was made from.
#
#   guest/sandbox-rt/guests/wasm/build.sh
#
# Needs the Rust toolchain of rust-version for x86_64-unknown-linux-gnu.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}
cd "$here/../.."

# Nothing unwinds, so that the tables for it are left out. Paths are cut so that the result doesn't depend
# on where it was built.
export CARGO_TARGET_DIR=$target
root=$(cd ../.. && pwd)
export CARGO_ENCODED_RUSTFLAGS=$(printf '%s\x1f' \
    -Ctarget-cpu=x86-64 \
    -Cforce-unwind-tables=no \
    -Clink-arg=-Wl,--build-id=none \
    "--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo" \
    "--remap-path-prefix=$root=/skerry")
CARGO_ENCODED_RUSTFLAGS=${CARGO_ENCODED_RUSTFLAGS%$'\x1f'}
cargo build --quiet --locked --profile embedded --target x86_64-unknown-linux-gnu -p sandbox-wasm
cp "$target/x86_64-unknown-linux-gnu/embedded/sandbox-wasm" "$here/wasm-x86_64"
unset CARGO_ENCODED_RUSTFLAGS
cd "$root"
SKERRY_BLESS=1 cargo test --quiet --locked --release -p skerry-sandbox --test wasm_fresh
ls -l "$here/wasm-x86_64"
