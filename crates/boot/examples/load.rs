//! Parses and loads a kernel, and says how long each takes: `load KERNEL`.

use std::time::Instant;

use skerry_boot::{BootInputs, Kernel, MemoryMap};
use skerry_hypervisor::GuestRam;
use vm_memory::GuestAddress;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("give a kernel")?;
    let start = Instant::now();
    let bytes = std::fs::read(&path)?;
    let read = start.elapsed();
    let kernel = Kernel::parse(&path, &bytes)?;
    let parsed = start.elapsed();
    let map = MemoryMap::new(1 << 30).ok_or("bad size")?;
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 30)])?;
    let inputs = BootInputs {
        ram: &ram,
        map: &map,
        command_line: "",
        initrd: None,
        rsdp: None,
    };
    let entry = kernel.load(&inputs)?;
    println!(
        "{}: read {read:?}, parsed {:?}, loaded {:?}, entry {:#x}",
        kernel.format(),
        parsed - read,
        start.elapsed() - parsed,
        entry.rip()
    );
    Ok(())
}
