use super::*;
use crate::flags::rflags;
use crate::testing::{CODE, STACK, TestCpu};
use crate::trap::vector;

#[test]
fn privilege_change_through_the_tss() {
    let mut k = Kernel::protected();
    k.enter_user(USER_CODE32);
    assert_eq!(k.run_to_handler(&[0xf4]), vector::GP);
    let frame: [u64; 6] = k.frame();
    assert_eq!(
        frame,
        [
            0,
            CODE,
            u64::from(USER_CODE32),
            0x10002,
            STACK,
            u64::from(USER_DATA)
        ]
    );
    assert_eq!(k.get(reg::RSP), RSP0 - 24);
    assert_eq!(k.sys.segments[2].selector, KERNEL_DATA);
}

#[test]
fn same_level_pushes_three_words() {
    let mut k = Kernel::protected();
    assert_eq!(k.run_to_handler(&[0xcd, 0x33]), 0x33);
    assert_eq!(k.frame::<3>(), [CODE + 2, 8, 2]);
    assert_eq!(k.get(reg::RSP), STACK - 12);
}

#[test]
fn iret_to_the_outer_level_drops_inner_segments() {
    let mut k = Kernel::protected();
    let at = CODE as u32 + 0x100;
    for (n, word) in [
        at,
        u32::from(USER_CODE32),
        0x202,
        0x7000,
        u32::from(USER_DATA),
    ]
    .iter()
    .enumerate()
    {
        k.put(STACK + 4 * n as u64, &word.to_le_bytes());
    }
    k.put(u64::from(at), &[0x0f, 0x0b]);
    assert_eq!(k.run_to_handler(&[0xcf]), vector::UD);
    assert_eq!(k.frame::<1>(), [u64::from(at)]);
    assert_eq!(k.frame::<5>()[3], 0x7000);
    assert!(k.sys.segments[3].unusable, "DS was of level 0");
}

#[test]
fn call_gate_copies_parameters() {
    let mut k = Kernel::protected();
    let target = HANDLERS + 16 * 0x92;
    // 32-bit call gate, DPL 3, two parameters.
    let gate = (target & 0xffff) | (8 << 16) | (0xec02 << 32);
    k.put(GDT + u64::from(CALL_GATE), &gate.to_le_bytes());
    k.enter_user(USER_CODE32);
    // PUSH 0x11; PUSH 0x22; CALL FAR gate:0
    let code = [
        0x6a,
        0x11,
        0x6a,
        0x22,
        0x9a,
        0,
        0,
        0,
        0,
        CALL_GATE as u8 | 3,
        0,
    ];
    assert_eq!(k.run_to_handler(&code), 0x92);
    assert_eq!(
        k.frame::<6>(),
        [
            CODE + 11,
            u64::from(USER_CODE32),
            0x22,
            0x11,
            STACK - 8,
            u64::from(USER_DATA)
        ]
    );
    // RETF 8 releases the parameters on both stacks.
    k.put(CODE + 11, &[0x0f, 0x0b]);
    assert_eq!(k.run_to_handler(&[0xca, 8, 0]), vector::UD);
    assert_eq!(k.frame::<4>()[3], STACK);
}

fn second_task(k: &mut Kernel, eip: u64) {
    let tss = TSS + 0x100;
    for (offset, value) in [
        (0x20, eip),
        (0x24, 2),
        (0x28, 0xa0a0),
        (0x38, 0x6000),
        (0x48, u64::from(KERNEL_DATA)),
        (0x4c, u64::from(KERNEL_CODE)),
        (0x50, u64::from(KERNEL_DATA)),
        (0x54, u64::from(KERNEL_DATA)),
        (0x58, 0),
        (0x5c, 0),
        (0x60, 0),
    ] {
        k.put(tss + offset, &(value as u32).to_le_bytes());
    }
}

