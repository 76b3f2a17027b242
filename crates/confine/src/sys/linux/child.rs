//! What would hold, tried out by a child.
#![expect(
    unsafe_code,
    reason = "the child is made by fork, which takes no closure"
)]

use std::fs::File;
use std::io::{self, Read, Write};

use rustix::process::{Pid, WaitOptions, waitpid};

use crate::{ConfineError, Plan, Report};

/// The longest report.
const LONGEST: u64 = 1 << 16;

pub(crate) fn probe() -> Result<Report, ConfineError> {
    let (reader, writer) = io::pipe().map_err(ConfineError::Probe)?;
    // SAFETY: the child has this thread only, and allocates: the C library keeps its allocator whole
    // over a fork. It ends without running what the parent would at its end.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(ConfineError::Probe(io::Error::last_os_error())),
        0 => {
            tell(File::from(std::os::fd::OwnedFd::from(writer)));
            // SAFETY: it takes no pointer.
            unsafe { libc::_exit(0) }
        }
        child => {
            drop(writer);
            let mut told = Vec::new();
            let read = reader.take(LONGEST).read_to_end(&mut told);
            let _ = waitpid(Pid::from_raw(child), WaitOptions::empty());
            read.map_err(ConfineError::Probe)?;
            serde_json::from_slice(&told).map_err(|error| ConfineError::Probe(error.into()))
        }
    }
}

/// Confines this process, which has no machine, and says how far that went.
fn tell(mut to: File) {
    let plan = Plan {
        network: true,
        ..Plan::default()
    };
    if let Ok(active) = super::apply(&plan) {
        let _ = to.write_all(&serde_json::to_vec(&active.report).unwrap_or_default());
    }
}
