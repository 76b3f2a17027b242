#!/bin/bash
# Builds the agent as one static program and puts it here with the checksum of what it was made from.
#
#   guest/agent/build.sh
#
# Needs the Rust toolchain of rust-version for x86_64-unknown-linux-gnu and a static C library (libc6-dev).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}
cd "$here/../.."

# Fixed addresses spare the start-up relocations; the baseline instruction set runs on any CPU model.
# Paths are cut so that the result doesn't depend on where it was built.
export CARGO_TARGET_DIR=$target
export CARGO_ENCODED_RUSTFLAGS=$(printf '%s\x1f' \
    -Ctarget-cpu=x86-64 \
    -Ctarget-feature=+crt-static \
    -Crelocation-model=static \
    -Clink-arg=-Wl,--build-id=none \
    -Clink-arg=-Wl,-z,norelro \
    "--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo" \
    "--remap-path-prefix=$PWD=/skerry")
CARGO_ENCODED_RUSTFLAGS=${CARGO_ENCODED_RUSTFLAGS%$'\x1f'}
cargo build --quiet --locked --profile agent --target x86_64-unknown-linux-gnu -p skerry-agent --bin skerry-agent
cp "$target/x86_64-unknown-linux-gnu/agent/skerry-agent" "$here/agent-x86_64"
unset CARGO_ENCODED_RUSTFLAGS
cargo run --quiet --locked -p skerry-agent --example agent-sources > "$here/agent.sources.sha256"
ls -l "$here/agent-x86_64"
