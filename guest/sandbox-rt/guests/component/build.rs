//! A guest is a freestanding program. For a target without operating system it is one already.

fn main() {
    let system = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if system != "none" {
        for argument in ["-nostartfiles", "-nostdlib", "-static"] {
            println!("cargo:rustc-link-arg-bins={argument}");
        }
    }
}
