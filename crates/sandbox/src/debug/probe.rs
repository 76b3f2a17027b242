//! Whether a backend's guests have debug registers.

use std::sync::OnceLock;

use gdbstub::target::ext::breakpoints::WatchKind;
use skerry_hypervisor::Exit;
use skerry_sandbox_abi::{PORT, PORT_EXCEPTION};

use super::context::RSP;
use super::points::{Hardware, Points};
use crate::bare::Bare;
use crate::error::CallError;
use crate::processor::Backend;
use crate::sandbox::Sandbox;

impl Sandbox {
    /// Whether a debugger can have hardware breakpoints and watchpoints. A KVM that emulates its guests may
    /// take what is written to the debug registers and never stop for it; the first call for such a
    /// backend runs a guest of three instructions to find out.
    pub fn has_debug_registers(&self) -> bool {
        static KVM: OnceLock<bool> = OnceLock::new();
        match self.backend() {
            Backend::Kvm => *KVM.get_or_init(|| {
                let stops = stops_at_a_write(Backend::Kvm);
                if !stops {
                    tracing::warn!("this KVM doesn't stop at debug registers");
                }
                stops
            }),
            Backend::Soft | Backend::Auto => true,
        }
    }
}

/// Whether a guest that writes where a debug register watches gets its debug exception.
fn stops_at_a_write(backend: Backend) -> bool {
    // push rax; nop; out PORT, eax
    const CODE: [u8; 4] = [0x50, 0x90, 0xe7, PORT];
    const STUB: u16 = PORT_EXCEPTION as u16;
    const PUSHED: u64 = 8;
    let run = || -> Result<Exit, CallError> {
        let Ok(mut bare) = Bare::new(backend, &CODE) else {
            // It will be said when a sandbox is made.
            return Ok(Exit::Shutdown);
        };
        let mut state = bare.processor.state()?;
        let mut points = Points::default();
        let written = state.general.gpr[RSP].wrapping_sub(PUSHED);
        let kind = WatchKind::Write;
        points.add_hardware(written, Hardware::Data { len: PUSHED, kind });
        points.set(&mut state.debug);
        bare.processor.set_state(&state)?;
        bare.processor.begin_call();
        let exit = bare.processor.run();
        bare.processor.end_call();
        Ok(exit?)
    };
    matches!(run(), Ok(Exit::PortOut { port: STUB, .. }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_stops() {
        assert!(stops_at_a_write(Backend::Soft));
    }
}