#[test]
fn task_switch_by_call_and_back_by_iret() {
    let mut k = Kernel::protected();
    let other = CODE + 0x200;
    second_task(&mut k, other);
    // The other task: IRET; UD2
    k.put(other, &[0xcf, 0x0f, 0x0b]);
    k.set(reg::RBX, 0x1234);
    // CALL FAR tss:0; INT 0x55
    let code = [0x9a, 0, 0, 0, 0, TSS2_SELECTOR as u8, 0, 0xcd, 0x55];
    assert_eq!(k.run_to_handler(&code), 0x55);
    assert_eq!(k.frame::<1>(), [CODE + 9]);
    assert_eq!(k.get(reg::RBX), 0x1234);
    assert_eq!(k.sys.tr.selector, TSS_SELECTOR);
    assert_eq!(k.rflags & rflags::NT, 0);
    // The other one went on where it left, and is no longer busy.
    let saved = k.t.read(TSS + 0x120, 4);
    assert_eq!(saved, ((other + 1) as u32).to_le_bytes());
    let kind = k.t.read(GDT + u64::from(TSS2_SELECTOR) + 5, 1);
    assert_eq!(kind, [0x89]);
    assert!(k.sys.cr0 & crate::sys::state::cr0::TS != 0);
}

#[test]
fn task_gate_in_the_idt_gets_the_error_code() {
    let mut k = Kernel::protected();
    second_task(&mut k, HANDLERS + 16 * 13);
    let gate = 0x0000_8500_0000_0000 | (u64::from(TSS2_SELECTOR) << 16);
    k.put(IDT + 13 * 8, &gate.to_le_bytes());
    // MOV EAX, 0x44; MOV DS, EAX: LDT is null
    let code = [0xb8, 0x44, 0, 0, 0, 0x8e, 0xd8];
    assert_eq!(k.run_to_handler(&code), vector::GP);
    assert_eq!(k.get(reg::RSP), 0x6000 - 4);
    assert_eq!(k.frame::<1>(), [0x44]);
    assert_eq!(k.get(reg::RAX), 0xa0a0);
    assert_ne!(k.rflags & rflags::NT, 0);
    // Linked back, and the old task saved at the fault.
    assert_eq!(k.t.read(TSS + 0x100, 2), TSS_SELECTOR.to_le_bytes());
    let eip = ((CODE + 5) as u32).to_le_bytes();
    assert_eq!(k.t.read(TSS + 0x20, 4), eip);
}

#[test]
fn task_gate_by_jump() {
    let mut k = Kernel::protected();
    second_task(&mut k, HANDLERS + 16 * 0x77);
    let code = [0xea, 0, 0, 0, 0, TASK_GATE as u8, 0];
    assert_eq!(k.run_to_handler(&code), 0x77);
    assert_eq!(k.rflags & rflags::NT, 0);
    assert_eq!(k.t.read(GDT + u64::from(TSS_SELECTOR) + 5, 1), [0x89]);
    assert_eq!(k.sys.tr.selector, TSS2_SELECTOR);
}

#[test]
fn virtual_8086_mode_and_back() {
    let mut k = Kernel::protected();
    let flags = (rflags::VM | 2) as u32;
    for (n, word) in [0u32, 0x1000, flags, 0xfffe, 0x2000, 0, 0x3000, 0, 0x1800]
        .iter()
        .enumerate()
    {
        k.put(STACK + 4 * n as u64, &word.to_le_bytes());
    }
    // At 1000:0000: MOV AX, DS; INT 0x21
    k.put(0x10000, &[0x8c, 0xd8, 0xcd, 0x21]);
    // IRETD, placed away from the program.
    k.rip = 0x30000;
    assert_eq!(k.run_to_handler(&[0xcf]), vector::GP);
    assert_eq!(k.get(reg::RAX) & 0xffff, 0x3000);
    let frame: [u64; 10] = k.frame();
    assert_eq!(frame[0..3], [0, 2, 0x1000]);
    assert_eq!(frame[3] & rflags::VM, rflags::VM);
    // SP, SS, ES, DS, FS, GS
    assert_eq!(frame[4..], [0xfffe, 0x2000, 0, 0x3000, 0, 0x1800]);
    assert!(!k.in_v86());
    assert!(k.sys.segments[3].unusable);
}

