//! Registers in words, for crash reports.

use std::fmt::Write;

use skerry_hypervisor::BootRegisters;
use skerry_hypervisor::state::Segment;

const NAMES: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
    "R14", "R15",
];
const SEGMENTS: [&str; 6] = ["ES", "CS", "SS", "DS", "FS", "GS"];

/// The registers of processor `cpu` as lines of text.
pub(crate) fn registers(cpu: u32, registers: &BootRegisters) -> String {
    let BootRegisters { general, system } = registers;
    let mut text = format!(
        "CPU {cpu}: RIP {:#018x}  RFLAGS {:#x}\n",
        general.rip, general.rflags
    );
    // Writing to a string can't fail.
    for (n, (name, value)) in NAMES.iter().zip(general.gpr).enumerate() {
        let end = if n % 4 == 3 { "\n" } else { "" };
        let _ = write!(text, "  {name:>3} {value:016x}{end}");
    }
    for (name, value) in [
        ("CR0", system.cr0),
        ("CR2", system.cr2),
        ("CR3", system.cr3),
        ("CR4", system.cr4),
        ("EFER", system.efer),
    ] {
        let _ = write!(text, "  {name} {value:x}");
    }
    text.push('\n');
    for (name, segment) in SEGMENTS.iter().zip(&system.segments) {
        text.push_str(&describe(name, segment));
    }
    text.push_str(&describe("TR", &system.tr));
    let _ = writeln!(
        text,
        "  GDT {:x}+{:x}  IDT {:x}+{:x}",
        system.gdt.base, system.gdt.limit, system.idt.base, system.idt.limit
    );
    text
}

fn describe(name: &str, segment: &Segment) -> String {
    format!(
        "  {name} {:04x} base {:x} limit {:x} attributes {:04x}{}\n",
        segment.selector,
        segment.base,
        segment.limit,
        segment.attributes,
        if segment.unusable { " unusable" } else { "" }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_is_named() {
        let mut values = BootRegisters::default();
        values.general.rip = 0xffff_ffff_8100_0000;
        values.general.gpr[15] = 0x1234;
        values.system.cr2 = 0xdead;
        let text = registers(1, &values);
        assert!(text.starts_with("CPU 1: RIP 0xffffffff81000000"));
        assert!(
            text.contains("R15 0000000000001234\n") && text.contains("CR2 dead"),
            "{text}"
        );
        for name in NAMES.iter().chain(&SEGMENTS) {
            assert!(text.contains(name));
        }
    }
}
