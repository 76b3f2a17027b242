//! Guest-physical memory as KVM's numbered slots.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use kvm_ioctls::VmFd;
use skerry_hypervisor::{DirtyLogError, Gpa, MapError, MemorySlot, PAGE_SIZE};

use crate::sys::{SlotRegion, dirty_log, set_memory_slot};

struct Slot {
    number: u32,
    memory: MemorySlot,
}

impl Slot {
    fn region(&self) -> SlotRegion {
        let MemorySlot {
            gpa,
            region: _,
            offset,
            len,
            read_only,
            log_dirty,
        } = self.memory;
        let mut flags = 0;
        if read_only {
            flags |= KVM_MEM_READONLY;
        }
        if log_dirty {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        SlotRegion {
            slot: self.number,
            flags,
            gpa: gpa.0,
            offset,
            len,
        }
    }

    fn set(&self, vm: &VmFd) -> io::Result<()> {
        set_memory_slot(vm, self.region(), &self.memory.region)
    }

    fn remove(&self, vm: &VmFd) -> io::Result<()> {
        set_memory_slot(
            vm,
            SlotRegion {
                len: 0,
                ..self.region()
            },
            &self.memory.region,
        )
    }

    fn error(&self, source: io::Error) -> MapError {
        MapError::Backend {
            gpa: self.memory.gpa,
            len: self.memory.len,
            source: source.into(),
        }
    }
}

#[derive(Default)]
struct Table {
    by_gpa: BTreeMap<u64, Slot>,
    free: Vec<u32>,
    next: u32,
}

/// The slots of one VM, by first address. Holds the host memory behind them.
#[derive(Default)]
pub(crate) struct Slots {
    table: Mutex<Table>,
    /// What the kernel's logs are read into: kept, so that it is made once.
    log: Mutex<Vec<u64>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slots {
    fn table(&self) -> MutexGuard<'_, Table> {
        locked(&self.table)
    }

    pub(crate) fn map(&self, vm: &VmFd, memory: MemorySlot) -> Result<(), MapError> {
        memory.check()?;
        let MemorySlot { gpa, len, .. } = memory;
        let mut table = self.table();
        let end = gpa.0 + len as u64;
        let overlaps = table
            .by_gpa
            .range(..end)
            .next_back()
            .is_some_and(|(start, slot)| start + slot.memory.len as u64 > gpa.0);
        if overlaps {
            return Err(MapError::Overlap { gpa, len });
        }
        let number = table.free.pop().unwrap_or(table.next);
        let slot = Slot { number, memory };
        if let Err(source) = slot.set(vm) {
            if number != table.next {
                table.free.push(number);
            }
            return Err(slot.error(source));
        }
        table.next = table.next.max(number + 1);
        table.by_gpa.insert(gpa.0, slot);
        Ok(())
    }

    pub(crate) fn unmap(&self, vm: &VmFd, gpa: Gpa) -> Result<(), MapError> {
        let mut table = self.table();
        let slot = table.by_gpa.get(&gpa.0).ok_or(MapError::NotMapped(gpa))?;
        slot.remove(vm).map_err(|source| slot.error(source))?;
        let number = slot.number;
        table.by_gpa.remove(&gpa.0);
        table.free.push(number);
        Ok(())
    }

    pub(crate) fn protect(
        &self,
        vm: &VmFd,
        gpa: Gpa,
        read_only: bool,
        log_dirty: bool,
    ) -> Result<(), MapError> {
        let mut table = self.table();
        let slot = table
            .by_gpa
            .get_mut(&gpa.0)
            .ok_or(MapError::NotMapped(gpa))?;
        // KVM changes logging of a slot in place, but read-only only by making it anew.
        let fresh = slot.memory.read_only != read_only;
        if fresh {
            slot.remove(vm).map_err(|source| slot.error(source))?;
        }
        slot.memory.read_only = read_only;
        slot.memory.log_dirty = log_dirty;
        slot.set(vm).map_err(|source| slot.error(source))
    }

    fn read_log(&self, vm: &VmFd, gpa: Gpa, log: &mut Vec<u64>) -> Result<(), DirtyLogError> {
        // Held while the kernel writes: the slot stays as long as the log has room for.
        let table = self.table();
        let slot = table
            .by_gpa
            .get(&gpa.0)
            .filter(|slot| slot.memory.log_dirty)
            .ok_or(DirtyLogError::NotLogged(gpa))?;
        let len = slot.memory.len;
        log.clear();
        log.resize(len.div_ceil(PAGE_SIZE).div_ceil(64), 0);
        dirty_log(vm, slot.number, len, log).map_err(|source| DirtyLogError::Backend {
            gpa,
            source: Box::new(source),
        })
    }

    pub(crate) fn dirty_pages(&self, vm: &VmFd, gpa: Gpa) -> Result<Vec<u64>, DirtyLogError> {
        let mut log = Vec::new();
        self.read_log(vm, gpa, &mut log)?;
        Ok(log)
    }

    pub(crate) fn drain_dirty(
        &self,
        vm: &VmFd,
        gpa: Gpa,
        each: &mut dyn FnMut(u64),
    ) -> Result<(), DirtyLogError> {
        let mut log = locked(&self.log);
        self.read_log(vm, gpa, &mut log)?;
        for (word, n) in log.iter().zip(0_u64..) {
            let mut left = *word;
            while left != 0 {
                each(n * 64 + u64::from(left.trailing_zeros()));
                left &= left - 1;
            }
        }
        Ok(())
    }
}