#[test]
fn real_mode_interrupts() {
    let mut t = TestCpu::new16();
    // Vector 0x21 at 0000:7000: HLT
    t.write(0x21 * 4, &[0x00, 0x70, 0x00, 0x00]);
    t.write(0x7000, &[0xf4]);
    t.write(CODE, &[0xfb, 0xcd, 0x21]);
    let exit = t.cpu.run();
    assert!(matches!(exit, CpuExit::Halted { .. }), "{exit:?}");
    assert_eq!(t.cpu.rip, 0x7001);
    assert_eq!(t.cpu.sys.segments[1].selector, 0);
    assert_eq!(t.cpu.rflags & rflags::IF, 0);
    let sp = t.cpu.gpr[4];
    assert_eq!(sp, 0xffea);
    let frame = t.read(CODE + sp, 6);
    assert_eq!(frame, [3, 0, 0x00, 0x10, 0x02, 0x02]);
}

#[test]
fn real_mode_without_vectors_shuts_down() {
    let mut t = TestCpu::new16();
    t.cpu.sys.idt.limit = 0;
    t.write(CODE, &[0x0f, 0x0b]);
    assert_eq!(t.cpu.run(), CpuExit::Shutdown);
}

/// The way of every boot loader: real mode, protected mode, long mode.
#[test]
fn from_real_mode_to_long_mode() {
    let mut t = TestCpu::new64();
    // A GDT: null, 32-bit code, data, 64-bit code.
    for (n, entry) in [
        0u64,
        0x00cf_9a00_0000_ffff,
        0x00cf_9200_0000_ffff,
        0x00af_9a00_0000_ffff,
    ]
    .iter()
    .enumerate()
    {
        t.write(GDT + 8 * n as u64, &entry.to_le_bytes());
    }
    t.write(0x600, &[0x1f, 0, 0x00, 0x10, 0, 0]);
    t.cpu.sys = crate::sys::SystemState::reset();
    t.cpu.init();
    let cs = Segment::real(0);
    for index in 0..6 {
        t.cpu.set_segment(index, cs);
    }
    t.cpu.update_mode();
    t.cpu.rip = 0x7c00;
    #[rustfmt::skip]
    let code16 = [
        0x66, 0x0f, 0x01, 0x16, 0x00, 0x06,       // LGDT [0x600] (32-bit base)
        0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, // CR0.PE
        0x66, 0xea, 0x00, 0x7d, 0x00, 0x00, 0x08, 0x00, // JMP 8:0x7d00
    ];
    t.write(0x7c00, &code16);
    let tables = (crate::testing::TABLES as u32).to_le_bytes();
    #[rustfmt::skip]
    let mut code32 = vec![
        0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xd0,     // DS, SS
        0x0f, 0x20, 0xe0, 0x83, 0xc8, 0x20, 0x0f, 0x22, 0xe0, // CR4.PAE
        0xb8,
    ];
    code32.extend(tables);
    #[rustfmt::skip]
    code32.extend([
        0x0f, 0x22, 0xd8,                                 // CR3
        0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32,         // RDMSR EFER
        0x0d, 0x00, 0x01, 0x00, 0x00, 0x0f, 0x30,         // LME
        0x0f, 0x20, 0xc0, 0x0d, 0, 0, 0, 0x80, 0x0f, 0x22, 0xc0, // CR0.PG
        0xea, 0x00, 0x7e, 0x00, 0x00, 0x18, 0x00,         // JMP 0x18:0x7e00
    ]);
    t.write(0x7d00, &code32);
    // MOV RAX, 0x123456789abcdef0; HLT
    t.write(
        0x7e00,
        &[
            0x48, 0xb8, 0xf0, 0xde, 0xbc, 0x9a, 0x78, 0x56, 0x34, 0x12, 0xf4,
        ],
    );
    let exit = t.cpu.run();
    assert!(
        matches!(exit, CpuExit::Halted { .. }),
        "{exit:?} at {:#x}",
        t.cpu.rip
    );
    assert_eq!(t.cpu.gpr[0], 0x1234_5678_9abc_def0);
    assert!(t.cpu.sys.mode.is64());
    assert_eq!(t.cpu.sys.efer & (1 << 10), 1 << 10);
}

