//! All of a processor's state, to and from the kernel.

use std::error::Error;
use std::io;

use skerry_hypervisor::state::{CPU_STATE_VERSION, LocalApicState};
use skerry_hypervisor::{BootRegisters, CpuState, Irqchip, StateError, msr};

use crate::sys::{self, XsaveBuffer};
use crate::vcpu::KvmVcpu;
use crate::{convert, msrs};

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
        self.vm.xsave2_size.max(4096)
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
        let BootRegisters { general, system } = registers;
        self.fd
            .set_sregs(&convert::system_to(system))
            .map_err(self.backend("set the system registers"))?;
        self.fd
            .set_regs(&convert::general_to(general))
            .map_err(self.backend("set the general registers"))?;
        self.page.set_cr8(system.cr8);
        Ok(())
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
            .read(&self.fd, self.vm.xsave2_size != 0)
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
        let tsc = find(msr::IA32_TSC);
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
        } = state;
        if self.has_apic() {
            self.fd
                .set_mp_state(convert::mp_state_to(*mp_state))
                .map_err(self.backend("set the activity state"))?;
        }
        self.fd
            .set_sregs(&convert::system_to(&system))
            .map_err(self.backend("set the system registers"))?;
        self.fd
            .set_regs(&convert::general_to(general))
            .map_err(self.backend("set the general registers"))?;
        self.page.set_cr8(system.cr8);
        self.write_xsave(*xcr0, xsave)?;
        self.fd
            .set_debug_regs(&convert::debug_to(debug))
            .map_err(self.backend("set the debug registers"))?;
        self.write_tsc(*tsc)
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

    fn write_xsave(&self, xcr0: u64, xsave: &[u8]) -> Result<(), StateError> {
        let mut xcrs = kvm_bindings::kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = xcr0;
        self.fd.set_xcrs(&xcrs).map_err(self.backend("set XCR0"))?;
        XsaveBuffer::from_bytes(self.xsave_buffer_size(), xsave)
            .and_then(|buffer| buffer.write(&self.fd))
            .map_err(self.backend("set the XSAVE area"))
    }

    fn write_tsc(&self, tsc: u64) -> io::Result<()> {
        if self.tsc_offset {
            let now = msrs::read(&self.fd, &[msr::IA32_TSC])?;
            let now = now.first().map_or(0, |msr| msr.1);
            // The host's counter in the guest's ticks.
            let host = now.wrapping_sub(sys::tsc_offset(&self.fd)?);
            let offset = tsc.wrapping_sub(host);
            let offset = self.vm.tsc_offset.common(self.id, offset, self.tsc_khz);
            return sys::set_tsc_offset(&self.fd, offset);
        }
        // A value within a second of what the kernel expects is taken for an attempt to keep
        // counters in step and rounded; one that is far off is not, so that the value after it
        // becomes exact to the moment of the call.
        let far = tsc.wrapping_add(u64::from(self.tsc_khz) * 10_000);
        for value in [far, tsc] {
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
