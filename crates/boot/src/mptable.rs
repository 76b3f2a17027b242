//! The MP configuration table (MultiProcessor Specification 1.4), for kernels without ACPI.

use crate::LoadError;
use crate::bytes::put;
use crate::layout;
use crate::load::BootInputs;
use crate::platform::Platform;

const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;
const ROOM: usize = (layout::GENERATION_ID - layout::MP_TABLE_START) as usize;
const SPEC_REVISION: u8 = 4;
/// Version register of an integrated xAPIC.
const APIC_VERSION: u8 = 0x14;
/// Most processors that 8-bit ids leave room for beside the I/O APIC.
const MAX_CPUS: u32 = 254;
const ISA_BUS: u8 = 0;

/// Interrupt kinds of table 4-11.
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
/// Polarity and trigger of table 4-10: as the bus has it; active high and level.
const CONFORMS: u16 = 0;
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

/// The floating pointer and, right after it, the table, to be put at `base`.
pub fn table(platform: &Platform, base: u32) -> Vec<u8> {
    let cpus = platform.cpus.min(MAX_CPUS) as u8;
    let mut entries: Vec<u8> = Vec::new();
    let mut count = 0_u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..cpus {
        const ENABLED: u8 = 1;
        const BOOT: u8 = 2;
        let mut entry = [0; 20];
        let flags = if id == 0 { ENABLED | BOOT } else { ENABLED };
        put(&mut entry, 0, &[0, id, APIC_VERSION, flags]);
        put(&mut entry, 4, &0x600_u32.to_le_bytes());
        put(&mut entry, 8, &0x201_u32.to_le_bytes()); // FPU, APIC
        add(&entry);
    }
    add(b"\x01\x00ISA   ");
    let [a, b, c, d] = platform.ioapic_base.to_le_bytes();
    add(&[2, platform.ioapic_id, 0x11, 1, a, b, c, d]);
    let mut interrupt = |kind: u8, flags: u16, irq: u8, pin: u8| {
        let [low, high] = flags.to_le_bytes();
        add(&[3, kind, low, high, ISA_BUS, irq, platform.ioapic_id, pin]);
    };
    interrupt(EXTINT, CONFORMS, 0, 0);
    for pin in 1..platform.ioapic_pins.min(240) as u8 {
        let level = pin == platform.power.sci || pin >= 16;
        let flags = if level { ACTIVE_HIGH_LEVEL } else { CONFORMS };
        // The PIT is on pin 2, where the cascade would be.
        let irq = if pin == 2 { 0 } else { pin };
        interrupt(VECTORED, flags, irq, pin);
    }
    for (kind, lint) in [(EXTINT, 0), (NMI, 1)] {
        add(&[4, kind, 0, 0, ISA_BUS, 0, 0xff, lint]);
    }

    let mut out = vec![0; POINTER_SIZE + HEADER_SIZE];
    put(&mut out, 0, b"_MP_");
    put(&mut out, 4, &(base + POINTER_SIZE as u32).to_le_bytes());
    put(&mut out, 8, &[1, SPEC_REVISION]);
    let header = &mut out[POINTER_SIZE..];
    put(header, 0, b"PCMP");
    put(
        header,
        4,
        &((HEADER_SIZE + entries.len()) as u16).to_le_bytes(),
    );
    header[6] = SPEC_REVISION;
    put(header, 8, b"SKERRY  VIRTUAL MACH");
    put(header, 34, &count.to_le_bytes());
    put(header, 36, &platform.lapic_base.to_le_bytes());
    out.extend_from_slice(&entries);
    out[10] = checksum(&out[..POINTER_SIZE]);
    out[POINTER_SIZE + 7] = checksum(&out[POINTER_SIZE..]);
    out
}

/// Writes pointer and table below 1 MiB.
pub fn write(inputs: &BootInputs<'_>, platform: &Platform) -> Result<(), LoadError> {
    let table = table(platform, layout::MP_TABLE_START as u32);
    if table.len() > ROOM {
        return Err(LoadError::TablesTooLarge {
            what: "MP table",
            size: table.len(),
            limit: ROOM,
        });
    }
    inputs.write("MP table", layout::MP_TABLE_START, &table)
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, b| sum.wrapping_sub(*b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u16_at, u32_at};
    use crate::platform::sample;

    #[test]
    fn the_table_adds_up() {
        for cpus in [1, 4, 1000] {
            let table = table(&sample(cpus), 0xf_0000);
            let sum = |b: &[u8]| b.iter().fold(0_u8, |s, b| s.wrapping_add(*b));
            assert_eq!((sum(&table[..16]), sum(&table[16..])), (0, 0));
            assert_eq!(u32_at(&table, 4), Some(0xf_0010));
            assert_eq!(u16_at(&table, 20).unwrap() as usize, table.len() - 16);
            let (mut entries, mut count) = (&table[60..], 0);
            let mut processors = 0;
            while let [kind, ..] = *entries {
                processors += u32::from(kind == 0);
                count += 1;
                entries = &entries[if kind == 0 { 20 } else { 8 }..];
            }
            assert_eq!(u16_at(&table, 16 + 34), Some(count));
            assert_eq!(processors, cpus.min(MAX_CPUS));
        }
    }
}
