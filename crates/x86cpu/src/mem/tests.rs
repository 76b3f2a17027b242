//! Translation, permissions, flushes, code that changes, devices.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::cpu::{Cpu, reg};
use crate::exit::CpuExit;
use crate::flags::rflags;
use crate::mem::Access;
use crate::sys::state::{cr0, cr4, efer};
use crate::testing::{CODE, DATA, Outcome, STACK, TABLES, TestCpu};
use crate::trap::{Trap, TrapKind, vector};

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;
const G: u64 = 0x100;
const NX: u64 = 1 << 63;

/// A page directory of our own for linear 0x4000_0000 (second GiB), and a page table below it.
const DIRECTORY: u64 = 0x8_0000;
const TABLE: u64 = 0x8_1000;
const WINDOW: u64 = 0x4000_0000;

fn machine() -> TestCpu {
    let t = TestCpu::new64();
    t.write(TABLES + 0x1008, &(DIRECTORY | P | W | U).to_le_bytes());
    t.write(DIRECTORY, &(TABLE | P | W | U).to_le_bytes());
    t
}

fn set_pte(t: &TestCpu, index: u64, entry: u64) {
    t.write(TABLE + index * 8, &entry.to_le_bytes());
}

fn pte(t: &TestCpu, index: u64) -> u64 {
    t.read_u64(TABLE + index * 8)
}

fn fault(cpu: &Cpu) -> (u8, u32, u64) {
    match cpu.trap.kind {
        TrapKind::Fault { vector, error_code } => {
            (vector, error_code.unwrap_or(u32::MAX), cpu.trap.address)
        }
        other => panic!("no fault but {other:?}"),
    }
}

