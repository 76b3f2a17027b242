//! The port and MMIO buses: who answers an address.
//!
//! A bus is assembled once by a builder, which refuses overlaps by name, and is immutable from then
//! on: the vCPU exit path looks an address up in a sorted array without taking any lock.

use std::sync::Arc;

/// A device that answers x86 I/O ports.
///
/// `offset` is relative to the start of the range the device was added with. Accesses are 1, 2 or 4
/// bytes long and never leave the range; a wider access that does is split by the bus.
pub trait PortDevice: Send + Sync {
    /// Fills `data` with what the guest reads. `data` holds all ones on entry.
    fn read(&self, offset: u16, data: &mut [u8]);
    /// Takes what the guest wrote.
    fn write(&self, offset: u16, data: &[u8]);
}

/// A device that answers guest-physical addresses.
///
/// `offset` is relative to the start of the range the device was added with. Accesses are 1, 2, 4 or
/// 8 bytes long and never leave the range.
pub trait MmioDevice: Send + Sync {
    /// Fills `data` with what the guest reads. `data` holds all ones on entry.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes what the guest wrote.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device could not be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Two devices claim one address.
    #[error(
        "The range {start:#x}..={last:#x} of device `{name}` overlaps that of `{other}`; give one of them another address"
    )]
    Overlap {
        /// The device that was being added.
        name: String,
        /// The first address it asked for.
        start: u64,
        /// The last address it asked for.
        last: u64,
        /// The device that already has part of the range.
        other: String,
    },
    /// The range is empty or runs past the end of the address space.
    #[error(
        "The range of device `{name}` at {start:#x}, {len:#x} bytes long, does not fit the bus; choose a lower address"
    )]
    BadRange {
        /// The device that was being added.
        name: String,
        /// The first address it asked for.
        start: u64,
        /// The length it asked for.
        len: u64,
    },
}

struct Range<D: ?Sized> {
    name: String,
    start: u64,
    last: u64,
    device: Arc<D>,
}

/// Sorted, disjoint ranges.
struct RangeMap<D: ?Sized> {
    ranges: Vec<Range<D>>,
}

impl<D: ?Sized> RangeMap<D> {
    const fn new() -> Self {
        Self { ranges: Vec::new() }
    }

    fn insert(
        &mut self,
        name: &str,
        start: u64,
        len: u64,
        limit: u64,
        device: Arc<D>,
    ) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|n| start.checked_add(n))
            .filter(|last| *last <= limit)
            .ok_or_else(|| BusError::BadRange {
                name: name.to_owned(),
                start,
                len,
            })?;
        let at = self.ranges.partition_point(|r| r.last < start);
        if let Some(other) = self.ranges.get(at)
            && other.start <= last
        {
            return Err(BusError::Overlap {
                name: name.to_owned(),
                start,
                last,
                other: other.name.clone(),
            });
        }
        self.ranges.insert(
            at,
            Range {
                name: name.to_owned(),
                start,
                last,
                device,
            },
        );
        Ok(())
    }

    fn find(&self, address: u64) -> Option<&Range<D>> {
        let at = self.ranges.partition_point(|r| r.last < address);
        self.ranges.get(at).filter(|r| r.start <= address)
    }

    fn entries(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        self.ranges
            .iter()
            .map(|r| (r.name.as_str(), r.start, r.last))
    }
}

impl<D: ?Sized> std::fmt::Debug for RangeMap<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map()
            .entries(
                self.ranges
                    .iter()
                    .map(|r| (format!("{:#x}-{:#x}", r.start, r.last), &r.name)),
            )
            .finish()
    }
}

/// Assembles a [`PortBus`].
#[derive(Debug)]
pub struct PortBusBuilder {
    map: RangeMap<dyn PortDevice>,
}

impl PortBusBuilder {
    /// Starts with an empty bus.
    pub const fn new() -> Self {
        Self {
            map: RangeMap::new(),
        }
    }

    /// Gives `len` ports from `start` on to `device`; `name` is what an overlap is reported with.
    pub fn add(
        &mut self,
        name: &str,
        start: u16,
        len: u16,
        device: Arc<dyn PortDevice>,
    ) -> Result<(), BusError> {
        self.map
            .insert(name, start.into(), len.into(), u16::MAX.into(), device)
    }

    /// Freezes the bus.
    pub fn build(self) -> PortBus {
        PortBus { map: self.map }
    }
}

impl Default for PortBusBuilder {
    fn default() -> Self {
        Self::new()
    }
}

/// The I/O port space: 64 K ports, byte-wide devices on a wider bus.
#[derive(Debug)]
pub struct PortBus {
    map: RangeMap<dyn PortDevice>,
}

impl PortBus {
    /// Reads `data.len()` bytes from `port` on. Ports that nobody answers read as ones. Returns
    /// whether any device answered.
    pub fn read(&self, port: u16, data: &mut [u8]) -> bool {
        data.fill(0xff);
        if let Some(range) = self.map.find(port.into())
            && u64::from(port) + data.len() as u64 - 1 <= range.last
        {
            range.device.read(port - range.start as u16, data);
            return true;
        }
        // The ISA bridge runs a wide cycle that no single device takes as one byte cycle per port.
        let mut claimed = false;
        for (i, byte) in data.iter_mut().enumerate() {
            let port = port.wrapping_add(i as u16);
            if let Some(range) = self.map.find(port.into()) {
                range
                    .device
                    .read(port - range.start as u16, std::slice::from_mut(byte));
                claimed = true;
            }
        }
        claimed
    }

