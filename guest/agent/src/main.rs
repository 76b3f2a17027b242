//! `/init` of a Skerry guest. See the library for what it does.
//!
//! There is no Rust `main`: the standard library's start-up insists on open standard streams or a
//! `/dev/null` to put there, and the initial RAM file system that the kernel starts this program
//! in has neither where there is no console.
#![no_main]
#![expect(unsafe_code, reason = "the C entry point has to keep its name")]

// SAFETY: no other symbol of this program is called main, and the C runtime calls it once with
// this signature's prefix (C23 §5.1.2.2.1).
#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    if !rustix::process::getpid().is_init() {
        let words: Vec<String> = std::env::args().skip(1).collect();
        if let Some(status) = skerry_agent::tools::run(&words) {
            return status;
        }
        eprintln!("skerry-agent runs as PID 1 of a Skerry guest and does nothing elsewhere");
        return 125;
    }
    skerry_agent::init::run()
}