fn page_fault<T: std::fmt::Debug>(t: &TestCpu, result: Result<T, Trap>) -> Option<u32> {
    match result {
        Ok(_) => None,
        Err(Trap) => {
            let (vector, code, _) = fault(&t.cpu);
            assert_eq!(vector, vector::PF);
            Some(code)
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Read,
    Write,
    Fetch,
}

/// The manual's rules once more, written as a table would be (SDM 3A §5.6.1).
fn expected(
    entry: u64,
    kind: Kind,
    user: bool,
    (wp, smep, smap, ac): (bool, bool, bool, bool),
) -> Option<u32> {
    let mut code = 0;
    if kind == Kind::Write {
        code |= 2;
    }
    if user {
        code |= 4;
    }
    if kind == Kind::Fetch {
        code |= 16; // NXE is set throughout
    }
    if entry & P == 0 {
        return Some(code);
    }
    let user_page = entry & U != 0;
    let denied = match kind {
        Kind::Read if user => !user_page,
        Kind::Read => user_page && smap && !ac,
        Kind::Write if user => !user_page || entry & W == 0,
        Kind::Write => (user_page && smap && !ac) || (wp && entry & W == 0),
        Kind::Fetch if user => !user_page || entry & NX != 0,
        Kind::Fetch => (user_page && smep) || entry & NX != 0,
    };
    denied.then_some(code | 1)
}

#[test]
fn every_permission_against_every_access() {
    for setting in 0..16u32 {
        let flags = (
            setting & 1 != 0,
            setting & 2 != 0,
            setting & 4 != 0,
            setting & 8 != 0,
        );
        let (wp, smep, smap, ac) = flags;
        let mut t = machine();
        if !wp {
            t.cpu.sys.cr0 &= !cr0::WP;
        }
        if smep {
            t.cpu.sys.cr4 |= cr4::SMEP;
        }
        if smap {
            t.cpu.sys.cr4 |= cr4::SMAP;
        }
        if ac {
            t.cpu.rflags |= rflags::AC;
        }
        t.cpu.update_mode();
        for bits in 0..16u64 {
            let pick = |n: u64, bit: u64| if bits & n != 0 { bit } else { 0 };
            let entry = DATA | pick(1, P) | pick(2, W) | pick(4, U) | pick(8, NX);
            for user in [false, true] {
                for kind in [Kind::Read, Kind::Write, Kind::Fetch] {
                    set_pte(&t, 0, entry);
                    t.cpu.tlb_flush_page(WINDOW);
                    t.cpu.tlb_flush_all();
                    let access = if user { Access::User } else { Access::Kernel };
                    // Twice: what comes from the TLB must agree with the walk.
                    for round in 0..2 {
                        let result = match kind {
                            Kind::Read => t.cpu.load_lin::<u32>(WINDOW, access).map(u64::from),
                            Kind::Write => t.cpu.store_lin::<u32>(WINDOW, 7, access).map(|()| 0),
                            Kind::Fetch => {
                                let level = t.cpu.cpl;
                                t.cpu.cpl = if user { 3 } else { 0 };
                                let result = t.cpu.translate_fetch(WINDOW);
                                t.cpu.cpl = level;
                                result
                            }
                        };
                        let found = page_fault(&t, result);
                        let wanted = expected(entry, kind, user, flags);
                        assert_eq!(
                            found, wanted,
                            "entry {entry:#x} {kind:?} user {user} wp/smep/smap/ac {flags:?} round {round}"
                        );
                        if found.is_some() {
                            assert_eq!(t.cpu.trap.address, WINDOW);
                        }
                    }
                    let touched = expected(entry, kind, user, flags).is_none();
                    let now = pte(&t, 0);
                    assert_eq!(now & A != 0, touched);
                    assert_eq!(now & D != 0, touched && kind == Kind::Write);
                }
            }
        }
    }
}

#[test]
fn system_accesses_ignore_ac_under_smap() {
    let mut t = machine();
    t.cpu.sys.cr4 |= cr4::SMAP;
    t.cpu.rflags |= rflags::AC;
    t.cpu.update_mode();
    set_pte(&t, 0, DATA | P | W | U);
    let kernel = t.cpu.load_lin::<u8>(WINDOW, Access::Kernel);
    assert_eq!(page_fault(&t, kernel), None);
    let system = t.cpu.load_lin::<u8>(WINDOW, Access::Supervisor);
    assert_eq!(page_fault(&t, system), Some(1));
}

#[test]
fn rights_are_those_of_all_levels() {
    let mut t = machine();
    set_pte(&t, 0, DATA | P | W | U);
    for (entry, access, write, code) in [
        (TABLE | P | U, Access::User, true, 7),
        (TABLE | P | W, Access::User, false, 5),
        (TABLE | P | U, Access::Kernel, true, 3),
        (TABLE | W | U, Access::Kernel, false, 0),
    ] {
        t.write(DIRECTORY, &entry.to_le_bytes());
        t.cpu.tlb_flush_all();
        let result = if write {
            t.cpu.store_lin::<u8>(WINDOW, 1, access)
        } else {
            t.cpu.load_lin::<u8>(WINDOW, access).map(|_| ())
        };
        assert_eq!(page_fault(&t, result), Some(code), "{entry:#x}");
    }
    t.write(DIRECTORY, &(TABLE | P | W | U | NX).to_le_bytes());
    t.cpu.tlb_flush_all();
    let result = t.cpu.translate_fetch(WINDOW);
    assert_eq!(page_fault(&t, result), Some(0x11));
}

#[test]
fn reserved_bits_of_each_level() {
    let mut t = machine();
    set_pte(&t, 0, DATA | P | W | U);
    let high = 1u64 << 51;
    let cases: &[(u64, u64, bool)] = &[
        (TABLE, DATA | P | high, true),
        (TABLE, DATA | P | (1 << 52), false),
        (DIRECTORY, TABLE | P | high, true),
        (DIRECTORY, P | W | PS | (1 << 13), true),
        (DIRECTORY, P | W | PS | (1 << 20), true),
        (DIRECTORY, P | W | PS | (1 << 12), false),
        (TABLES + 0x1008, DIRECTORY | P | high, true),
        (TABLES + 0x1008, P | W | PS | (1 << 13), true),
        (TABLES, (TABLES + 0x1000) | P | PS, true),
        (TABLES, (TABLES + 0x1000) | P | high, true),
    ];
    for (at, entry, reserved) in cases {
        let old = t.read_u64(*at);
        t.write(*at, &entry.to_le_bytes());
        t.cpu.tlb_flush_all();
        let result = t.cpu.load_lin::<u8>(WINDOW, Access::Kernel);
        let wanted = reserved.then_some(9);
        assert_eq!(page_fault(&t, result), wanted, "{at:#x} {entry:#x}");
        t.write(*at, &old.to_le_bytes());
    }
    // Without NXE bit 63 is reserved too.
    t.cpu.sys.efer &= !efer::NXE;
    t.cpu.update_mode();
    set_pte(&t, 0, DATA | P | NX);
    let result = t.cpu.load_lin::<u8>(WINDOW, Access::Kernel);
    assert_eq!(page_fault(&t, result), Some(9));
}

#[test]
fn large_pages_translate_and_are_dropped_whole() {
    let mut t = machine();
    t.write(DIRECTORY, &(P | W | PS).to_le_bytes());
    t.write(DATA, &0x1122u64.to_le_bytes());
    t.write(DATA + 0x20_0000, &0x3344u64.to_le_bytes());
    assert_eq!(
        t.cpu.load_lin::<u64>(WINDOW + DATA, Access::Kernel),
        Ok(0x1122)
    );
    assert_eq!(t.cpu.load_lin::<u64>(WINDOW, Access::Kernel), Ok(0));
    t.write(DIRECTORY, &(0x20_0000 | P | W | PS).to_le_bytes());
    // Still the old one, until any of its addresses is invalidated.
    assert_eq!(
        t.cpu.load_lin::<u64>(WINDOW + DATA, Access::Kernel),
        Ok(0x1122)
    );
    t.cpu.tlb_flush_page(WINDOW + 0x1f_f000);
    assert_eq!(
        t.cpu.load_lin::<u64>(WINDOW + DATA, Access::Kernel),
        Ok(0x3344)
    );
    // 1 GiB.
    t.write(TABLES + 0x1008, &(P | W | PS).to_le_bytes());
    t.cpu.tlb_flush_all();
    assert_eq!(
        t.cpu.load_lin::<u64>(WINDOW + DATA, Access::Kernel),
        Ok(0x1122)
    );
}

#[test]
fn non_canonical_addresses() {
    let mut t = machine();
    let result = t.cpu.load_lin::<u8>(1 << 47, Access::Current);
    assert!(result.is_err());
    assert_eq!(fault(&t.cpu).0, vector::GP);
    let result = t.cpu.load_at::<u8>(crate::seg::FLAT_SS, 1 << 47);
    assert!(result.is_err());
    assert_eq!(fault(&t.cpu).0, vector::SS);
    // The last byte counts too.
    let result = t.cpu.load_lin::<u64>((1 << 47) - 4, Access::Current);
    assert!(result.is_err());
}

#[test]
fn thirty_two_bit_tables() {
    let mut t = TestCpu::new32();
    let put = |t: &TestCpu, at: u64, entry: u32| t.write(at, &entry.to_le_bytes());
    let directory = 0x8_0000u64;
    let table = 0x8_1000u64;
    put(&t, directory, (table as u32) | 7);
    put(&t, directory + 4, 0x83); // 4 MiB at 0, supervisor
    put(&t, directory + 8, 0x83 | (1 << 21)); // reserved bit of PSE-36
    for i in 0..1024u32 {
        put(&t, table + u64::from(i) * 4, (i << 12) | 7);
    }
    put(&t, table + 0x300 * 4, (DATA as u32) | 5);
    t.cpu.sys.cr3 = directory;
    t.cpu.sys.cr4 |= cr4::PSE;
    t.cpu.sys.cr0 |= cr0::PG | cr0::WP;
    t.cpu.update_mode();
    t.write(DATA, &77u32.to_le_bytes());
    assert_eq!(t.cpu.load_lin::<u32>(0x30_0000, Access::User), Ok(77));
    let result = t.cpu.store_lin::<u32>(0x30_0000, 1, Access::User);
    assert_eq!(page_fault(&t, result), Some(7));
    assert_eq!(
        t.cpu.load_lin::<u32>(0x40_0000 + DATA, Access::Kernel),
        Ok(77)
    );
    let result = t.cpu.load_lin::<u32>(0x40_0000 + DATA, Access::User);
    assert_eq!(page_fault(&t, result), Some(5));
    let result = t.cpu.load_lin::<u32>(0x80_0000, Access::Kernel);
    assert_eq!(page_fault(&t, result), Some(9));
    let result = t.cpu.load_lin::<u32>(0xc0_0000, Access::Kernel);
    assert_eq!(page_fault(&t, result), Some(0));
    let entry = u32::from_le_bytes(t.read(directory + 4, 4).try_into().unwrap());
    assert_eq!(entry & 0x60, 0x20);
}

#[test]
fn pae_tables() {
    let mut t = TestCpu::new32();
    let pdpt = 0x8_0020u64;
    t.write(pdpt, &(0x8_1000u64 | P).to_le_bytes());
    t.write(pdpt + 8, &0u64.to_le_bytes());
    t.write(0x8_1000, &(P | W | U | PS).to_le_bytes());
    t.write(0x8_1008, &(0x20_0000 | P | W | U | PS | NX).to_le_bytes());
    t.cpu.sys.cr3 = pdpt;
    t.cpu.sys.cr4 |= cr4::PAE;
    t.cpu.sys.efer |= efer::NXE;
    t.cpu.sys.cr0 |= cr0::PG;
    t.cpu.update_mode();
    assert_eq!(t.cpu.load_pdptes(), Ok(()));
    t.write(DATA, &5u32.to_le_bytes());
    assert_eq!(t.cpu.load_lin::<u32>(DATA, Access::User), Ok(5));
    let result = t.cpu.translate_fetch(0x20_0000);
    assert_eq!(page_fault(&t, result), Some(0x11));
    let result = t.cpu.load_lin::<u32>(0x4000_0000, Access::User);
    assert_eq!(page_fault(&t, result), Some(4));
    // A present entry with reserved bits is refused when it is loaded.
    t.write(pdpt + 8, &(P | W).to_le_bytes());
    assert_eq!(t.cpu.load_pdptes(), Err(Trap));
    assert_eq!(fault(&t.cpu), (vector::GP, 0, fault(&t.cpu).2));
}

#[test]
fn global_pages_survive_address_spaces() {
    let mut t = machine();
    t.write(DATA, &[1]);
    t.write(DATA + 0x1000, &[2]);
    set_pte(&t, 0, DATA | P | W | G);
    set_pte(&t, 1, DATA | P | W);
    let read = |t: &mut TestCpu, n: u64| {
        t.cpu
            .load_lin::<u8>(WINDOW + n * 0x1000, Access::Kernel)
            .unwrap()
    };
    assert_eq!((read(&mut t, 0), read(&mut t, 1)), (1, 1));
    set_pte(&t, 0, (DATA + 0x1000) | P | W | G);
    set_pte(&t, 1, (DATA + 0x1000) | P | W);
    t.cpu.tlb_load_cr3(TABLES, TABLES, false);
    assert_eq!((read(&mut t, 0), read(&mut t, 1)), (1, 2));
    t.cpu.tlb_flush_page(WINDOW);
    assert_eq!(read(&mut t, 0), 2);
    set_pte(&t, 0, DATA | P | W | G);
    t.cpu.tlb_flush_all();
    assert_eq!(read(&mut t, 0), 1);
}

#[test]
fn pages_in_each_others_way_get_out_of_it() {
    let mut t = machine();
    // The same table again, 4 MiB on.
    t.write(DIRECTORY + 16, &(TABLE | P | W | U).to_le_bytes());
    set_pte(&t, 0, DATA | P | W);
    let hits = |t: &TestCpu| t.cpu.shared.counters.values().tlb_second_hits;
    let in_turn = |t: &mut TestCpu, times: u64| {
        let before = hits(t);
        for _ in 0..times {
            for linear in [WINDOW, WINDOW + 0x40_0000] {
                t.cpu.load_lin::<u8>(linear, Access::Current).unwrap();
            }
        }
        hits(t) - before
    };
    assert!(in_turn(&mut t, 100) > 150, "both have one entry at first");
    in_turn(&mut t, 20_000);
    assert_eq!(in_turn(&mut t, 100), 0, "then each has its own");
    t.cpu.tlb_flush_all();
    assert!(in_turn(&mut t, 100) > 150, "until all is dropped");
}

#[test]
fn process_contexts_keep_their_entries() {
    let mut t = machine();
    t.cpu.sys.cr4 |= cr4::PCIDE;
    t.cpu.update_mode();
    t.write(DATA, &[1]);
    t.write(DATA + 0x1000, &[2]);
    let read = |t: &mut TestCpu| t.cpu.load_lin::<u8>(WINDOW, Access::Kernel).unwrap();
    let switch = |t: &mut TestCpu, pcid: u64, noflush: bool| {
        let old = t.cpu.sys.cr3;
        t.cpu.sys.cr3 = TABLES | pcid;
        t.cpu.tlb_load_cr3(old, TABLES | pcid, noflush);
    };
    switch(&mut t, 1, false);
    set_pte(&t, 0, DATA | P);
    assert_eq!(read(&mut t), 1);
    switch(&mut t, 2, false);
    set_pte(&t, 0, (DATA + 0x1000) | P);
    assert_eq!(read(&mut t), 2);
    switch(&mut t, 1, true);
    assert_eq!(read(&mut t), 1, "kept");
    t.cpu.tlb_flush_pcid(2);
    assert_eq!(read(&mut t), 1, "another's flush");
    switch(&mut t, 1, false);
    assert_eq!(read(&mut t), 2, "flushed");
    set_pte(&t, 0, DATA | P);
    switch(&mut t, 2, true);
    assert_eq!(read(&mut t), 1, "flushed while away");
    // Numbers of address spaces run out and start over.
    for i in 0..10_000u64 {
        set_pte(&t, 0, (DATA + (i & 1) * 0x1000) | P);
        switch(&mut t, i & 7, false);
        assert_eq!(u64::from(read(&mut t)), 1 + (i & 1));
    }
}

#[test]
fn accesses_that_cross_a_page() {
    let mut t = machine();
    set_pte(&t, 0, DATA | P | W);
    set_pte(&t, 1, (DATA + 0x3000) | P | W);
    let at = WINDOW + 0xffd;
    assert_eq!(
        t.cpu
            .store_lin::<u64>(at, 0x0807_0605_0403_0201, Access::Kernel),
        Ok(())
    );
    assert_eq!(t.read(DATA + 0xffd, 3), [1, 2, 3]);
    assert_eq!(t.read(DATA + 0x3000, 5), [4, 5, 6, 7, 8]);
    assert_eq!(
        t.cpu.load_lin::<u64>(at, Access::Kernel),
        Ok(0x0807_0605_0403_0201)
    );
    // The second page refuses: nothing is written, the fault names its first byte.
    set_pte(&t, 1, (DATA + 0x3000) | P);
    t.cpu.tlb_flush_all();
    let result = t.cpu.store_lin::<u64>(at, 0, Access::Kernel);
    assert_eq!(page_fault(&t, result), Some(3));
    assert_eq!(t.cpu.trap.address, WINDOW + 0x1000);
    assert_eq!(t.read(DATA + 0xffd, 3), [1, 2, 3]);
    let mut bytes = [0; 8];
    assert_eq!(t.cpu.read_bytes(at, &mut bytes), Ok(()));
    assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert!(t.cpu.host_ptr(at, 8, false).unwrap().is_none());
    assert!(t.cpu.host_ptr(WINDOW, 32, false).unwrap().is_some());
    assert!(
        t.cpu
            .page_run(WINDOW + 0xff0, true)
            .unwrap()
            .is_some_and(|(_, len)| len == 16)
    );
}

#[test]
fn devices_answer_an_instruction_one_access_at_a_time() {
    // movsq with source and destination outside of RAM, in the identity map.
    let mut t = TestCpu::new64();
    t.write(CODE, &[0x48, 0xa5, 0xe6, 0xf4]);
    t.cpu.gpr[usize::from(reg::RSI)] = 0x1000_0000;
    t.cpu.gpr[usize::from(reg::RDI)] = 0x1100_0000;
    let exit = t.cpu.run();
    assert_eq!(
        exit,
        CpuExit::MmioRead {
            gpa: 0x1000_0000,
            size: 8
        }
    );
    assert!(t.cpu.wants_value());
    assert_eq!(t.cpu.gpr[usize::from(reg::RSI)], 0x1000_0000);
    t.cpu.complete_read(0x1122_3344_5566_7788);
    let exit = t.cpu.run();
    let data = 0x1122_3344_5566_7788;
    assert_eq!(
        exit,
        CpuExit::MmioWrite {
            gpa: 0x1100_0000,
            size: 8,
            data
        }
    );
    assert_eq!(t.cpu.gpr[usize::from(reg::RSI)], 0x1000_0000);
    assert!(matches!(t.cpu.run(), CpuExit::PortOut { port: 0xf4, .. }));
    assert_eq!(t.cpu.gpr[usize::from(reg::RSI)], 0x1000_0008);
    assert_eq!(t.cpu.gpr[usize::from(reg::RDI)], 0x1100_0008);
    // OUT is complete only when its exit has been handled.
    assert_eq!(t.cpu.instructions, 1);
}

#[test]
fn a_repeated_instruction_asks_for_every_element() {
    // repe cmpsb, both operands outside of RAM.
    let mut t = TestCpu::new64();
    t.write(CODE, &[0xf3, 0xa6, 0xe6, 0xf4]);
    t.cpu.gpr[usize::from(reg::RSI)] = 0x1000_0000;
    t.cpu.gpr[usize::from(reg::RDI)] = 0x1100_0000;
    t.cpu.gpr[usize::from(reg::RCX)] = 5;
    let mut reads = Vec::new();
    loop {
        match t.cpu.run() {
            CpuExit::MmioRead { gpa, size: 1 } => {
                reads.push(gpa);
                // Equal at 0 to 2, different at 3.
                let differs = gpa == 0x1100_0003;
                t.cpu.complete_read((gpa & 0xff) + u64::from(differs));
            }
            CpuExit::PortOut { .. } => break,
            other => panic!("{other:?}"),
        }
    }
    let wanted: Vec<u64> = (0..4)
        .flat_map(|n| [0x1000_0000 + n, 0x1100_0000 + n])
        .collect();
    assert_eq!(reads, wanted);
    assert_eq!(t.cpu.gpr[usize::from(reg::RCX)], 1);
    assert_eq!(t.cpu.gpr[usize::from(reg::RSI)], 0x1000_0004);
}

#[test]
fn a_store_into_the_next_instruction_takes_effect() {
    // mov byte [rip+1], 5 ; mov al, 1 (its immediate is overwritten)
    let mut t = TestCpu::new64();
    let code = [
        0xc6, 0x05, 0x01, 0x00, 0x00, 0x00, 0x05, 0xb0, 0x01, 0xe6, 0xf4,
    ];
    for _ in 0..3 {
        t.write(CODE, &code);
        t.cpu.rip = CODE;
        assert!(matches!(t.cpu.run(), CpuExit::PortOut { data: 5, .. }));
    }
}

#[test]
fn code_written_through_an_alias() {
    let mut t = machine();
    set_pte(&t, 0, CODE | P | W);
    // mov al, 1 ; out 0xf4, al — called at CODE, rewritten through WINDOW.
    t.write(CODE, &[0xb0, 0x01, 0xe6, 0xf4]);
    t.cpu.rip = CODE;
    assert!(matches!(t.cpu.run(), CpuExit::PortOut { data: 1, .. }));
    assert_eq!(t.cpu.step(), Ok(()));
    for value in 2..40u8 {
        assert_eq!(
            t.cpu.store_lin::<u8>(WINDOW + 1, value, Access::Kernel),
            Ok(())
        );
        t.cpu.rip = CODE;
        let exit = t.cpu.run();
        assert!(
            matches!(exit, CpuExit::PortOut { data, .. } if data == u32::from(value)),
            "{exit:?}"
        );
        t.cpu.forget_devices();
    }
}

#[test]
fn host_writes_replace_code() {
    let mut t = TestCpu::new64();
    for value in 0..20u8 {
        t.write(CODE, &[0xb0, value, 0xe6, 0xf4]);
        t.cpu.rip = CODE;
        assert!(matches!(t.cpu.run(), CpuExit::PortOut { data, .. } if data == u32::from(value)));
        t.cpu.forget_devices();
    }
}

#[test]
fn an_instruction_across_pages_follows_both() {
    let mut t = machine();
    let page = 0x9_0000u64;
    set_pte(&t, 0, page | P | W);
    set_pte(&t, 1, (page + 0x1000) | P | W);
    // mov eax, imm32 with the immediate in the second page.
    t.write(page + 0xfff, &[0xb8, 1, 0, 0, 0, 0xe6, 0xf4]);
    t.write(page + 0x2000, &[2, 0, 0, 0, 0xe6, 0xf4]);
    let run = |t: &mut TestCpu| {
        t.cpu.forget_devices();
        t.cpu.rip = WINDOW + 0xfff;
        t.cpu.run()
    };
    assert!(matches!(run(&mut t), CpuExit::PortOut { data: 1, .. }));
    set_pte(&t, 1, (page + 0x2000) | P | W);
    t.cpu.tlb_flush_page(WINDOW + 0x1000);
    assert!(matches!(run(&mut t), CpuExit::PortOut { data: 2, .. }));
    t.write(page + 0x2000, &[3]);
    assert!(matches!(run(&mut t), CpuExit::PortOut { data: 3, .. }));
    // No execution in the second page: the fault is there.
    set_pte(&t, 1, (page + 0x2000) | P | W | NX);
    t.cpu.tlb_flush_page(WINDOW + 0x1000);
    t.cpu.forget_devices();
    t.cpu.rip = WINDOW + 0xfff;
    assert_eq!(t.cpu.step(), Err(Trap));
    assert_eq!(fault(&t.cpu), (vector::PF, 0x11, WINDOW + 0x1000));
    assert_eq!(t.cpu.rip, WINDOW + 0xfff);
}

#[test]
fn instructions_have_at_most_fifteen_bytes() {
    let mut t = TestCpu::new64();
    let mut code = vec![0x66; 15];
    code.push(0x90);
    let outcome = t.run_bytes(&code);
    let gp = TrapKind::Fault {
        vector: vector::GP,
        error_code: Some(0),
    };
    assert_eq!(outcome, Outcome::Trap(gp));
    assert_eq!(t.run_bytes(&code[1..]), Outcome::End);
}

#[test]
fn dirty_log_is_exact() {
    let mut t = TestCpu::new64();
    let machine = t.machine.clone();
    machine.protect(0, false, true).unwrap();
    assert_eq!(t.cpu.step(), Ok(())); // sees the change; RAM is zeros: add [rax], al
    let _ = machine.take_dirty(0).unwrap();
    t.cpu.catch_up_with_memory();
    t.cpu.leave_memory();
    let pages = |log: &[u64]| -> Vec<u64> {
        (0..log.len() as u64 * 64)
            .filter(|n| log[(n / 64) as usize] & (1 << (n % 64)) != 0)
            .collect()
    };
    for round in 0..3u64 {
        let at = DATA + round * 0x5000;
        for _ in 0..2 {
            assert_eq!(t.cpu.store_lin::<u64>(at, 1, Access::Kernel), Ok(()));
        }
        assert!(t.cpu.load_lin::<u64>(at + 0x1000, Access::Kernel).is_ok());
        let log = machine.take_dirty(0).unwrap();
        assert_eq!(pages(&log), [at >> 12]);
        t.cpu.catch_up_with_memory();
        t.cpu.leave_memory();
    }
    assert!(machine.take_dirty(0x1000).is_err());
}

#[test]
fn read_only_slots_turn_writes_into_exits() {
    let mut t = TestCpu::new64();
    t.machine.protect(0, true, false).unwrap();
    // mov [rsi], rax ; mov rbx, [rsi] ; out
    t.write(CODE, &[0x48, 0x89, 0x06, 0x48, 0x8b, 0x1e, 0xe6, 0xf4]);
    t.write(DATA, &9u64.to_le_bytes());
    t.cpu.gpr[usize::from(reg::RSI)] = DATA;
    t.cpu.gpr[usize::from(reg::RAX)] = 4;
    assert_eq!(
        t.cpu.run(),
        CpuExit::MmioWrite {
            gpa: DATA,
            size: 8,
            data: 4
        }
    );
    assert!(matches!(t.cpu.run(), CpuExit::PortOut { .. }));
    assert_eq!(t.cpu.gpr[usize::from(reg::RBX)], 9);
    assert_eq!(t.read_u64(DATA), 9);
}

#[test]
fn maps_are_checked() {
    let t = TestCpu::new();
    let m = &t.machine;
    let b = t.backing();
    assert!(m.map(0x1000, 0x1000, b, 0, false, false).is_err());
    assert!(m.map(0x1000_0000, 0x800, b, 0, false, false).is_err());
    assert!(
        m.map(0x1000_0000, 0x1000, b, b.len(), false, false)
            .is_err()
    );
    assert!(m.map(u64::MAX - 0xfff, 0x1000, b, 0, false, false).is_err());
    assert!(m.map(0x1000_0000, 0x1000, b, 0x2000, false, false).is_ok());
    assert!(m.unmap(0x2000_0000).is_err());
    assert!(m.unmap(0x1000_0000).is_ok());
}

/// Runs `cpu` on a thread of its own until the flag falls; gives it back.
fn spin(mut cpu: Box<Cpu>, go_on: Arc<AtomicBool>) -> std::thread::JoinHandle<Box<Cpu>> {
    std::thread::spawn(move || {
        while go_on.load(Ordering::SeqCst) {
            match cpu.run() {
                CpuExit::Requested => {}
                CpuExit::MmioRead { .. } => cpu.complete_read(0),
                CpuExit::MmioWrite { .. } | CpuExit::PortOut { .. } => {}
                other => panic!("{other:?} at {:#x}", cpu.rip),
            }
        }
        cpu
    })
}

#[test]
fn unmapping_under_a_running_processor() {
    let t = TestCpu::new64();
    // l: inc qword [rsi] ; jmp l
    t.write(CODE, &[0x48, 0xff, 0x06, 0xeb, 0xfb]);
    let (machine, backing) = (t.machine.clone(), t.backing().clone());
    machine
        .map(0x1000_0000, 0x1000, &backing, DATA as usize, false, false)
        .unwrap();
    let mut cpu = t.cpu;
    cpu.gpr[usize::from(reg::RSI)] = 0x1000_0000;
    let shared = cpu.shared.clone();
    let go_on = Arc::new(AtomicBool::new(true));
    let runner = spin(cpu, go_on.clone());
    for _ in 0..50 {
        machine.unmap(0x1000_0000).unwrap();
        let mut before = [0; 8];
        assert!(machine.memory.read_physical(DATA, &mut before));
        std::thread::sleep(std::time::Duration::from_millis(1));
        let mut after = [0; 8];
        assert!(machine.memory.read_physical(DATA, &mut after));
        assert_eq!(before, after, "written after unmap returned");
        machine
            .map(0x1000_0000, 0x1000, &backing, DATA as usize, false, false)
            .unwrap();
        std::thread::yield_now();
    }
    go_on.store(false, Ordering::SeqCst);
    shared.request_exit();
    runner.join().unwrap();
}

#[test]
fn another_processor_rewrites_running_code() {
    let mut t = TestCpu::with_processors(2);
    t.write(TABLES, &((TABLES + 0x1000) | 7).to_le_bytes());
    t.write(TABLES + 0x1000, &((TABLES + 0x2000) | 7).to_le_bytes());
    t.write(TABLES + 0x2000, &(PS | P | W | U).to_le_bytes());
    t.write(TABLES + 0x2008, &(0x20_0000 | PS | P | W | U).to_le_bytes());
    let mut other = t.another(1);
    TestCpu::set_up_64(&mut t.cpu);
    TestCpu::set_up_64(&mut other);
    other.sys.activity = crate::sys::state::Activity::Running;
    // l: mov eax, imm32 ; mov [rsi], eax ; jmp l
    t.write(CODE, &[0xb8, 0, 0, 0, 0, 0x89, 0x06, 0xeb, 0xf7]);
    other.gpr[usize::from(reg::RSI)] = DATA;
    other.rip = CODE;
    other.gpr[usize::from(reg::RSP)] = STACK;
    let shared = other.shared.clone();
    let go_on = Arc::new(AtomicBool::new(true));
    let runner = spin(other, go_on.clone());
    for value in 1..200u32 {
        // mov [rdi], eax ; out 0xf4, al
        t.write(CODE + 0x8000, &[0x89, 0x07, 0xe6, 0xf4]);
        t.cpu.rip = CODE + 0x8000;
        t.cpu.gpr[usize::from(reg::RDI)] = CODE + 1;
        t.cpu.gpr[usize::from(reg::RAX)] = u64::from(value);
        assert!(matches!(t.cpu.run(), CpuExit::PortOut { .. }));
        t.cpu.forget_devices();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while t.read(DATA, 4) != value.to_le_bytes() {
            assert!(std::time::Instant::now() < deadline, "{value} never seen");
            std::thread::yield_now();
        }
    }
    go_on.store(false, Ordering::SeqCst);
    shared.request_exit();
    runner.join().unwrap();
}

#[test]
fn locked_additions_of_two_processors_add_up() {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    for at in [DATA, DATA + 5, DATA + 62, DATA + 0xffd] {
        let mut t = TestCpu::with_processors(2);
        t.write(TABLES, &((TABLES + 0x1000) | 7).to_le_bytes());
        t.write(TABLES + 0x1000, &((TABLES + 0x2000) | 7).to_le_bytes());
        t.write(TABLES + 0x2000, &(PS | P | W | U).to_le_bytes());
        // l: lock inc qword [rsi] ; dec rcx ; jnz l ; out 0xf4, al
        t.write(
            CODE,
            &[
                0xf0, 0x48, 0xff, 0x06, 0x48, 0xff, 0xc9, 0x75, 0xf7, 0xe6, 0xf4,
            ],
        );
        let mut other = t.another(1);
        TestCpu::set_up_64(&mut t.cpu);
        TestCpu::set_up_64(&mut other);
        other.sys.activity = crate::sys::state::Activity::Running;
        const EACH: u64 = 20_000;
        let run = |cpu: &mut Cpu| {
            cpu.gpr[usize::from(reg::RSI)] = at;
            cpu.gpr[usize::from(reg::RCX)] = EACH;
            assert!(matches!(cpu.run(), CpuExit::PortOut { .. }));
        };
        std::thread::scope(|s| {
            s.spawn(|| run(&mut other));
            run(&mut t.cpu);
        });
        assert_eq!(t.read_u64(at), 2 * EACH, "at {at:#x}");
    }
}