    /// Writes `data` from `port` on. Returns whether any device answered.
    pub fn write(&self, port: u16, data: &[u8]) -> bool {
        if data.is_empty() {
            return false;
        }
        if let Some(range) = self.map.find(port.into())
            && u64::from(port) + data.len() as u64 - 1 <= range.last
        {
            range.device.write(port - range.start as u16, data);
            return true;
        }
        let mut claimed = false;
        for (i, byte) in data.iter().enumerate() {
            let port = port.wrapping_add(i as u16);
            if let Some(range) = self.map.find(port.into()) {
                range
                    .device
                    .write(port - range.start as u16, std::slice::from_ref(byte));
                claimed = true;
            }
        }
        claimed
    }

    /// Name, first and last port of every device, in order.
    pub fn entries(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        self.map.entries()
    }
}

/// Assembles an [`MmioBus`].
#[derive(Debug)]
pub struct MmioBusBuilder {
    map: RangeMap<dyn MmioDevice>,
}

impl MmioBusBuilder {
    /// Starts with an empty bus.
    pub const fn new() -> Self {
        Self {
            map: RangeMap::new(),
        }
    }

    /// Gives `len` bytes of guest-physical space from `start` on to `device`.
    pub fn add(
        &mut self,
        name: &str,
        start: u64,
        len: u64,
        device: Arc<dyn MmioDevice>,
    ) -> Result<(), BusError> {
        self.map.insert(name, start, len, u64::MAX, device)
    }

    /// Freezes the bus.
    pub fn build(self) -> MmioBus {
        MmioBus { map: self.map }
    }
}

impl Default for MmioBusBuilder {
    fn default() -> Self {
        Self::new()
    }
}

/// The guest-physical addresses that are not RAM.
#[derive(Debug)]
pub struct MmioBus {
    map: RangeMap<dyn MmioDevice>,
}

impl MmioBus {
    fn find(&self, address: u64, len: usize) -> Option<&Range<dyn MmioDevice>> {
        let last = address.checked_add((len as u64).checked_sub(1)?)?;
        self.map.find(address).filter(|range| last <= range.last)
    }

    /// Reads `data.len()` bytes at `address`. Addresses that nobody answers read as ones. Returns
    /// whether a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some(range) => {
                range.device.read(address - range.start, data);
                true
            }
            None => false,
        }
    }

    /// Writes `data` at `address`. Returns whether a device answered.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some(range) => {
                range.device.write(address - range.start, data);
                true
            }
            None => false,
        }
    }

    /// Name, first and last address of every device, in order.
    pub fn entries(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        self.map.entries()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl PortDevice for Recorder {
        fn read(&self, offset: u16, data: &mut [u8]) {
            for (i, b) in data.iter_mut().enumerate() {
                *b = offset as u8 + i as u8;
            }
        }
        fn write(&self, offset: u16, data: &[u8]) {
            self.0.lock().push((offset.into(), data.to_vec()));
        }
    }

    impl MmioDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn overlap_is_refused_by_name() {
        let mut bus = PortBusBuilder::new();
        bus.add("com1", 0x3f8, 8, Arc::new(Recorder::default()))
            .unwrap();
        let err = bus
            .add("fdc", 0x3f0, 9, Arc::new(Recorder::default()))
            .unwrap_err();
        assert!(
            err.to_string().contains("`fdc`") && err.to_string().contains("`com1`"),
            "{err}"
        );
        bus.add("fdc", 0x3f0, 8, Arc::new(Recorder::default()))
            .unwrap();
        assert!(matches!(
            bus.add("end", 0xffff, 2, Arc::new(Recorder::default())),
            Err(BusError::BadRange { .. })
        ));
        assert!(matches!(
            bus.add("none", 0x10, 0, Arc::new(Recorder::default())),
            Err(BusError::BadRange { .. })
        ));
        let bus = bus.build();
        assert_eq!(
            bus.entries().collect::<Vec<_>>(),
            [("fdc", 0x3f0, 0x3f7), ("com1", 0x3f8, 0x3ff)]
        );
    }

    #[test]
    fn straddling_port_access_is_split() {
        let low = Arc::new(Recorder::default());
        let high = Arc::new(Recorder::default());
        let mut bus = PortBusBuilder::new();
        bus.add("low", 0x10, 2, low.clone()).unwrap();
        bus.add("high", 0x12, 2, high.clone()).unwrap();
        let bus = bus.build();
        let mut data = [0; 4];
        assert!(bus.read(0x11, &mut data));
        assert_eq!(data, [1, 0, 1, 0xff]);
        assert!(bus.write(0x11, &[1, 2]));
        assert_eq!(*low.0.lock(), [(1, vec![1])]);
        assert_eq!(*high.0.lock(), [(0, vec![2])]);
        assert!(!bus.read(0x80, &mut data));
        assert_eq!(data, [0xff; 4]);
        // The last port wraps to the first, as the 16-bit port number does.
        assert!(!bus.read(0xffff, &mut data));
    }

    #[test]
    fn mmio_access_stays_inside_its_range() {
        let device = Arc::new(Recorder::default());
        let mut bus = MmioBusBuilder::new();
        bus.add("dev", 0x1000, 0x100, device.clone()).unwrap();
        let bus = bus.build();
        let mut data = [0; 4];
        assert!(bus.read(0x1020, &mut data));
        assert_eq!(data, [0x20; 4]);
        assert!(!bus.read(0x10fe, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.write(u64::MAX, &[1, 2]));
        assert!(bus.write(0x10ff, &[7]));
        assert_eq!(*device.0.lock(), [(0xff, vec![7])]);
    }
}
