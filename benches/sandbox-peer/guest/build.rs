//! Makes the guest library's entry point the ELF's.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-eentrypoint");
}
