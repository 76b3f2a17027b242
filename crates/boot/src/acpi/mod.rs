//! ACPI tables (ACPI 6.5 §5.2): RSDP, XSDT, FADT, FACS, MADT and the DSDT's AML.
//!
//! Not hardware-reduced: kernels from before that profile, and those that read fixed registers
//! for the timer and for power-off, find what they know.

mod dsdt;

use acpi_tables::sdt::Sdt;

use crate::LoadError;
use crate::bytes::put;
use crate::layout;
use crate::load::BootInputs;
use crate::platform::{Platform, PowerManagement};

const OEM: [u8; 6] = *b"SKERRY";
const OEM_TABLE: [u8; 8] = *b"SKERRYVM";
const OEM_REVISION: u32 = 1;
/// The tables' place: up to the MP table.
const ROOM: usize = (layout::MP_TABLE_START - layout::ACPI_START) as usize;
const RSDP_SIZE: usize = 36;
const FACS_SIZE: usize = 64;
const HEADER_SIZE: usize = 36;

/// The tables as one block of bytes to be put at `base`; the RSDP comes first.
pub fn tables(platform: &Platform, base: u64) -> Vec<u8> {
    let mut block = vec![0; RSDP_SIZE];
    // Every table on a 64-byte boundary, which the FACS must have.
    let mut add = |table: &[u8]| {
        block.resize(block.len().next_multiple_of(64), 0);
        let address = base + block.len() as u64;
        block.extend_from_slice(table);
        address
    };
    let facs = add(&facs());
    let dsdt = add(table(*b"DSDT", 2, &dsdt::aml(platform)).as_slice());
    let fadt = add(fadt(platform, facs, dsdt).as_slice());
    let madt = add(madt(platform).as_slice());
    let entries = [fadt, madt];
    let body: Vec<u8> = entries.iter().flat_map(|a| a.to_le_bytes()).collect();
    let xsdt = add(table(*b"XSDT", 1, &body).as_slice());
    put(&mut block, 0, &rsdp(xsdt));
    block
}

/// Writes the tables below 1 MiB and returns the address of the RSDP.
pub fn write(inputs: &BootInputs<'_>, platform: &Platform) -> Result<u64, LoadError> {
    let block = tables(platform, layout::ACPI_START);
    if block.len() > ROOM {
        return Err(LoadError::TablesTooLarge {
            what: "ACPI tables",
            size: block.len(),
            limit: ROOM,
        });
    }
    inputs.write("ACPI tables", layout::ACPI_START, &block)?;
    Ok(layout::ACPI_START)
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let header = HEADER_SIZE as u32;
    let mut table = Sdt::new(signature, header, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, b| sum.wrapping_sub(*b))
}

/// §5.2.5.3. No RSDT: every 64-bit kernel reads the XSDT.
fn rsdp(xsdt: u64) -> [u8; RSDP_SIZE] {
    let mut rsdp = [0; RSDP_SIZE];
    put(&mut rsdp, 0, b"RSD PTR ");
    put(&mut rsdp, 9, &OEM);
    rsdp[15] = 2;
    put(&mut rsdp, 20, &(RSDP_SIZE as u32).to_le_bytes());
    put(&mut rsdp, 24, &xsdt.to_le_bytes());
    rsdp[8] = checksum(&rsdp[..20]);
    rsdp[32] = checksum(&rsdp);
    rsdp
}

/// §5.2.10: a lock and a waking vector that nobody uses.
fn facs() -> [u8; FACS_SIZE] {
    let mut facs = [0; FACS_SIZE];
    put(&mut facs, 0, b"FACS");
    put(&mut facs, 4, &(FACS_SIZE as u32).to_le_bytes());
    facs[32] = 2;
    facs
}

/// A generic address of a register of `bytes` bytes in I/O space (§5.2.3.2).
fn io_register(port: u16, bytes: u8) -> [u8; 12] {
    let mut gas = [0; 12];
    gas[0] = 1;
    gas[1] = bytes * 8;
    gas[3] = match bytes {
        1 => 1,
        2 => 2,
        _ => 3,
    };
    put(&mut gas, 4, &u64::from(port).to_le_bytes());
    gas
}

