//! Where a guest's allocations come from: its records of them, added up by who made them.
//!
//! Records are the guest's word: each is checked, and there are only so many places.

use std::collections::HashMap;
use std::fmt;

use object::{Object, ObjectSymbol};
use skerry_sandbox_abi::{Reader, frames, log_kind};

use crate::sandbox::Sandbox;

/// Places that are told apart.
const PLACES: usize = 1 << 16;
/// Return addresses of one record; the guest's runtime sends fewer.
const FRAMES: usize = 64;
/// Of those that were found by looking at the stack, so many are kept: the nearest are the surest.
const SCANNED: usize = 6;

/// Counts of one place.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    allocations: u64,
    bytes: u64,
}

/// What a sandbox knows while it profiles.
#[derive(Debug, Default)]
pub(crate) struct Profile {
    /// By how the addresses were found, and the addresses.
    places: HashMap<(u8, Vec<u64>), Count>,
    /// Of places that are too many.
    others: Count,
    /// Functions of the program's file: address, size, name.
    symbols: Vec<(u64, u64, String)>,
}

impl Profile {
    /// Takes the functions' names from the program's file, if it has them.
    pub(crate) fn set_program(&mut self, file: &[u8]) {
        self.symbols = symbols(file);
    }

    /// Adds a record; `None` if it is none.
    pub(crate) fn add(&mut self, record: &[u8]) -> Option<()> {
        let mut from = Reader::new(record);
        let [kind, how] = from.array().ok()?;
        let number = from.u32().ok()? as usize;
        let known = matches!(how, frames::CHAIN | frames::SCAN);
        if kind != log_kind::ALLOCATION || !known || number > FRAMES {
            return None;
        }
        let mut word = || from.array().ok().map(u64::from_le_bytes);
        let bytes = word()?;
        let addresses = (0..number).map(|_| word()).collect::<Option<Vec<_>>>()?;
        let known = self.places.len();
        let key = (how, addresses);
        let count = match self.places.contains_key(&key) || known < PLACES {
            true => self.places.entry(key).or_default(),
            false => &mut self.others,
        };
        count.allocations = count.allocations.saturating_add(1);
        count.bytes = count.bytes.saturating_add(bytes);
        Some(())
    }
}

fn symbols(file: &[u8]) -> Vec<(u64, u64, String)> {
    let Ok(file) = object::File::parse(file) else {
        return Vec::new();
    };
    let functions = file.symbols().filter(|symbol| {
        symbol.kind() == object::SymbolKind::Text || symbol.name() == Ok("_start")
    });
    let mut symbols: Vec<_> = functions
        .filter_map(|symbol| {
            let name = rustc_demangle::demangle(symbol.name().ok()?);
            // Without the hash.
            Some((symbol.address(), symbol.size(), format!("{name:#}")))
        })
        .collect();
    symbols.sort();
    symbols
}

/// An address in the guest's program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeAddress {
    /// The address: where a call returns to.
    pub address: u64,
    /// The function that it lies in, if the program's file says so, and how far behind its start.
    pub function: Option<(String, u64)>,
}

impl fmt::Display for CodeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.function {
            Some((name, offset)) => write!(f, "{name}+{offset:#x}"),
            None => write!(f, "{:#x}", self.address),
        }
    }
}

/// A place that allocates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllocationSite {
    /// Who called whom, the innermost first.
    pub frames: Vec<CodeAddress>,
    /// Whether the frames are certain: the program was built with frame pointers. Else they are
    /// what lay on the stack, of which some may be left from calls that had ended.
    pub certain: bool,
    /// Allocations, growth of blocks included.
    pub allocations: u64,
    /// Bytes in all, those that were freed again included.
    pub bytes: u64,
}

impl AllocationSite {
    /// The function that allocates: the innermost that is no part of an allocator or collection.
    pub fn function(&self) -> Option<&str> {
        const PARTS: [&str; 7] = [
            "alloc::",
            "core::",
            "__rust",
            "__rdl",
            "__rg",
            "talc::",
            "skerry_sandbox_rt::",
        ];
        let names = self.frames.iter().filter_map(|frame| {
            let (name, _) = frame.function.as_ref()?;
            Some(name.as_str())
        });
        names.into_iter().find(|name| {
            let bare = name.trim_start_matches(['<', '&']);
            !PARTS.iter().any(|part| bare.starts_with(part))
        })
    }
}

/// Where a guest's allocations came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllocationProfile {
    /// The places, those with most bytes first.
    pub sites: Vec<AllocationSite>,
    /// Allocations and bytes of places that were too many to tell apart.
    pub others: (u64, u64),
}

impl fmt::Display for AllocationProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>14} {:>12}  place", "bytes", "allocations")?;
        for site in &self.sites {
            let function = site.function().unwrap_or("?");
            writeln!(f, "{:>14} {:>12}  {function}", site.bytes, site.allocations)?;
            for frame in &site.frames {
                writeln!(f, "{:>30}{frame}", "")?;
            }
        }
        match self.others {
            (0, _) => Ok(()),
            (allocations, bytes) => writeln!(f, "{bytes:>14} {allocations:>12}  other places"),
        }
    }
}

