//! PID 1 and agent inside a Skerry guest.
//!
//! ```text
//!   kernel --> /init (main.rs) --> init::run
//!                 |  mounts::early            /proc /sys /dev of the initial RAM file system
//!                 |  transport::connect       vsock to the host, or a console port
//!                 |  control::Control         Hello ->, <- Setup
//!                 |  root::switch             image + overlay becomes /
//!                 |  mounts::standard, files  /proc /sys /dev ..., /etc/hostname ..., `lo` up
//!                 |  transport::listen        port 1024
//!                 |  Ready ->
//!                 +- control::serve           clock, entropy, shutdown
//!
//!   accept --> exec::session (one thread each) --> exec::spawn --> the command
//!   reap::Reaper: orphans, never an exec's own child
//! ```
//!
//! It is a library so that tests run the exec service as an ordinary process over a socket pair.
//! The program is one static binary; the host puts it alone into the initial RAM file system.

pub mod console;
pub mod control;
pub mod exec;
pub mod files;
pub mod init;
pub mod log;
pub mod mounts;
pub mod network;
pub mod reap;
pub mod root;
pub mod sys;
pub mod transport;