/// §5.2.9, table 5.9, by offset.
fn fadt(platform: &Platform, facs: u64, dsdt: u64) -> Sdt {
    const SIZE: usize = 276;
    const WBINVD: u32 = 1;
    const PROC_C1: u32 = 1 << 2;
    const SLP_BUTTON: u32 = 1 << 5;
    const FIX_RTC: u32 = 1 << 6;
    const TMR_VAL_EXT: u32 = 1 << 8;
    const RESET_REG_SUP: u32 = 1 << 10;
    const HEADLESS: u32 = 1 << 12;
    // IAPC_BOOT_ARCH: ISA devices, no VGA. The keyboard controller resets and has no keyboard:
    // it is left out so that no driver waits for one.
    const LEGACY_DEVICES: u16 = 1;
    const NO_VGA: u16 = 1 << 2;

    let PowerManagement {
        pm1_event,
        pm1_control,
        timer,
        gpe0,
        gpe0_len,
        sci,
        s5_sleep_type: _,
        reset_port,
        reset_value,
    } = platform.power;
    let mut t = table(*b"FACP", 6, &[0; SIZE - HEADER_SIZE]);
    t.write_u32(36, facs as u32);
    t.write_u32(40, dsdt as u32);
    t.write_u16(46, sci.into());
    t.write_u32(56, pm1_event.into());
    t.write_u32(64, pm1_control.into());
    t.write_u32(76, timer.into());
    t.write_u32(80, gpe0.into());
    t.write_bytes(88, &[4, 2, 0, 4, gpe0_len]);
    // C2 and C3 latencies that say "not there" (§5.2.9, P_LVL2_LAT and P_LVL3_LAT).
    t.write_u16(96, 101);
    t.write_u16(98, 1001);
    t.write_u8(108, platform.rtc_century);
    t.write_u16(109, LEGACY_DEVICES | NO_VGA);
    let flags = WBINVD | PROC_C1 | SLP_BUTTON | FIX_RTC | TMR_VAL_EXT | RESET_REG_SUP | HEADLESS;
    t.write_u32(112, flags);
    t.write_bytes(116, &io_register(reset_port, 1));
    t.write_u8(128, reset_value);
    t.write_u8(131, 5);
    t.write_u64(140, dsdt);
    t.write_bytes(148, &io_register(pm1_event, 4));
    t.write_bytes(172, &io_register(pm1_control, 2));
    t.write_bytes(208, &io_register(timer, 4));
    t.write_bytes(220, &io_register(gpe0, gpe0_len));
    t.write_bytes(268, b"SKERRY\0\0");
    t
}

