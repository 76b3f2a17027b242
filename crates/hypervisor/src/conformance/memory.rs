//! Memory slots.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

use super::guest::{DATA, EXTRA, Guest, RAM, make_ram, next, report, reported, slot, stop};
use crate::error::{DirtyLogError, MapError};
use crate::exit::Exit;
use crate::memory::{Gpa, MemorySlot, PAGE_SIZE};
use crate::traits::{Hypervisor, Vcpu, Vm};

/// Reads a quadword of the extra slot's place for ever, and reports its low half.
fn reader<H: Hypervisor>(hypervisor: &H) -> Guest<H> {
    Guest::new(hypervisor, |a| {
        let mut again = a.create_label();
        a.mov(ebx, EXTRA as u32)?;
        a.set_label(&mut again)?;
        a.mov(rax, qword_ptr(rbx))?;
        report(a)?;
        a.jmp(again)?;
        Ok(vec![])
    })
}

pub(super) fn unmapped_then_mapped_then_unmapped<H: Hypervisor>(hypervisor: &H) {
    let guest = reader(hypervisor);
    let mut vcpu = guest.start();
    let exit = Exit::MmioRead {
        gpa: Gpa(EXTRA),
        size: 8,
    };
    let extra = make_ram(EXTRA, 0x4000);
    for round in 1..4_u32 {
        assert_eq!(next(&mut vcpu), exit, "nothing is mapped");
        vcpu.complete_read(u64::from(round) * 100);
        assert_eq!(reported(&mut vcpu), round * 100);
        extra
            .write_obj(round, GuestAddress(EXTRA))
            .expect("a write");
        guest.vm.map(slot(&extra)).expect("a slot");
        assert_eq!(reported(&mut vcpu), round);
        assert_eq!(reported(&mut vcpu), round);
        guest.vm.unmap(Gpa(EXTRA)).expect("the slot to go");
    }
    assert_eq!(next(&mut vcpu), exit);
}

pub(super) fn map_while_running<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        let mut again = a.create_label();
        a.mov(ebx, DATA as u32)?;
        a.set_label(&mut again)?;
        a.inc(qword_ptr(rbx))?;
        a.cmp(dword_ptr(rbx + 8), 0)?;
        a.je(again)?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    let running = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let mut vcpu = guest.start();
        let running = &running;
        scope.spawn(move || {
            reported(&mut vcpu);
            running.store(false, Ordering::SeqCst);
        });
        while guest.read(DATA) == 0 {
            std::thread::yield_now();
        }
        for _ in 0..50 {
            let extra = make_ram(EXTRA, 0x4000);
            guest.vm.map(slot(&extra)).expect("a slot");
            guest.vm.unmap(Gpa(EXTRA)).expect("the slot to go");
        }
        assert!(running.load(Ordering::SeqCst), "the guest stopped");
        guest.write(DATA + 8, 1);
    });
}

pub(super) fn read_only_slot<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.mov(ebx, EXTRA as u32)?;
        a.mov(eax, dword_ptr(rbx + 0x1000))?;
        report(a)?;
        a.mov(dword_ptr(rbx + 0x1008), 0x55)?;
        a.mov(eax, dword_ptr(rbx + 0x1008))?;
        report(a)?;
        a.mov(dword_ptr(rbx + 0x1008), 0x66)?;
        a.mov(eax, dword_ptr(rbx + 0x1008))?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    let extra = make_ram(EXTRA, 0x4000);
    extra
        .write_obj(0x1234_u32, GuestAddress(EXTRA + 0x1000))
        .expect("a write");
    extra
        .write_obj(0x77_u32, GuestAddress(EXTRA + 0x1008))
        .expect("a write");
    guest
        .vm
        .map(MemorySlot {
            read_only: true,
            ..slot(&extra)
        })
        .expect("a slot");
    let mut vcpu = guest.start();
    assert_eq!(reported(&mut vcpu), 0x1234);
    let write = Exit::MmioWrite {
        gpa: Gpa(EXTRA + 0x1008),
        size: 4,
        data: 0x55,
    };
    assert_eq!(next(&mut vcpu), write);
    assert_eq!(reported(&mut vcpu), 0x77, "the write changed nothing");
    guest
        .vm
        .protect(Gpa(EXTRA), false, false)
        .expect("a change");
    assert_eq!(reported(&mut vcpu), 0x66, "the slot is writable now");
}

