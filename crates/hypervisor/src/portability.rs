//! Whether a guest that was started elsewhere can go on here, and what it loses.
//!
//! ```text
//!   CPUID tables of the saved machine ─┐
//!   bytes of its memory ───────────────┼─► check ─► Ok(what to tell the user) or NotPortable
//!   Capabilities of the backend here ──┘            ▼
//!                    the machine is built with the saved tables, whatever the backend
//! ```
//!
//! A guest believes for ever what CPUID told it when it started. So a machine that is restored is
//! given the tables that it had, not those that a new machine would get here, and they must be true
//! here: every instruction and register that they show exists, state lies where they say, the
//! time-stamp counter has their frequency. What only tells that the processor is free of a fault of
//! speculation may be untrue: the guest goes on, less well defended than it thinks, and the user is
//! told.

use std::fmt;

use thiserror::Error;

use crate::cpu_model::features;
use crate::cpuid::CpuidTable;
use crate::traits::Capabilities;
use crate::validate::StateLimits;

/// Frequencies that differ by less than this many millionths are taken for the same: a guest's clock
/// is corrected by as much, and KVM takes them so.
pub const TSC_TOLERANCE_PPM: u32 = 250;

/// The guest can't go on here.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "The guest can't go on with {backend} here: {}; {}",
    sentence(.problems),
    self.remedy()
)]
pub struct NotPortable {
    /// The backend, as `--hypervisor` takes it.
    pub backend: &'static str,
    /// What is in the way; at least one.
    pub problems: Vec<Problem>,
}

/// Something in the way of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// It was shown features that aren't here, by name.
    Features(Vec<String>),
    /// Its counter has another frequency than this one's, which can't be changed. Both in kHz.
    TscFrequency {
        /// The guest's.
        guest: u32,
        /// The one here.
        here: u32,
    },
    /// A component of extended processor state lies elsewhere, or isn't here.
    ExtendedState {
        /// Its bit in XCR0.
        component: u32,
    },
    /// Its memory goes past the physical addresses of the processor here.
    Memory {
        /// Bits of the guest's addresses.
        guest_bits: u8,
        /// Bits of those here.
        bits: u8,
    },
    /// It has more processors than a machine can have here.
    Processors {
        /// The guest's.
        guest: usize,
        /// The most here.
        most: u32,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Features(names) => write!(
                f,
                "it was shown {}, which this processor doesn't have",
                list(names)
            ),
            Self::TscFrequency { guest, here } => write!(
                f,
                "its time-stamp counter runs at {guest} kHz, and this one's {here} kHz can't be scaled"
            ),
            Self::ExtendedState { component } => write!(
                f,
                "this processor keeps component {component} of its extended state elsewhere"
            ),
            Self::Memory { guest_bits, bits } => write!(
                f,
                "its memory needs {guest_bits} bits of physical address, and this processor has {bits}"
            ),
            Self::Processors { guest, most } => {
                write!(f, "it has {guest} processors, of at most {most} here")
            }
        }
    }
}

fn list(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

fn sentence(problems: &[Problem]) -> String {
    let texts: Vec<String> = problems.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

impl NotPortable {
    /// What the user can do.
    fn remedy(&self) -> String {
        let mut changes = String::new();
        for problem in &self.problems {
            match problem {
                Problem::Features(names) => {
                    for name in names.iter().filter(|name| !name.contains(' ')) {
                        changes.push_str(",-");
                        changes.push_str(name);
                    }
                }
                Problem::TscFrequency { here, .. } => {
                    changes.push_str(&format!(",tsc-khz={here}"));
                }
                _ => {}
            }
        }
        let mut remedy = String::from("restore it on a host like the one it was started on");
        if self.backend != "soft" {
            remedy.push_str(", or with --hypervisor soft");
        }
        if !changes.is_empty() {
            remedy.push_str(&format!(
                ", or start it with --cpu-model MODEL{changes} to have it travel here"
            ));
        }
        remedy
    }
}

/// What a guest loses by going on here: a sentence for the user each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// It was shown that the processor is free of faults, or has a defence, by name; here it isn't, or
    /// has not.
    Defences(Vec<String>),
    /// It was shown a processor of another vendor, whose faults are others.
    Vendor {
        /// What it was shown.
        guest: String,
        /// What it is.
        here: String,
    },
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Defences(names) => write!(
                f,
                "the guest counts on {}, which this processor doesn't have: it does not defend its \
                 kernel against its own programs as it would if it had been started here",
                list(names)
            ),
            Self::Vendor { guest, here } => write!(
                f,
                "the guest was started on a processor of {guest} and defends its kernel against its \
                 own programs as that needs, not as {here}'s do"
            ),
        }
    }
}