/// §5.2.12. Processors with an id that 8 bits can't hold are x2APIC entries.
fn madt(platform: &Platform) -> Sdt {
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    const ACTIVE_HIGH_LEVEL: u16 = 0b1101;
    const ALL_PROCESSORS: u8 = 0xff;
    const ALL_X2_PROCESSORS: u32 = 0xffff_ffff;

    let mut body = Vec::new();
    body.extend_from_slice(&platform.lapic_base.to_le_bytes());
    body.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..platform.cpus {
        match u8::try_from(id) {
            Ok(id) if id != u8::MAX => {
                body.extend_from_slice(&[0, 8, id, id]);
                body.extend_from_slice(&ENABLED.to_le_bytes());
            }
            _ => {
                body.extend_from_slice(&[9, 16, 0, 0]);
                for word in [id, ENABLED, id] {
                    body.extend_from_slice(&word.to_le_bytes());
                }
            }
        }
    }
    body.extend_from_slice(&[1, 12, platform.ioapic_id, 0]);
    body.extend_from_slice(&platform.ioapic_base.to_le_bytes());
    body.extend_from_slice(&0_u32.to_le_bytes());
    // ISA interrupt 0, the PIT, is wired to pin 2.
    let sci = platform.power.sci;
    for (irq, gsi, flags) in [(0, 2, 0), (sci, u32::from(sci), ACTIVE_HIGH_LEVEL)] {
        body.extend_from_slice(&[2, 10, 0, irq]);
        body.extend_from_slice(&gsi.to_le_bytes());
        body.extend_from_slice(&flags.to_le_bytes());
    }
    // NMI on LINT1 of all.
    body.extend_from_slice(&[4, 6, ALL_PROCESSORS, 0, 0, 1]);
    if platform.cpus > 255 {
        body.extend_from_slice(&[0x0a, 12, 0, 0]);
        body.extend_from_slice(&ALL_X2_PROCESSORS.to_le_bytes());
        body.extend_from_slice(&[1, 0, 0, 0]);
    }
    table(*b"APIC", 5, &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u32_at, u64_at};
    use crate::platform::sample;
    use std::process::Command;

    const BASE: u64 = layout::ACPI_START;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    fn at(block: &[u8], address: u64) -> &[u8] {
        let start = (address - BASE) as usize;
        let len = u32_at(block, start + 4).unwrap() as usize;
        &block[start..start + len]
    }

    /// FADT, MADT, DSDT, reached as a guest does.
    fn walk(block: &[u8]) -> [&[u8]; 3] {
        assert_eq!(&block[..8], b"RSD PTR ");
        assert_eq!((sum(&block[..20]), sum(&block[..36])), (0, 0));
        let xsdt = at(block, u64_at(block, 24).unwrap());
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let fadt = at(block, u64_at(xsdt, 36).unwrap());
        let madt = at(block, u64_at(xsdt, 44).unwrap());
        let dsdt = at(block, u64_at(fadt, 140).unwrap());
        let facs = u32_at(fadt, 36).unwrap();
        assert_eq!((facs % 64, &at(block, facs.into())[..4]), (0, &b"FACS"[..]));
        for (table, signature) in [(fadt, b"FACP"), (madt, b"APIC"), (dsdt, b"DSDT")] {
            assert_eq!((&table[..4], sum(table)), (&signature[..], 0));
        }
        [fadt, madt, dsdt]
    }

    #[test]
    fn a_guest_can_walk_the_tables() {
        for cpus in [1, 2, 255, 300] {
            let block = tables(&sample(cpus), BASE);
            assert!(block.len() <= ROOM);
            let [fadt, madt, _] = walk(&block);
            assert_eq!(fadt.len(), 276);
            let mut entries = &madt[44..];
            let mut found = 0;
            while let [kind, len, ..] = *entries {
                found += u32::from(matches!(kind, 0 | 9));
                entries = &entries[usize::from(len)..];
            }
            assert_eq!(found, cpus);
        }
    }

    #[test]
    fn too_many_processors_are_refused() {
        let (ram, map) = crate::load::tests::memory(4 << 20);
        let inputs = BootInputs {
            ram: &ram,
            map: &map,
            command_line: "",
            initrd: None,
            rsdp: None,
        };
        assert!(matches!(
            write(&inputs, &sample(5000)),
            Err(LoadError::TablesTooLarge { .. })
        ));
        assert_eq!(write(&inputs, &sample(2)).unwrap(), BASE);
    }

    /// ACPICA's own compiler must be able to read every table back, without a complaint.
    #[test]
    fn iasl_reads_the_tables() {
        if Command::new("iasl").arg("-v").output().is_err() {
            eprintln!("skipped: iasl (acpica-tools) is not installed");
            return;
        }
        let block = tables(&sample(2), BASE);
        let dir = tempfile::tempdir().unwrap();
        for (name, table) in ["facp", "apic", "dsdt"].iter().zip(walk(&block)) {
            let path = dir.path().join(format!("{name}.dat"));
            std::fs::write(&path, table).unwrap();
            let run = |args: &[&str], file: &std::path::Path| {
                let output = Command::new("iasl").args(args).arg(file).output().unwrap();
                let text = String::from_utf8_lossy(&output.stdout).into_owned()
                    + &String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{name}: {text}");
                text
            };
            let text = run(&["-d"], &path);
            assert!(
                !text.contains("rror") && !text.contains("nvalid"),
                "{name}: {text}"
            );
            let text = run(&["-we"], &path.with_extension("dsl"));
            assert!(text.contains("0 Errors"), "{name}: {text}");
            if *name == "dsdt" {
                let source = std::fs::read_to_string(path.with_extension("dsl")).unwrap();
                assert_eq!(source.matches("LNRO0005").count(), 10);
                assert!(source.contains("VM_Gen_Counter") && source.contains("_E05"));
                assert!(
                    source.contains("_S5") && source.contains("PNP0501"),
                    "{source}"
                );
            }
        }
    }
}