pub(super) fn dirty_log_is_exact<H: Hypervisor>(hypervisor: &H) {
    const PAGES: usize = 130;
    let guest = Guest::new(hypervisor, |a| {
        let mut again = a.create_label();
        a.mov(ebx, EXTRA as u32)?;
        a.set_label(&mut again)?;
        // A byte, a quadword that crosses into the next page, a read, a locked add, a string.
        a.mov(byte_ptr(rbx + 3 * 0x1000 + 5), 1)?;
        a.mov(qword_ptr(rbx + 65 * 0x1000 - 4), rax)?;
        a.mov(rax, qword_ptr(rbx + 70 * 0x1000))?;
        a.lock().inc(dword_ptr(rbx + 100 * 0x1000))?;
        a.lea(rdi, qword_ptr(rbx + 110 * 0x1000 + 0xff0))?;
        a.mov(ecx, 0x20)?;
        a.rep().stosb()?;
        report(a)?;
        a.mov(byte_ptr(rbx + 129 * 0x1000), 1)?;
        report(a)?;
        report(a)?;
        a.jmp(again)?;
        Ok(vec![])
    });
    let extra = make_ram(EXTRA, PAGES * PAGE_SIZE);
    guest
        .vm
        .map(MemorySlot {
            log_dirty: true,
            ..slot(&extra)
        })
        .expect("a slot");
    let mut vcpu = guest.start();
    let pages = |log: Vec<u64>| -> Vec<usize> {
        assert_eq!(log.len(), PAGES.div_ceil(64));
        (0..log.len() * 64)
            .filter(|page| log[page / 64] >> (page % 64) & 1 != 0)
            .collect()
    };
    // Both ways of taking it, in turn.
    let turn = Cell::new(false);
    let take = || {
        if turn.replace(!turn.get()) {
            return pages(guest.vm.dirty_pages(Gpa(EXTRA)).expect("a log"));
        }
        let mut pages = Vec::new();
        guest
            .vm
            .drain_dirty(Gpa(EXTRA), &mut |page| pages.push(page as usize))
            .expect("a log");
        pages
    };
    assert_eq!(take(), [0; 0], "nothing ran yet");
    // The first touch of a page that is only read (70) may count as a write.
    reported(&mut vcpu);
    let mut first = take();
    first.retain(|page| *page != 70);
    assert_eq!(first, [3, 64, 65, 100, 110, 111]);
    for round in 0..3 {
        reported(&mut vcpu);
        assert_eq!(take(), [129], "round {round}: only what was written since");
        reported(&mut vcpu);
        assert_eq!(take(), [0; 0], "round {round}");
        reported(&mut vcpu);
        assert_eq!(take(), [3, 64, 65, 100, 110, 111], "round {round}");
    }
    guest
        .vm
        .protect(Gpa(EXTRA), false, false)
        .expect("logging to stop");
    reported(&mut vcpu);
    let refused = guest.vm.dirty_pages(Gpa(EXTRA));
    assert!(
        matches!(refused, Err(DirtyLogError::NotLogged(Gpa(EXTRA)))),
        "{refused:?}"
    );
    let refused = guest.vm.drain_dirty(Gpa(EXTRA), &mut |_| {});
    assert!(
        matches!(refused, Err(DirtyLogError::NotLogged(Gpa(EXTRA)))),
        "{refused:?}"
    );
    guest
        .vm
        .protect(Gpa(EXTRA), false, true)
        .expect("logging to start");
    reported(&mut vcpu);
    assert_eq!(
        take(),
        [0; 0],
        "what was written before logging started is not in the log"
    );
    reported(&mut vcpu);
    assert_eq!(take(), [3, 64, 65, 100, 110, 111]);
}

pub(super) fn bad_slots_are_refused<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| stop(a).map(|()| vec![]));
    let extra = make_ram(EXTRA, 0x4000);
    let good = slot(&extra);
    let vm = &guest.vm;
    type Change = fn(&mut MemorySlot);
    let misaligned: [Change; 5] = [
        |s| s.gpa.0 += 1,
        |s| s.len = 0,
        |s| s.len -= 1,
        |s| s.len += PAGE_SIZE,
        |s| s.offset = usize::MAX - PAGE_SIZE + 1,
    ];
    for (n, change) in misaligned.into_iter().enumerate() {
        let mut bad = good.clone();
        change(&mut bad);
        let refused = vm.map(bad);
        assert!(
            matches!(refused, Err(MapError::Misaligned { .. })),
            "{n}: {refused:?}"
        );
    }
    let inside = MemorySlot {
        gpa: Gpa(RAM as u64 - 0x1000),
        ..good.clone()
    };
    assert!(matches!(vm.map(inside), Err(MapError::Overlap { .. })));
    vm.map(good.clone()).expect("a slot");
    assert!(matches!(
        vm.map(good.clone()),
        Err(MapError::Overlap { .. })
    ));
    let before = MemorySlot {
        gpa: Gpa(EXTRA - 0x1000),
        ..good.clone()
    };
    assert!(matches!(vm.map(before), Err(MapError::Overlap { .. })));
    let missing = Gpa(EXTRA + 0x1000);
    assert!(matches!(vm.unmap(missing), Err(MapError::NotMapped(_))));
    assert!(matches!(
        vm.protect(missing, false, false),
        Err(MapError::NotMapped(_))
    ));
    assert!(matches!(
        vm.dirty_pages(missing),
        Err(DirtyLogError::NotLogged(_))
    ));
    vm.unmap(Gpa(EXTRA)).expect("the slot to go");
    vm.map(good).expect("its place to be free");
}

pub(super) fn host_writes_are_seen<H: Hypervisor>(hypervisor: &H) {
    let guest = reader(hypervisor);
    let extra = make_ram(EXTRA, 0x4000);
    guest.vm.map(slot(&extra)).expect("a slot");
    let mut vcpu = guest.start();
    for value in 1..20_u32 {
        extra
            .write_obj(value, GuestAddress(EXTRA))
            .expect("a write");
        assert_eq!(reported(&mut vcpu), value);
    }
    vcpu.end_call();
}
