//! Breakpoints and watchpoints.
//!
//! Software breakpoints are in the guest's memory only while the guest runs: whatever else looks at it, a
//! snapshot too, sees the program as it is.

use gdbstub::target::ext::breakpoints::WatchKind;
use skerry_hypervisor::state::DebugRegisters;

use super::memory::USER_END;

/// INT3.
pub(super) const INT3: u8 = 0xcc;

/// What a debug register stops at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hardware {
    /// An instruction that is about to run.
    Execute,
    /// A write, or any access, to so many bytes.
    Data { len: u64, kind: WatchKind },
}

/// A software breakpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Software {
    pub(super) address: u64,
    /// The byte that INT3 stands in for, while it does.
    pub(super) replaced: Option<u8>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Points {
    pub(super) software: Vec<Software>,
    hardware: [Option<(u64, Hardware)>; 4],
}

impl Points {
    /// More have no use; gdb has them all in the list that it sends anew for each stop.
    const MAX: usize = 4096;

    pub(super) fn add(&mut self, address: u64) -> bool {
        let known = self.software.iter().any(|point| point.address == address);
        if !known {
            if self.software.len() >= Self::MAX {
                return false;
            }
            self.software.push(Software {
                address,
                replaced: None,
            });
        }
        true
    }

    pub(super) fn remove(&mut self, address: u64) -> bool {
        let before = self.software.len();
        self.software.retain(|point| point.address != address);
        self.software.len() != before
    }

    /// Whether the guest has just executed one that ends at `next`.
    pub(super) fn is_software(&self, next: u64) -> bool {
        let at = next.wrapping_sub(1);
        self.software.iter().any(|point| point.address == at)
    }

    /// Takes free debug registers: one for each aligned piece of the range (Intel SDM 3B §18.2.5).
    pub(super) fn add_hardware(&mut self, address: u64, what: Hardware) -> bool {
        let mut pieces = Vec::new();
        match what {
            Hardware::Execute => pieces.push((address, what)),
            Hardware::Data { len, kind } => {
                let Some(end) = address.checked_add(len).filter(|_| len <= 32) else {
                    return false;
                };
                let mut at = address;
                while at < end {
                    let fits = |size: &u64| at.is_multiple_of(*size) && *size <= end - at;
                    let len = [8, 4, 2, 1].into_iter().find(fits).unwrap_or(1);
                    pieces.push((at, Hardware::Data { len, kind }));
                    at += len;
                }
            }
        }
        let free = self.hardware.iter().filter(|slot| slot.is_none()).count();
        if pieces.is_empty() || pieces.len() > free || address >= USER_END - 32 {
            return false;
        }
        let slots = self.hardware.iter_mut().filter(|slot| slot.is_none());
        for (slot, piece) in slots.zip(pieces) {
            *slot = Some(piece);
        }
        true
    }

    pub(super) fn remove_hardware(&mut self, address: u64, what: Hardware) -> bool {
        let mut found = false;
        for slot in &mut self.hardware {
            let same = match (*slot, what) {
                (Some((at, Hardware::Execute)), Hardware::Execute) => at == address,
                (Some((at, Hardware::Data { kind, .. })), Hardware::Data { len, kind: other }) => {
                    kind == other && at.wrapping_sub(address) < len
                }
                _ => false,
            };
            if same {
                *slot = None;
                found = true;
            }
        }
        found
    }

    /// Whether any debug register is in use.
    pub(super) fn has_hardware(&self) -> bool {
        self.hardware.iter().any(Option::is_some)
    }

    /// Whether the instruction at `rip` has a hardware breakpoint.
    pub(super) fn breaks_at(&self, rip: u64) -> bool {
        self.hardware.contains(&Some((rip, Hardware::Execute)))
    }

    /// What DR6 says was met; the first.
    pub(super) fn met(&self, dr6: u64) -> Option<(u64, Hardware)> {
        let bits = self.hardware.iter().enumerate();
        bits.filter(|(n, _)| dr6 >> n & 1 != 0)
            .find_map(|(_, point)| *point)
    }

    /// Sets DR0 to DR3 and DR7 (Intel SDM 3B §18.2.4).
    pub(super) fn set(&self, registers: &mut DebugRegisters) {
        for (n, point) in self.hardware.iter().enumerate() {
            let Some((address, what)) = *point else {
                continue;
            };
            let (condition, len) = match what {
                Hardware::Execute => (0, 0),
                Hardware::Data { len, kind } => {
                    let condition = match kind {
                        WatchKind::Write => 1,
                        WatchKind::Read | WatchKind::ReadWrite => 3,
                    };
                    let len = match len {
                        8 => 2,
                        4 => 3,
                        2 => 1,
                        _ => 0,
                    };
                    (condition, len)
                }
            };
            registers.address[n] = address;
            let local = 1_u64 << (2 * n);
            registers.dr7 |= local | (condition | len << 2) << (16 + 4 * n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn data(len: u64) -> Hardware {
        Hardware::Data {
            len,
            kind: WatchKind::Write,
        }
    }

    #[test]
    fn a_range_takes_a_register_for_each_aligned_piece() {
        let mut points = Points::default();
        assert!(points.add_hardware(0x1001, data(7)));
        let mut registers = DebugRegisters::default();
        points.set(&mut registers);
        assert_eq!(registers.address, [0x1001, 0x1002, 0x1004, 0]);
        // One, two and four bytes, on writes, all enabled.
        assert_eq!(registers.dr7, 0x0d51_0015);
        assert!(!points.add_hardware(0x2000, data(16)), "one is left");
        assert!(points.add_hardware(0x2000, Hardware::Execute));
        assert!(points.breaks_at(0x2000) && !points.breaks_at(0x1001));
        assert_eq!(points.met(0b1000), Some((0x2000, Hardware::Execute)));
        assert!(points.remove_hardware(0x1001, data(7)));
        assert!(!points.remove_hardware(0x1001, data(7)));
        assert!(points.remove_hardware(0x2000, Hardware::Execute));
        assert!(!points.has_hardware());
    }

    #[test]
    fn ranges_that_cannot_be_are_refused() {
        let mut points = Points::default();
        for (address, len) in [
            (0, 0),
            (u64::MAX, 8),
            (u64::MAX - 7, 8),
            (0x1000, 64),
            (0x1001, 30),
        ] {
            assert!(
                !points.add_hardware(address, data(len)),
                "{address:#x}+{len}"
            );
        }
        assert!(!points.add_hardware(u64::MAX, Hardware::Execute));
        assert!(!points.has_hardware());
    }
}
