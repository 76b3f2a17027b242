//! Processors of one machine: cores of one package, no hyper-threads, caches of a common size.

use super::Builder;

const HTT: u32 = 1 << 28;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// Data, instruction or unified; level; KiB; ways; whether all processors share it.
const CACHES: [(u32, u32, u32, u32, bool); 4] = [
    (1, 1, 32, 8, false),
    (2, 1, 32, 8, false),
    (3, 2, 512, 8, false),
    (3, 3, 16 * 1024, 16, true),
];
const LINE: u32 = 64;

/// Bits of an APIC id that tell `cpus` processors apart.
fn id_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

/// Adds processor `id` of `cpus` to the leaves that tell it.
pub(super) fn add(table: &mut Builder<'_>, cpus: u32, id: u32) {
    let intel = table.is_intel();
    for entry in &mut table.entries {
        let result = &mut entry.result;
        match entry.leaf {
            1 => {
                result.ebx |= id << 24 | cpus.min(255) << 16;
                if cpus > 1 {
                    result.edx |= HTT;
                }
            }
            0x8000_0001 if !intel => result.ecx |= TOPOLOGY_EXTENSIONS,
            0x8000_0008 if !intel => result.ecx |= id_bits(cpus) << 12 | (cpus - 1),
            _ => {}
        }
    }
    for leaf in [0xb, 0x1f] {
        // Threads of a core: one. Cores of the package: all.
        table.push(leaf, Some(0), [0, 1, 0x100, id]);
        table.push(leaf, Some(1), [id_bits(cpus), cpus, 0x201, id]);
        table.push(leaf, Some(2), [0, 0, 2, id]);
    }
    for (&(kind, level, kib, ways, shared), subleaf) in CACHES.iter().zip(0..) {
        let sharing = if shared { cpus - 1 } else { 0 };
        let sets = kib * 1024 / LINE / ways;
        let eax = kind | level << 5 | 1 << 8 | sharing << 14;
        let geometry = [(LINE - 1) | (ways - 1) << 22, sets - 1];
        if intel {
            let eax = eax | ((1 << id_bits(cpus)) - 1) << 26;
            table.push(4, Some(subleaf), [eax, geometry[0], geometry[1], 0]);
        } else {
            table.push(
                0x8000_001d,
                Some(subleaf),
                [eax, geometry[0], geometry[1], 0],
            );
        }
    }
    if !intel {
        // L1 (data and instruction: lines, ways, KiB), then L2 and L3 (AMD APM 3 §E.4.4–5; ways
        // encoded 6 for 8 and 8 for 16, L3 in units of 512 KiB).
        table.push(
            0x8000_0005,
            None,
            [
                0,
                0,
                32 << 24 | 8 << 16 | 1 << 8 | LINE,
                32 << 24 | 8 << 16 | 1 << 8 | LINE,
            ],
        );
        table.push(
            0x8000_0006,
            None,
            [
                0,
                0,
                512 << 16 | 6 << 12 | 1 << 8 | LINE,
                32 << 18 | 8 << 12 | 1 << 8 | LINE,
            ],
        );
        table.push(0x8000_001e, None, [id, id, 0, 0]);
    }
}
