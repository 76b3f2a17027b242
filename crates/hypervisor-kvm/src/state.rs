//! All of a processor's state, to and from the kernel.

use std::error::Error;
use std::io;

use skerry_hypervisor::state::{
    CPU_STATE_VERSION, DebugRegisters, GeneralRegisters, LocalApicState, SystemRegisters,
};
use skerry_hypervisor::{BootRegisters, CpuState, Irqchip, StateError, msr};

use crate::sys::{self, XsaveBuffer};
use crate::vcpu::KvmVcpu;
use crate::{convert, msrs};

/// A time-stamp counter and the guest's clock at the same time.
#[derive(Clone, Copy, Debug)]
struct Moment {
    tsc: u64,
    clock_ns: u64,
}

impl KvmVcpu {
    fn backend<E>(&self, what: &'static str) -> impl FnOnce(E) -> StateError + use<E>
    where
        E: Error + Send + Sync + 'static,
    {
        let id = self.id;
        move |source| StateError::Backend {
            id,
            what,
            source: Box::new(source),
        }
    }

    fn has_apic(&self) -> bool {
        self.vm.irqchip == Irqchip::Split
    }

    /// Bytes of the kernel's XSAVE area.
    fn xsave_buffer_size(&self) -> usize {
        self.vm.facts.xsave2_size.max(4096)
    }

    pub(crate) fn read_boot_registers(&self) -> Result<BootRegisters, StateError> {
        let regs = self
            .fd
            .get_regs()
            .map_err(self.backend("read the general registers"))?;
        let sregs = self
            .fd
            .get_sregs()
            .map_err(self.backend("read the system registers"))?;
        Ok(BootRegisters {
            general: convert::general_from(&regs),
            system: convert::system_from(&sregs),
        })
    }

    pub(crate) fn write_boot_registers(
        &mut self,
        registers: &BootRegisters,
    ) -> Result<(), StateError> {
        self.limits.check_boot(registers)?;
        self.abandon_instruction()
            .map_err(self.backend("leave an instruction"))?;
        self.write_registers(&registers.general, &registers.system)
    }

    pub(crate) fn read_state(&mut self) -> Result<CpuState, StateError> {
        let finished = self
            .finish_instruction()
            .map_err(self.backend("finish the instruction"))?;
        if !finished {
            return Err(StateError::InsideInstruction { id: self.id });
        }
        let mp = if self.has_apic() {
            // First: the kernel lets pending INIT and SIPI take effect here.
            self.fd
                .get_mp_state()
                .map_err(self.backend("read the activity state"))?
        } else {
            Default::default()
        };
        let BootRegisters { general, system } = self.read_boot_registers()?;
        let events = self
            .fd
            .get_vcpu_events()
            .map_err(self.backend("read the events"))?;
        let debug = self
            .fd
            .get_debug_regs()
            .map_err(self.backend("read the debug registers"))?;
        let mut xsave = XsaveBuffer::new(self.xsave_buffer_size())
            .map_err(self.backend("make room for the XSAVE area"))?;
        xsave
            .read(&self.fd, self.vm.facts.xsave2_size != 0)
            .map_err(self.backend("read the XSAVE area"))?;
        let xcrs = self.fd.get_xcrs().map_err(self.backend("read XCR0"))?;
        let xcr0 = xcrs
            .xcrs
            .iter()
            .take(xcrs.nr_xcrs as usize)
            .find(|xcr| xcr.xcr == 0)
            .map_or(1, |xcr| xcr.value);
        let mut values = msrs::read(&self.fd, &self.vm.host.msr_indices)
            .map_err(self.backend("read the model-specific registers"))?;
        let find = |index| {
            values
                .iter()
                .find(|msr| msr.0 == index)
                .map_or(0, |msr| msr.1)
        };
        let tsc_deadline = find(msr::IA32_TSC_DEADLINE);
        values.retain(|(index, _)| !msr::has_own_field(*index));
        values.sort_unstable_by_key(|(index, _)| *index);
        values.dedup_by_key(|(index, _)| *index);
        let lapic = if self.has_apic() {
            let lapic = self
                .fd
                .get_lapic()
                .map_err(self.backend("read the local APIC"))?;
            Some(convert::lapic_from(&lapic, tsc_deadline))
        } else {
            None
        };
        let Moment { tsc, clock_ns } = self.moment().map_err(self.backend("read the clock"))?;
        Ok(CpuState {
            version: CPU_STATE_VERSION,
            general,
            system,
            debug: convert::debug_from(&debug),
            xcr0,
            xsave: convert::xsave_from(xsave.to_bytes(self.limits.xsave_size), self.limits.xcr0),
            msrs: values,
            lapic,
            mp_state: convert::mp_state_from(mp, &events),
            events: convert::events_from(&events),
            tsc,
            clock_ns,
        })
    }

    pub(crate) fn write_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.limits.check(state)?;
        let system = convert::system_for(&state.system, &self.vm.host.supported_cpuid)?;
        self.check_msrs(&state.msrs)?;
        // A pending access would be finished into the new registers.
        self.abandon_instruction()
            .map_err(self.backend("leave an instruction"))?;
        let CpuState {
            version: _,
            general,
            system: _,
            debug,
            xcr0,
            xsave,
            msrs,
            lapic,
            mp_state,
            events,
            tsc,
            clock_ns,
        } = state;
        if self.has_apic() {
            self.fd
                .set_mp_state(convert::mp_state_to(*mp_state))
                .map_err(self.backend("set the activity state"))?;
        }
        self.write_registers(general, &system)?;
        self.write_xcr0(*xcr0)?;
        self.write_xsave(xsave)?;
        self.write_debug(debug)?;
        self.write_tsc(*tsc, *clock_ns)
            .map_err(self.backend("set the time-stamp counter"))?;
        self.write_msrs(msrs)?;
        if let Some(lapic) = lapic {
            self.write_lapic(lapic)?;
        }
        // Last: setting registers drops what is pending.
        self.fd
            .set_vcpu_events(&convert::events_to(events, *mp_state))
            .map_err(self.backend("set the events"))
    }

