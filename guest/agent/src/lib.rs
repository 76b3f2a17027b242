//! PID 1 and agent inside a Skerry guest.
//!
//! ```text
//!   kernel --> /init (main.rs) --> init::run
//!                 |  mounts::early            /proc /sys /dev of the initial RAM file system
//!                 |  transport::connect       vsock to the host, or a console port
//!                 |  control::Control         Hello ->, <- Setup
//!                 |  root::switch             image + overlay becomes /
//!                 |  mounts::standard, files  /proc /sys /dev ..., /etc/hostname ..., `lo` up
//!                 |  cgroup, clone_event      for the day of a snapshot
//!                 |  transport::listen        port 1024
//!                 |  Ready ->
//!                 |
//!    first thread +- sys::wait_for_notice     orphans, the power button
//!    "control"    +- control::serve           clock, entropy, freeze, clones, shutdown
//!    "exec", some +- accept --> exec::session --> exec::child --> the command
//! ```
//!
//! It is a library so that tests run the exec service as an ordinary process over a socket pair.
//! The program is one static binary; the host puts it alone into the initial RAM file system.

pub mod cgroup;
pub mod clone_event;
pub mod console;
pub mod control;
pub mod exec;
pub mod files;
pub mod init;
pub mod log;
pub mod mounts;
pub mod network;
pub mod root;
pub mod sys;
pub mod tools;
pub mod transport;
pub mod volumes;
