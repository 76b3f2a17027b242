//! Model-specific registers, in batches.

use std::io;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

fn batch(entries: &[kvm_msr_entry]) -> io::Result<Msrs> {
    Msrs::from_entries(entries).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

/// Reads those of `indices` that can be read: the kernel lists some that this processor or this
/// CPU model does not have.
pub(crate) fn read(vcpu: &VcpuFd, indices: &[u32]) -> io::Result<Vec<(u32, u64)>> {
    let mut values = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let asked = left.len().min(KVM_MAX_MSR_ENTRIES);
        let entries: Vec<_> = left[..asked].iter().map(|index| entry(*index, 0)).collect();
        let mut msrs = batch(&entries)?;
        let got = vcpu.get_msrs(&mut msrs)?.min(asked);
        values.extend(
            msrs.as_slice()[..got]
                .iter()
                .map(|msr| (msr.index, msr.data)),
        );
        // The kernel stops at the first that it can't read.
        let skip = usize::from(got < asked);
        left = &left[got + skip..];
    }
    Ok(values)
}

/// Sets `values`; `refused` is told each that the kernel does not take, and ends the work with an
/// error of its own.
pub(crate) fn write<E: From<io::Error>>(
    vcpu: &VcpuFd,
    values: &[(u32, u64)],
    mut refused: impl FnMut(u32, u64) -> Result<(), E>,
) -> Result<(), E> {
    let mut left = values;
    while !left.is_empty() {
        let asked = left.len().min(KVM_MAX_MSR_ENTRIES);
        let entries: Vec<_> = left[..asked]
            .iter()
            .map(|(index, data)| entry(*index, *data))
            .collect();
        let msrs = batch(&entries)?;
        let set = vcpu.set_msrs(&msrs).map_err(io::Error::from)?.min(asked);
        if set < asked {
            let (index, data) = left[set];
            refused(index, data)?;
            left = &left[set + 1..];
        } else {
            left = &left[set..];
        }
    }
    Ok(())
}
