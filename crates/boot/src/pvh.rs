//! The PVH entry: `hvm_start_info` version 1 (Xen public headers, arch-x86/hvm/start_info.h).

use crate::LoadError;
use crate::elf::Elf;
use crate::entry::Entry;
use crate::load::{BootInputs, LowMemory};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const START_INFO_SIZE: usize = 56;
const MODULE_SIZE: usize = 32;
const MAP_ENTRY_SIZE: usize = 24;
/// No protocol limit; Linux copies at most 2 KiB.
const COMMAND_LINE_MAX: usize = 2047;

/// Loads the kernel `file`, parsed as `elf`, to be entered at `eip`.
pub(crate) fn load(
    inputs: &BootInputs<'_>,
    name: &str,
    file: &[u8],
    elf: &Elf,
    eip: u32,
) -> Result<Entry, LoadError> {
    inputs.load_segments(name, file, &elf.segments)?;
    let command_line = inputs.command_line(name, COMMAND_LINE_MAX)?;
    let initrd = match inputs.initrd {
        Some(initrd) => Some(inputs.load_initrd(initrd, elf.extent().end, u64::MAX)?),
        None => None,
    };
    let map = inputs.map.e820();
    let size = START_INFO_SIZE + MODULE_SIZE + map.len() * MAP_ENTRY_SIZE + command_line.len();
    let no_room = LoadError::TablesTooLarge {
        what: "PVH start information and command line",
        size,
        limit: crate::layout::EBDA_START as usize,
    };
    let at = LowMemory::new(&elf.segments).place(size).ok_or(no_room)?;
    let modules_at = at + START_INFO_SIZE as u64;
    let map_at = modules_at + MODULE_SIZE as u64;
    let line_at = map_at + (map.len() * MAP_ENTRY_SIZE) as u64;

    let mut info = Vec::with_capacity(size);
    let mut long = |value: u64| info.extend_from_slice(&value.to_le_bytes());
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    long(pair(MAGIC, VERSION));
    long(pair(0, u32::from(initrd.is_some()))); // flags, nr_modules
    long(modules_at);
    long(line_at);
    long(inputs.rsdp.unwrap_or(0));
    long(map_at);
    long(pair(map.len() as u32, 0));
    let module = initrd.map_or([0; 4], |range| [range.start, range.len(), 0, 0]);
    module.into_iter().for_each(&mut long);
    for entry in &map {
        long(entry.range.start);
        long(entry.range.len());
        long(pair(entry.kind as u32, 0));
    }
    info.extend_from_slice(&command_line);
    inputs.write("PVH start information", at, &info)?;
    let entry = Entry::Pvh {
        eip,
        start_info: at as u32,
    };
    inputs.write_common(&entry)?;
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{u32_at, u64_at};
    use crate::elf;
    use crate::load::NamedBytes;
    use crate::load::tests::memory;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn start_info_names_line_module_and_map() {
        let (ram, map) = memory(16 << 20);
        let inputs = BootInputs {
            ram: &ram,
            map: &map,
            command_line: "quiet",
            initrd: Some(NamedBytes {
                name: "i",
                bytes: b"disk",
            }),
            rsdp: Some(0xe_0000),
        };
        let file = elf::tests::sample(0x10_0000, &[0x90; 64], 0, Some(0x10_0000));
        let elf = elf::parse(&file).unwrap();
        let entry = load(&inputs, "k", &file, &elf, 0x10_0000).unwrap();
        let Entry::Pvh { start_info, .. } = entry else {
            panic!("{entry:?}");
        };
        let mut info = [0; 256];
        ram.read_slice(&mut info, GuestAddress(start_info.into()))
            .unwrap();
        assert_eq!(u32_at(&info, 0), Some(MAGIC));
        assert_eq!(u32_at(&info, 12), Some(1));
        let line = u64_at(&info, 24).unwrap();
        assert_eq!(
            ram.read_obj::<[u8; 6]>(GuestAddress(line)).unwrap(),
            *b"quiet\0"
        );
        let module = u64_at(&info, 16).unwrap();
        let place = ram.read_obj::<u64>(GuestAddress(module)).unwrap();
        assert_eq!(
            ram.read_obj::<[u8; 4]>(GuestAddress(place)).unwrap(),
            *b"disk"
        );
        assert_eq!(u32_at(&info, 48), Some(4));
    }
}