    /// Sets what a guest's ring 3 can change: a fifth of the calls.
    pub(crate) fn write_user_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        // The kernel's local APIC has more to set, and it is for `write_state` to set XCR0.
        if self.has_apic() || self.xcr0 != Some(state.xcr0) {
            return self.write_state(state);
        }
        self.limits.check(state)?;
        let system = convert::system_for(&state.system, &self.vm.host.supported_cpuid)?;
        self.abandon_instruction()
            .map_err(self.backend("leave an instruction"))?;
        self.write_registers(&state.general, &system)?;
        self.write_xsave(&state.xsave)?;
        // Single steps and INT1, which any guest can have, leave marks in DR6.
        if self.debug != Some(state.debug) {
            self.write_debug(&state.debug)?;
        }
        // Last: setting registers drops what is pending.
        self.fd
            .set_vcpu_events(&convert::events_to(&state.events, state.mp_state))
            .map_err(self.backend("set the events"))
    }

    fn write_registers(
        &mut self,
        general: &GeneralRegisters,
        system: &SystemRegisters,
    ) -> Result<(), StateError> {
        self.fd
            .set_sregs(&convert::system_to(system))
            .map_err(self.backend("set the system registers"))?;
        self.fd
            .set_regs(&convert::general_to(general))
            .map_err(self.backend("set the general registers"))?;
        self.page.set_cr8(system.cr8);
        Ok(())
    }

    fn write_debug(&mut self, debug: &DebugRegisters) -> Result<(), StateError> {
        self.debug = None;
        self.fd
            .set_debug_regs(&convert::debug_to(debug))
            .map_err(self.backend("set the debug registers"))?;
        self.debug = Some(*debug);
        Ok(())
    }

    fn write_xcr0(&mut self, xcr0: u64) -> Result<(), StateError> {
        self.xcr0 = None;
        let mut xcrs = kvm_bindings::kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = xcr0;
        self.fd.set_xcrs(&xcrs).map_err(self.backend("set XCR0"))?;
        self.xcr0 = Some(xcr0);
        Ok(())
    }

    fn write_xsave(&self, xsave: &[u8]) -> Result<(), StateError> {
        XsaveBuffer::from_bytes(self.xsave_buffer_size(), xsave)
            .and_then(|buffer| buffer.write(&self.fd))
            .map_err(self.backend("set the XSAVE area"))
    }

    fn tsc(&self) -> io::Result<u64> {
        let tsc = msrs::read(&self.fd, &[msr::IA32_TSC])?;
        let tsc = tsc.first().ok_or(io::ErrorKind::Unsupported)?;
        Ok(tsc.1)
    }

    /// Time-stamp counter and clock at one moment: the counter is read before the clock and after it,
    /// and the tries that were interrupted are dropped.
    fn moment(&self) -> io::Result<Moment> {
        const TRIES: usize = 4;
        let mut best: Option<(u64, Moment)> = None;
        for _ in 0..TRIES {
            let before = self.tsc()?;
            let clock_ns = self.vm.fd.get_clock()?.clock;
            let took = self.tsc()?.wrapping_sub(before);
            if best.is_none_or(|(least, _)| took < least) {
                let tsc = before.wrapping_add(took / 2);
                best = Some((took, Moment { tsc, clock_ns }));
            }
        }
        best.map(|(_, moment)| moment)
            .ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    /// Sets the counter so that it stands at `tsc` when the clock stands at `clock_ns`; where the clock
    /// was not set and has not come to that, now.
    fn write_tsc(&self, tsc: u64, clock_ns: u64) -> io::Result<()> {
        let now = self.moment()?;
        let since = now.clock_ns.saturating_sub(clock_ns);
        let ticks = u128::from(since) * u128::from(self.tsc_khz) / 1_000_000;
        let wanted = tsc.wrapping_add(ticks as u64);
        if self.tsc_offset {
            let offset = sys::tsc_offset(&self.fd)?;
            let offset = offset.wrapping_add(wanted.wrapping_sub(now.tsc));
            let offset = self.vm.tsc_offset.common(self.id, offset, self.tsc_khz);
            return sys::set_tsc_offset(&self.fd, offset);
        }
        // A value within a second of what the kernel expects is taken for an attempt to keep
        // counters in step and rounded; one that is far off is not, so that the value after it
        // becomes exact to the moment of the call.
        let far = wanted.wrapping_add(u64::from(self.tsc_khz) * 10_000);
        for value in [far, wanted] {
            msrs::write(&self.fd, &[(msr::IA32_TSC, value)], |_, _| {
                Err(io::Error::from(io::ErrorKind::InvalidInput))
            })?;
        }
        Ok(())
    }

    /// Registers that this kernel doesn't have, or not for this CPU model, and that the guest needs.
    fn check_msrs(&self, values: &[(u32, u64)]) -> Result<(), StateError> {
        let indices: Vec<u32> = values.iter().map(|(index, _)| *index).collect();
        let here = msrs::read(&self.fd, &indices)
            .map_err(self.backend("read the model-specific registers"))?;
        let missing = values.iter().find(|(index, value)| {
            !here.iter().any(|msr| msr.0 == *index) && msr::dispensable(*index, *value).is_none()
        });
        match missing {
            None => Ok(()),
            Some((index, value)) => Err(StateError::Invalid {
                field: "MSR list",
                reason: format!("KVM here has no register {index:#x}, which holds {value:#x}"),
            }),
        }
    }

    fn write_msrs(&self, values: &[(u32, u64)]) -> Result<(), StateError> {
        msrs::write(&self.fd, values, |index, value| {
            let same = msrs::read(&self.fd, &[index])?.first() == Some(&(index, value));
            match msr::dispensable(index, value) {
                _ if same => {}
                Some(why) => {
                    tracing::debug!(index, value, why, "model-specific register left as it is");
                }
                None => {
                    return Err(io::Error::other(format!(
                        "KVM refuses {value:#x} for register {index:#x}"
                    )));
                }
            }
            Ok(())
        })
        .map_err(self.backend("set the model-specific registers"))
    }

    fn write_lapic(&self, lapic: &LocalApicState) -> Result<(), StateError> {
        self.fd
            .set_lapic(&convert::lapic_to(lapic))
            .map_err(self.backend("set the local APIC"))?;
        if lapic.tsc_deadline == 0 {
            return Ok(());
        }
        msrs::write(
            &self.fd,
            &[(msr::IA32_TSC_DEADLINE, lapic.tsc_deadline)],
            |_, _| Err(io::Error::from(io::ErrorKind::InvalidInput)),
        )
        .map_err(self.backend("arm the local APIC's timer"))
    }
}