impl Sandbox {
    /// Begins to count allocations by who makes them, anew if it has begun before; `program` is the
    /// guest's file, for the names of functions. As
    /// [`Builder::profile_allocations`](crate::Builder::profile_allocations), which knows the file.
    pub fn profile_allocations(&mut self, program: &[u8]) {
        let mut profile = Profile::default();
        profile.set_program(program);
        self.aids.profile = Some(Box::new(profile));
        self.set_profiled();
    }

    /// Ends it.
    pub fn stop_profiling(&mut self) {
        self.aids.profile = None;
        self.set_profiled();
    }

    /// Tells the guest whether its allocations are wanted.
    pub(crate) fn set_profiled(&self) {
        let image = self.layout.image;
        self.control.set_image(image.gva);
        let profiled = self.aids.profile.is_some();
        self.control
            .set_profiled(if profiled { image.len } else { 0 });
    }

    /// What has been counted since it began, whatever was restored in the meantime.
    pub fn allocation_profile(&self) -> AllocationProfile {
        let Some(profile) = &self.aids.profile else {
            return AllocationProfile::default();
        };
        let moved = self.image().map_or(0, |image| image.moved);
        let mut sites: HashMap<(bool, Vec<u64>), Count> = HashMap::new();
        for ((how, addresses), count) in &profile.places {
            let certain = *how == frames::CHAIN;
            let returns = addresses.iter().copied();
            let mut real: Vec<u64> = returns.filter(|at| self.follows_call(*at)).collect();
            if !certain {
                real.truncate(SCANNED);
            }
            let site = sites.entry((certain, real)).or_default();
            site.allocations = site.allocations.saturating_add(count.allocations);
            site.bytes = site.bytes.saturating_add(count.bytes);
        }
        let named = |address: u64| CodeAddress {
            address,
            function: named(&profile.symbols, address.wrapping_sub(moved)),
        };
        let sites = sites
            .into_iter()
            .map(|((certain, addresses), count)| AllocationSite {
                frames: addresses.into_iter().map(named).collect(),
                certain,
                allocations: count.allocations,
                bytes: count.bytes,
            });
        let mut sites: Vec<_> = sites.collect();
        let address = |site: &AllocationSite| site.frames.first().map(|frame| frame.address);
        sites.sort_by_key(|site| (u64::MAX - site.bytes, address(site)));
        AllocationProfile {
            sites,
            others: (profile.others.allocations, profile.others.bytes),
        }
    }

    /// Whether there is a call in front of an address of code: E8, or FF /2 with its operand.
    fn follows_call(&self, address: u64) -> bool {
        /// A call is no longer than this, prefixes aside.
        const LONGEST: u64 = 7;
        let Some(start) = address.checked_sub(LONGEST) else {
            return false;
        };
        if !self.page_at(address).is_some_and(|page| page.execute) {
            return false;
        }
        let mut bytes = [0; LONGEST as usize];
        if self.read_guest(start, &mut bytes) != bytes.len() {
            return false;
        }
        let indirect = |len: usize| {
            let code = &bytes[bytes.len() - len..];
            code[0] == 0xff && code[1] >> 3 & 7 == 2
        };
        bytes[2] == 0xe8 || [2, 3, 4, 6, 7].into_iter().any(indirect)
    }
}

/// The function that a call which returns to `address` is in.
fn named(symbols: &[(u64, u64, String)], address: u64) -> Option<(String, u64)> {
    let call = address.checked_sub(1)?;
    let behind = symbols.partition_point(|(start, _, _)| *start <= call);
    let (start, size, name) = symbols.get(behind.checked_sub(1)?)?;
    let inside = *size == 0 || call - start < *size;
    inside.then(|| (name.clone(), address - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(how: u8, number: u32, words: &[u64]) -> Vec<u8> {
        let mut record = vec![log_kind::ALLOCATION, how];
        record.extend(number.to_le_bytes());
        record.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        record
    }

    #[test]
    fn records_are_added_up_and_damaged_ones_are_refused() {
        let mut profile = Profile::default();
        assert!(profile.add(&record(0, 2, &[100, 1, 2])).is_some());
        assert!(profile.add(&record(0, 2, &[11, 1, 2])).is_some());
        assert!(profile.add(&record(1, 0, &[u64::MAX])).is_some());
        assert!(profile.add(&record(1, 0, &[u64::MAX])).is_some());
        assert_eq!(profile.places.len(), 2);
        let count = profile.places[&(0, vec![1, 2])];
        assert_eq!((count.allocations, count.bytes), (2, 111));
        for (how, number, words) in [(0, 3, 3), (0, u32::MAX, 3), (2, 0, 1), (0, 0, 0)] {
            let record = record(how, number, &vec![0; words]);
            assert!(profile.add(&record).is_none(), "{how} {number} {words}");
        }
        assert!(profile.add(&[]).is_none());
    }

    #[test]
    fn a_guest_cannot_make_the_host_keep_any_number_of_places() {
        let mut profile = Profile::default();
        for n in 0..PLACES as u64 + 10 {
            profile.add(&record(1, 1, &[1, n])).unwrap();
        }
        assert_eq!(profile.places.len(), PLACES);
        assert_eq!(profile.others.allocations, 10);
        assert!(profile.add(&record(1, 1, &[1, 0])).is_some());
        assert_eq!(profile.others.allocations, 10);
    }
}
