#!/bin/bash
# Builds sandbox-peer and the guest that it runs, from Hyperlight's crates on crates.io.
#
#   benches/sandbox-peer/build.sh
#
# Writes release/sandbox-peer and x86_64-unknown-none/release/sandbox-peer-guest below CARGO_TARGET_DIR
# [default: target, here]. Needs the stable Rust toolchain of rust-version, and fetches the crates and,
# where it isn't installed yet, that toolchain's core library for x86_64-unknown-none (with rustup).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export CARGO_TARGET_DIR=$(realpath -m "${CARGO_TARGET_DIR:-$here/target}")
cd "$here"

# Flags meant for another program, such as a CPU model with vectors, are not for the guest.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_TARGET CARGO_BUILD_RUSTFLAGS

bare=x86_64-unknown-none
if ! compgen -G "$(rustc --print target-libdir --target $bare)/libcore-*.rlib" > /dev/null; then
    if ! command -v rustup > /dev/null; then
        echo "build.sh: this toolchain has no library for $bare, and there is no rustup to add it" >&2
        exit 1
    fi
    rustup target add $bare
fi

cargo build --quiet --locked --release -p sandbox-peer
cargo build --quiet --locked --release -p sandbox-peer-guest --target $bare
ls -l "$CARGO_TARGET_DIR/release/sandbox-peer" "$CARGO_TARGET_DIR/$bare/release/sandbox-peer-guest"