#[test]
fn far_jump_checks() {
    let mut k = Kernel::protected();
    // A data segment
    let code = [0xea, 0, 0, 0, 0, KERNEL_DATA as u8, 0];
    assert_eq!(k.run_to_handler(&code), vector::GP);
    assert_eq!(k.frame::<1>(), [u64::from(KERNEL_DATA)]);
    let mut k = Kernel::protected();
    // Null
    assert_eq!(k.run_to_handler(&[0xea, 0, 0, 0, 0, 0, 0]), vector::GP);
    assert_eq!(k.frame::<1>(), [0]);
}

#[test]
fn arpl_and_bound_segments() {
    let mut k = Kernel::protected();
    k.set(reg::RAX, 0x10);
    k.set(reg::RBX, 0x03);
    // ARPL AX, BX; INT 0x60
    assert_eq!(k.run_to_handler(&[0x63, 0xd8, 0xcd, 0x60]), 0x60);
    assert_eq!(k.get(reg::RAX), 0x13);
    assert_ne!(k.frame::<3>()[2] & rflags::ZF, 0);
}

#[test]
fn segment_limits_fault() {
    let mut k = Kernel::protected();
    // An expand-up data segment of 4 KiB at CALL_GATE's place.
    let small = 0x0040_9300_0000_0fffu64;
    k.put(GDT + u64::from(CALL_GATE), &small.to_le_bytes());
    k.set(reg::RAX, u64::from(CALL_GATE));
    // MOV ES, EAX; MOV EBX, ES:[0xffd]
    let code = [0x8e, 0xc0, 0x26, 0x8b, 0x1d, 0xfd, 0x0f, 0, 0];
    assert_eq!(k.run_to_handler(&code), vector::GP);
    assert_eq!(k.frame::<2>(), [0, CODE + 2]);
}

#[test]
fn compatibility_kernel_segment_exists() {
    let mut k = Kernel::long();
    // JMP FAR [RIP] to 32-bit code at level 0, where INC EAX is one byte.
    let mut code = vec![0xff, 0x2d, 0, 0, 0, 0];
    code.extend((CODE as u32 + 0x40).to_le_bytes());
    code.extend(KERNEL_CODE32.to_le_bytes());
    k.put(CODE + 0x40, &[0x40, 0x0f, 0x0b]);
    k.set(reg::RAX, 6);
    assert_eq!(k.run_to_handler(&code), vector::UD);
    assert_eq!(k.get(reg::RAX), 7);
    assert_eq!(k.frame::<2>()[1], u64::from(KERNEL_CODE32));
}

#[test]
fn far_pointers_load_both_registers() {
    let mut k = Kernel::protected();
    k.put(0x40000, &[0x78, 0x56, 0x34, 0x12, USER_DATA as u8, 0]);
    k.set(reg::RBX, 0x40000);
    // LES ECX, [EBX]; LFS DX, [EBX+2]; INT 0x61
    k.put(0x40002 + 2, &[KERNEL_DATA as u8, 0]);
    let code = [0xc4, 0x0b, 0x66, 0x0f, 0xb4, 0x53, 0x02, 0xcd, 0x61];
    assert_eq!(k.run_to_handler(&code), 0x61);
    assert_eq!(k.get(reg::RCX), 0x1234_5678);
    assert_eq!(k.sys.segments[0].selector, KERNEL_DATA);
    assert_eq!(k.get(reg::RDX) & 0xffff, 0x1234);
    assert_eq!(k.sys.segments[4].selector, KERNEL_DATA);
}