/// Checks that a guest with these CPUID tables and that many bytes of memory can go on with the backend
/// of `here`, before anything is made for it. Gives what the user should be told if it does.
pub fn check(
    tables: &[CpuidTable],
    memory: u64,
    here: &Capabilities,
) -> Result<Vec<Loss>, NotPortable> {
    let accepted = &here.accepted_cpuid;
    let mut problems = Vec::new();
    if tables.len() > here.max_vcpus as usize {
        problems.push(Problem::Processors {
            guest: tables.len(),
            most: here.max_vcpus,
        });
    }
    // All are alike but for their numbers.
    let features = merged(tables, |table| table.missing_from(accepted));
    if !features.is_empty() {
        problems.push(Problem::Features(features));
    }
    for table in tables {
        let found = [
            frequency(table, here),
            addresses(table, memory, here),
            extended_state(table, accepted),
        ];
        for problem in found.into_iter().flatten() {
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        }
    }
    if !problems.is_empty() {
        return Err(NotPortable {
            backend: here.name,
            problems,
        });
    }
    let mut losses = Vec::new();
    let defences = merged(tables, |table| features::undefended(table, accepted));
    if !defences.is_empty() {
        losses.push(Loss::Defences(defences));
    }
    let vendors = tables.first().and_then(vendor).zip(vendor(accepted));
    if let Some((guest, here)) = vendors.filter(|(guest, other)| here.native && guest != other) {
        losses.push(Loss::Vendor { guest, here });
    }
    Ok(losses)
}

fn merged(tables: &[CpuidTable], names: impl Fn(&CpuidTable) -> Vec<String>) -> Vec<String> {
    let mut all = Vec::new();
    for name in tables.iter().flat_map(names) {
        if !all.contains(&name) {
            all.push(name);
        }
    }
    all
}

/// Whether two frequencies, in kHz, are as good as equal.
pub fn same_frequency(one: u32, other: u32) -> bool {
    let tolerance = u64::from(one) * u64::from(TSC_TOLERANCE_PPM);
    u64::from(one.abs_diff(other)) * 1_000_000 <= tolerance
}

fn frequency(table: &CpuidTable, here: &Capabilities) -> Option<Problem> {
    let guest = table.tsc_khz()?;
    let fits = here.tsc_scaling || same_frequency(here.tsc_khz, guest);
    (!fits).then_some(Problem::TscFrequency {
        guest,
        here: here.tsc_khz,
    })
}

/// A guest may be told of more bits than there are, as long as it has nothing to find there.
fn addresses(table: &CpuidTable, memory: u64, here: &Capabilities) -> Option<Problem> {
    /// Where RAM goes on past the hole for devices, at the most.
    const HOLE_END: u64 = 1 << 32;
    let bits = here.physical_address_bits;
    let told = StateLimits::of(table, true).physical_address_bits;
    let last = memory.saturating_add(HOLE_END).saturating_sub(1);
    let needed = u64::BITS.saturating_sub(last.leading_zeros()) as u8;
    (told > bits && needed > bits).then_some(Problem::Memory {
        guest_bits: needed,
        bits,
    })
}

fn extended_state(table: &CpuidTable, accepted: &CpuidTable) -> Option<Problem> {
    let components = table.get(0xd, 0).unwrap_or_default().eax;
    (2..32)
        .filter(|component| components & (1 << component) != 0)
        .find(|component| {
            let region = |table: &CpuidTable| table.get(0xd, *component).map(|r| (r.eax, r.ebx));
            region(table) != region(accepted)
        })
        .map(|component| Problem::ExtendedState { component })
}

fn vendor(table: &CpuidTable) -> Option<String> {
    let leaf = table.get(0, 0)?;
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx]
        .map(u32::to_le_bytes)
        .concat();
    Some(match bytes.as_slice() {
        b"GenuineIntel" => "Intel".to_owned(),
        b"AuthenticAMD" => "AMD".to_owned(),
        other => String::from_utf8_lossy(other).trim().to_owned(),
    })
}

#[cfg(test)]
mod tests;
