use super::*;
use crate::flags::rflags;
use crate::sys::state::{cr0, cr4};
use crate::testing::{CODE, STACK};
use crate::trap::vector;

const RF: u64 = rflags::RF;

/// Runs `code` at level 3 until a handler halts; checks where the frame says it came from.
fn user_fault(code: &[u8], expected: u8, error: Option<u64>, offset: u64) -> Kernel {
    let mut k = Kernel::long();
    k.enter_user(USER_CODE64);
    let vector = k.run_to_handler(code);
    assert_eq!(vector, expected);
    let frame: [u64; 6] = k.frame();
    let (code, rest) = match error {
        Some(_) => (Some(frame[0]), &frame[1..]),
        None => (None, &frame[..5]),
    };
    assert_eq!(code, error, "error code of vector {vector}");
    assert_eq!(rest[0], CODE + offset, "RIP");
    assert_eq!(rest[1], u64::from(USER_CODE64));
    assert_eq!(rest[3], STACK);
    assert_eq!(rest[4], u64::from(USER_DATA));
    assert_eq!(k.cpl, 0);
    let size = if error.is_some() { 48 } else { 40 };
    assert_eq!(k.get(reg::RSP), RSP0 - size);
    assert_eq!(k.sys.segments[2].selector, 0, "SS is null");
    k
}

#[test]
fn faults_push_their_error_codes() {
    // XOR ECX, ECX; DIV ECX
    let k = user_fault(&[0x31, 0xc9, 0xf7, 0xf1], vector::DE, None, 2);
    assert_eq!(k.frame::<3>()[2] & RF, RF, "faults set RF");
    user_fault(&[0x0f, 0x0b], vector::UD, None, 0);
    // HLT
    user_fault(&[0xf4], vector::GP, Some(0), 0);
    // MOV EAX, 0x103; MOV DS, EAX: past the table
    user_fault(
        &[0xb8, 0x03, 1, 0, 0, 0x8e, 0xd8],
        vector::GP,
        Some(0x100),
        5,
    );
    // MOV EAX, 0x43; MOV DS, EAX: DPL 0 comes before absence
    user_fault(
        &[0xb8, 0x43, 0, 0, 0, 0x8e, 0xd8],
        vector::GP,
        Some(0x40),
        5,
    );
    // INT 0x21: the gate is for level 0
    user_fault(&[0xcd, 0x21], vector::GP, Some(0x21 * 8 + 2), 0);
    // MOV EAX, [RAX] with RAX non-canonical
    user_fault(
        &[0x48, 0x0f, 0xba, 0xe8, 0x2f, 0x8b, 0x00],
        vector::GP,
        Some(0),
        5,
    );
}

#[test]
fn absent_segment() {
    let mut k = Kernel::long();
    // MOV EAX, 0x40; MOV DS, EAX
    let vector = k.run_to_handler(&[0xb8, ABSENT as u8, 0, 0, 0, 0x8e, 0xd8]);
    assert_eq!(vector, vector::NP);
    assert_eq!(k.frame::<1>(), [0x40]);
    // The same for SS is a stack fault.
    let mut k = Kernel::long();
    let vector = k.run_to_handler(&[0xb8, ABSENT as u8, 0, 0, 0, 0x8e, 0xd0]);
    assert_eq!(vector, vector::SS);
    assert_eq!(k.frame::<1>(), [0x40]);
}

#[test]
fn page_fault() {
    // MOV EAX, 0x7f000000; MOV [RAX], EAX
    let code = [0xb8, 0, 0, 0, 0x7f, 0x89, 0x00];
    let k = user_fault(&code, vector::PF, Some(6), 5);
    assert_eq!(k.sys.cr2, 0x7f00_0000);
}

#[test]
fn traps_push_the_next_instruction() {
    let k = user_fault(&[0xcc], vector::BP, None, 1);
    assert_eq!(k.frame::<3>()[2] & RF, 0, "traps leave RF clear");
    user_fault(&[0xcd, 0x80], 0x80, None, 2);
}

#[test]
fn double_and_triple_fault() {
    let mut k = Kernel::long();
    k.gate(vector::GP, KERNEL_CODE, 0x0e, 0);
    k.enter_user(USER_CODE64);
    assert_eq!(k.run_to_handler(&[0xf4]), vector::DF);
    assert_eq!(k.frame::<2>(), [0, CODE]);
    assert_eq!(k.get(reg::RSP), IST1 - 48, "on its own stack");

    let mut k = Kernel::long();
    k.gate(vector::GP, KERNEL_CODE, 0x0e, 0);
    k.gate(vector::DF, KERNEL_CODE, 0x0e, 0);
    k.put(CODE, &[0x0f, 0x01, 0xf8, 0xf4]);
    k.enter_user(USER_CODE64);
    assert_eq!(k.run(), CpuExit::Shutdown);
}

#[test]
fn benign_then_contributory_is_delivered_in_turn() {
    let mut k = Kernel::long();
    k.gate(vector::UD, KERNEL_CODE, 0x0e, 0);
    assert_eq!(k.run_to_handler(&[0x0f, 0x0b]), vector::NP);
    // The gate of vector 6 in the IDT, while an external event was delivered.
    assert_eq!(k.frame::<2>(), [6 * 8 + 2 + 1, CODE]);
}

#[test]
fn page_fault_in_delivery() {
    let mut k = Kernel::long();
    // The stack of level 0 is unmapped: #PF on the way of #PF.
    k.put(TSS + 4, &0x7f00_0000u64.to_le_bytes());
    k.enter_user(USER_CODE64);
    let code = [0xb8, 0, 0, 0, 0x7e, 0x8b, 0x00];
    assert_eq!(k.run_to_handler(&code), vector::DF);
    assert_eq!(k.sys.cr2, 0x7f00_0000 - 8);
}

#[test]
fn interrupt_stack_is_aligned_and_iret_goes_back() {
    let mut k = Kernel::long();
    k.set(reg::RSP, STACK - 3);
    k.handler(0x80, &[0x48, 0xcf]);
    // INT 0x80; NOP; UD2
    assert_eq!(
        k.run_to_handler(&[0xcd, 0x80, 0x90, 0x0f, 0x0b]),
        vector::UD
    );
    let frame: [u64; 5] = k.frame();
    assert_eq!(frame[0], CODE + 3);
    assert_eq!(frame[3], STACK - 3);
    assert_eq!(k.get(reg::RSP) % 16, 8);
}

#[test]
fn iret_to_user_and_to_compatibility_mode() {
    for (code, bits) in [(USER_CODE64, 64), (USER_CODE32, 32)] {
        let mut k = Kernel::long();
        let at = CODE + 0x100;
        for (n, word) in [at, u64::from(code), 0x202, 0x7000, u64::from(USER_DATA)]
            .iter()
            .enumerate()
        {
            k.put(STACK + 8 * n as u64, &word.to_le_bytes());
        }
        // There: UD2.
        k.put(at, &[0x0f, 0x0b]);
        // IRETQ
        assert_eq!(k.run_to_handler(&[0x48, 0xcf]), vector::UD);
        let frame: [u64; 5] = k.frame();
        assert_eq!(frame[0], at, "{bits} bits");
        assert_eq!(frame[1], u64::from(code));
        assert_eq!(frame[2], 0x202 | RF);
        assert_eq!(frame[3..], [0x7000, u64::from(USER_DATA)]);
    }
}

#[test]
fn iret_checks() {
    // NT set in IA-32e mode.
    let mut k = Kernel::long();
    k.rflags |= rflags::NT;
    assert_eq!(k.run_to_handler(&[0x48, 0xcf]), vector::GP);
    assert_eq!(k.frame::<1>(), [0]);
    // To a more privileged level.
    let mut k = Kernel::long();
    k.enter_user(USER_CODE64);
    k.put(STACK, &(CODE + 0x100).to_le_bytes());
    k.put(STACK + 8, &u64::from(KERNEL_CODE).to_le_bytes());
    assert_eq!(k.run_to_handler(&[0x48, 0xcf]), vector::GP);
    assert_eq!(k.frame::<1>(), [u64::from(KERNEL_CODE)]);
    // To a non-canonical RIP: the fault is in the old context.
    let mut k = Kernel::long();
    for (n, word) in [1u64 << 47, 8, 2, STACK, 0x10].iter().enumerate() {
        k.put(STACK + 8 * n as u64, &word.to_le_bytes());
    }
    assert_eq!(k.run_to_handler(&[0x48, 0xcf]), vector::GP);
    assert_eq!(k.frame::<2>(), [0, CODE]);
}

fn with_syscalls() -> Kernel {
    let mut k = Kernel::long();
    // User base 0x1b: +8 data 0x23, +16 code 0x2b.
    let star = (u64::from(USER_CODE32) << 48) | (u64::from(KERNEL_CODE) << 32);
    assert_eq!(k.write_msr(0xc000_0081, star), Ok(()));
    assert_eq!(k.write_msr(0xc000_0082, HANDLERS + 16 * 0x90), Ok(()));
    assert_eq!(k.write_msr(0xc000_0084, rflags::IF | rflags::DF), Ok(()));
    k
}

#[test]
fn syscall_and_sysret() {
    let mut k = with_syscalls();
    k.enter_user(USER_CODE64);
    k.rflags |= rflags::IF | rflags::DF;
    assert_eq!(k.run_to_handler(&[0x0f, 0x05]), 0x90);
    assert_eq!(k.get(reg::RCX), CODE + 2);
    assert_eq!(k.get(reg::R11), 0x602);
    assert_eq!(k.rflags & (rflags::IF | rflags::DF), 0);
    assert_eq!(k.get(reg::RSP), STACK, "SYSCALL leaves RSP alone");
    assert_eq!(k.cpl, 0);
    assert_eq!(k.sys.segments[1].selector, KERNEL_CODE);
    assert_eq!(k.sys.segments[2].selector, KERNEL_DATA);
    // SYSRETQ, then UD2 at level 3.
    k.put(CODE + 2, &[0x0f, 0x0b]);
    assert_eq!(k.run_to_handler(&[0x48, 0x0f, 0x07]), vector::UD);
    let frame: [u64; 5] = k.frame();
    assert_eq!(frame[0], CODE + 2);
    assert_eq!(frame[1], u64::from(USER_CODE64));
    assert_eq!(frame[2], 0x602 | RF);
    assert_eq!(frame[4], u64::from(USER_DATA));
}

#[test]
fn syscall_needs_sce() {
    let mut k = with_syscalls();
    let efer = k.sys.efer;
    assert_eq!(k.write_efer(efer & !1), Ok(()));
    assert_eq!(k.run_to_handler(&[0x0f, 0x05]), vector::UD);
}

#[test]
fn sysenter_and_sysexit() {
    let mut k = Kernel::long();
    assert_eq!(k.write_msr(0x174, u64::from(KERNEL_CODE)), Ok(()));
    assert_eq!(k.write_msr(0x175, 0x7800), Ok(()));
    assert_eq!(k.write_msr(0x176, HANDLERS + 16 * 0x91), Ok(()));
    k.enter_user(USER_CODE32);
    assert_eq!(k.run_to_handler(&[0x0f, 0x34]), 0x91);
    assert_eq!(k.get(reg::RSP), 0x7800);
    assert!(k.sys.mode.is64());
    assert_eq!(k.cpl, 0);
}

#[test]
fn single_step() {
    let mut k = Kernel::long();
    k.enter_user(USER_CODE64);
    k.rflags |= rflags::TF;
    k.want_events();
    // NOP; NOP
    assert_eq!(k.run_to_handler(&[0x90, 0x90]), vector::DB);
    assert_eq!(k.frame::<1>(), [CODE + 1]);
    assert_eq!(k.sys.dr6 & (1 << 14), 1 << 14);
    assert_eq!(k.rflags & rflags::TF, 0);
}

#[test]
fn popf_steps_after_the_next_instruction() {
    let mut k = Kernel::long();
    k.put(STACK, &(rflags::TF | 2).to_le_bytes());
    // POPFQ; NOP; NOP
    assert_eq!(k.run_to_handler(&[0x9d, 0x90, 0x90]), vector::DB);
    assert_eq!(k.frame::<1>(), [CODE + 2]);
}

#[test]
fn instruction_breakpoint_and_resume_flag() {
    let mut k = Kernel::long();
    k.sys.dr[1] = CODE + 1;
    k.sys.dr7 |= 1 << 2;
    k.update_mode();
    k.want_events();
    // NOP; NOP; UD2
    assert_eq!(k.run_to_handler(&[0x90, 0x90, 0x0f, 0x0b]), vector::DB);
    assert_eq!(k.frame::<1>(), [CODE + 1]);
    assert_eq!(k.sys.dr6 & 0xf, 2);
    // Going back with RF set passes it.
    let rsp = k.get(reg::RSP);
    let flags = k.frame::<3>()[2] | RF;
    k.put(rsp + 16, &flags.to_le_bytes());
    assert_eq!(k.run_to_handler(&[0x48, 0xcf]), vector::UD);
    assert_eq!(k.frame::<1>(), [CODE + 2]);
}

#[test]
fn data_breakpoint() {
    let mut k = Kernel::long();
    k.sys.dr[0] = 0x40004;
    // Write, four bytes, local.
    k.sys.dr7 |= 1 | (1 << 16) | (3 << 18);
    k.update_mode();
    k.want_events();
    k.set(reg::RDI, 0x40000);
    // MOV EAX, [RDI+4]; MOV [RDI+7], AL; NOP
    let code = [0x8b, 0x47, 0x04, 0x88, 0x47, 0x07, 0x90];
    assert_eq!(k.run_to_handler(&code), vector::DB);
    assert_eq!(k.frame::<1>(), [CODE + 6]);
    assert_eq!(k.sys.dr6 & 0xf, 1);
}

#[test]
fn debug_registers_guard_themselves() {
    let mut k = Kernel::long();
    k.sys.dr7 |= 1 << 13;
    // MOV RAX, DR0
    assert_eq!(k.run_to_handler(&[0x0f, 0x21, 0xc0]), vector::DB);
    assert_eq!(k.frame::<1>(), [CODE]);
    assert_eq!(k.sys.dr6 & (1 << 13), 1 << 13);
    // DR4 with CR4.DE
    let mut k = Kernel::long();
    assert_eq!(k.change_cr4(|v| v | cr4::DE), Ok(()));
    assert_eq!(k.run_to_handler(&[0x0f, 0x21, 0xe0]), vector::UD);
}

#[test]
fn nmis_are_masked_until_iret() {
    let mut k = Kernel::long();
    k.t.machine.post_nmi(0);
    // NMI handler: NOP; HLT; IRETQ
    k.handler(2, &[0xf4, 0x48, 0xcf]);
    assert_eq!(k.run_to_handler(&[0x90, 0x0f, 0x0b]), vector::NMI);
    assert_eq!(k.get(reg::RSP), IST2 - 40);
    k.t.machine.post_nmi(0);
    // Still halted: the second waits.
    assert!(matches!(k.run(), CpuExit::Halted { .. }));
    assert_eq!(k.rip, HANDLERS + 33);
    assert!(k.sys.events.nmis_pending == 1 && k.sys.events.nmi_masked);
    k.sys.activity = crate::sys::state::Activity::Running;
    // IRETQ opens the gate: the second comes before the interrupted code goes on.
    assert_eq!(k.resume_to_handler(), vector::NMI);
    assert_eq!(k.frame::<1>(), [CODE]);
}

fn with_pending(vector: u8) -> Kernel {
    let mut k = Kernel::long();
    k.apic_mmio_write(0xf0, 4, 0x1ff);
    k.t.machine.post(0, vector, false);
    k
}

#[test]
fn sti_shadow_covers_one_instruction() {
    // STI; NOP; NOP: in one block, the interrupt may come later but not earlier than after NOP.
    let mut k = with_pending(0x41);
    assert_eq!(k.run_to_handler(&[0xfb, 0x90, 0x90, 0xf4]), 0x41);
    assert!(k.frame::<1>()[0] >= CODE + 2);
    // One instruction a time.
    let mut k = with_pending(0x41);
    k.put(CODE, &[0xfb, 0x90, 0x90]);
    assert_eq!(k.step(), Ok(()));
    assert_eq!(k.resume_to_handler(), 0x41);
    assert_eq!(k.frame::<1>(), [CODE + 2]);
    // STI; HLT wakes with RIP past HLT.
    let mut k = with_pending(0x42);
    assert_eq!(k.run_to_handler(&[0xfb, 0xf4, 0x90]), 0x42);
    assert_eq!(k.frame::<1>(), [CODE + 2]);
}

#[test]
fn mov_ss_shadow_covers_one_instruction() {
    let mut k = with_pending(0x43);
    k.rflags |= rflags::IF;
    k.put(CODE, &[0x8e, 0xd0, 0x90, 0x90]);
    k.set(reg::RAX, u64::from(KERNEL_DATA));
    assert_eq!(k.step(), Ok(()));
    assert_eq!(k.resume_to_handler(), 0x43);
    assert_eq!(k.frame::<1>(), [CODE + 3]);
}

#[test]
fn popf_lets_interrupts_in() {
    let mut k = with_pending(0x44);
    k.put(STACK, &(rflags::IF | 2).to_le_bytes());
    // POPFQ; NOP; HLT
    assert_eq!(k.run_to_handler(&[0x9d, 0x90, 0xf4]), 0x44);
    assert_eq!(k.frame::<1>(), [CODE + 1]);
}

#[test]
fn cr8_holds_interrupts_off() {
    let mut k = with_pending(0x45);
    k.rflags |= rflags::IF;
    k.set(reg::RAX, 4);
    k.set(reg::RBX, 3);
    k.apic.set_cr8(4);
    // NOP; MOV CR8, RBX; NOP; HLT
    assert_eq!(
        k.run_to_handler(&[0x90, 0x44, 0x0f, 0x22, 0xc3, 0x90, 0xf4]),
        0x45
    );
    assert_eq!(k.frame::<1>(), [CODE + 5]);
}

#[test]
fn call_gate_to_level_0() {
    let mut k = Kernel::long();
    let target = HANDLERS + 16 * 0x92;
    let low = (target & 0xffff) | (8 << 16) | (0xec00 << 32);
    k.put(GDT + u64::from(CALL_GATE), &low.to_le_bytes());
    k.put(GDT + u64::from(CALL_GATE) + 8, &0u64.to_le_bytes());
    k.enter_user(USER_CODE64);
    // CALL FAR [RIP]; pointer behind it.
    let mut code = vec![0xff, 0x1d, 0, 0, 0, 0];
    code.extend([0, 0, 0, 0, CALL_GATE as u8 | 3, 0]);
    assert_eq!(k.run_to_handler(&code), 0x92);
    assert_eq!(
        k.frame::<4>(),
        [
            CODE + 6,
            u64::from(USER_CODE64),
            STACK,
            u64::from(USER_DATA)
        ]
    );
    // RETFQ goes back.
    k.put(CODE + 6, &[0x0f, 0x0b]);
    assert_eq!(k.run_to_handler(&[0x48, 0xcb]), vector::UD);
    assert_eq!(k.frame::<4>()[0], CODE + 6);
    assert_eq!(k.frame::<4>()[3], STACK);
}

#[test]
fn port_permissions() {
    let mut k = Kernel::long();
    k.enter_user(USER_CODE64);
    // OUT 0x80, AL
    assert_eq!(k.run_to_handler(&[0xe6, 0x80]), vector::GP);
    let mut k = Kernel::long();
    // A map right behind the TSS, with port 0x80 open and 0x81 closed.
    let selector = GDT + u64::from(TSS_SELECTOR);
    k.put(
        selector,
        &(0x0000_8900_0000_00ff | (TSS << 16)).to_le_bytes(),
    );
    assert_eq!(k.load_task_register(TSS_SELECTOR), Ok(()));
    k.put(TSS + 0x68 + 0x10, &[0xfe, 0xff]);
    k.enter_user(USER_CODE64);
    k.put(CODE, &[0xe6, 0x80, 0xe7, 0x80]);
    let exit = k.run();
    assert!(
        matches!(
            exit,
            CpuExit::PortOut {
                port: 0x80,
                size: 1,
                ..
            }
        ),
        "{exit:?}"
    );
    // OUT 0x80, EAX needs four ports.
    assert_eq!(k.resume_to_handler(), vector::GP);
    assert_eq!(k.frame::<2>(), [0, CODE + 2]);
}

#[test]
fn rep_outs_reports_each_element() {
    let mut k = Kernel::long();
    k.put(0x40000, &[1, 2, 3]);
    k.set(reg::RSI, 0x40000);
    k.set(reg::RCX, 3);
    k.set(reg::RDX, 0x3f8);
    // REP OUTSB; UD2
    k.put(CODE, &[0xf3, 0x6e, 0x0f, 0x0b]);
    for data in 1..=3 {
        let exit = k.run();
        assert_eq!(
            exit,
            CpuExit::PortOut {
                port: 0x3f8,
                size: 1,
                data
            }
        );
    }
    assert_eq!(k.resume_to_handler(), vector::UD);
    assert_eq!(k.get(reg::RCX), 0);
    assert_eq!(k.get(reg::RSI), 0x40003);
}

#[test]
fn control_register_rules() {
    let mut k = Kernel::long();
    assert!(k.change_cr0(|v| v & !cr0::PE).is_err(), "PG without PE");
    assert!(k.change_cr0(|v| v | 1 << 32).is_err());
    assert!(
        k.change_cr0(|v| v & !cr0::PG).is_err(),
        "64-bit mode needs paging"
    );
    assert!(k.change_cr4(|v| v & !cr4::PAE).is_err());
    assert!(k.change_cr4(|v| v | cr4::LA57).is_err());
    assert!(
        k.change_efer(|v| v & !(1 << 8)).is_err(),
        "LME under paging"
    );
    assert!(k.load_cr3(1 << 60, true).is_err());
    assert_eq!(k.change_cr4(|v| v | cr4::PCIDE), Ok(()));
    k.sys.cr3 |= 5;
    assert_eq!(k.change_cr4(|v| v & !cr4::PCIDE), Ok(()));
    assert!(k.change_cr4(|v| v | cr4::PCIDE).is_err(), "PCID not zero");
}

#[test]
fn umip_hides_tables() {
    let mut k = Kernel::long();
    assert_eq!(k.change_cr4(|v| v | cr4::UMIP), Ok(()));
    k.enter_user(USER_CODE64);
    // STR EAX
    assert_eq!(k.run_to_handler(&[0x0f, 0x00, 0xc8]), vector::GP);
}

#[test]
fn swapgs_and_bases() {
    let mut k = Kernel::long();
    assert_eq!(k.change_cr4(|v| v | cr4::FSGSBASE), Ok(()));
    assert_eq!(k.write_msr(0xc000_0101, 0x1111), Ok(()));
    assert_eq!(k.write_msr(0xc000_0102, 0x2222), Ok(()));
    // SWAPGS; RDGSBASE RAX; UD2
    let code = [0x0f, 0x01, 0xf8, 0xf3, 0x48, 0x0f, 0xae, 0xc8, 0x0f, 0x0b];
    assert_eq!(k.run_to_handler(&code), vector::UD);
    assert_eq!(k.get(reg::RAX), 0x2222);
    assert_eq!(k.read_msr(0xc000_0102), Ok(0x1111));
}

#[test]
fn alignment_check() {
    let mut k = Kernel::long();
    assert_eq!(k.change_cr0(|v| v | cr0::AM), Ok(()));
    k.enter_user(USER_CODE64);
    let flags = k.rflags_full() | rflags::AC;
    k.set_rflags(flags);
    k.set(reg::RDI, 0x40001);
    // MOV EAX, [RDI]
    assert_eq!(k.run_to_handler(&[0x8b, 0x07]), vector::AC);
    assert_eq!(k.frame::<2>(), [0, CODE]);
}

#[test]
fn extint_window() {
    let mut k = Kernel::long();
    k.request_interrupt_window(true);
    k.put(CODE, &[0xfb, 0x90, 0xeb, 0xfe]);
    assert!(!k.ready_for_extint());
    assert_eq!(k.run(), CpuExit::InterruptWindow);
    assert!(k.ready_for_extint());
    k.request_interrupt_window(false);
    k.inject_extint(0x20);
    assert_eq!(k.resume_to_handler(), 0x20);
}

#[test]
fn lar_lsl_verr() {
    let mut k = Kernel::long();
    k.set(reg::RBX, u64::from(KERNEL_DATA));
    // LAR EAX, EBX; LSL ECX, EBX; VERW BX; SETZ DL; UD2
    let code = [
        0x0f, 0x02, 0xc3, 0x0f, 0x03, 0xcb, 0x0f, 0x00, 0xeb, 0x0f, 0x94, 0xc2, 0x0f, 0x0b,
    ];
    assert_eq!(k.run_to_handler(&code), vector::UD);
    assert_eq!(k.get(reg::RAX) & 0x00f0_ff00, 0x00c0_9300);
    assert_eq!(k.get(reg::RCX), 0xffff_ffff);
    assert_eq!(k.get(reg::RDX) & 0xff, 1);
}

#[test]
fn interrupts_get_in_between_sti_and_cli() {
    let mut k = with_pending(0x46);
    // STI; NOP; CLI; HLT
    assert_eq!(k.run_to_handler(&[0xfb, 0x90, 0xfa, 0xf4]), 0x46);
    assert_eq!(k.frame::<1>(), [CODE + 2]);
}

#[test]
fn mov_ss_suppresses_the_single_step_trap() {
    let mut k = Kernel::long();
    k.rflags |= rflags::TF;
    k.want_events();
    k.set(reg::RAX, u64::from(KERNEL_DATA));
    // MOV SS, EAX; NOP; NOP
    assert_eq!(k.run_to_handler(&[0x8e, 0xd0, 0x90, 0x90]), vector::DB);
    assert_eq!(k.frame::<1>(), [CODE + 3]);
}

#[test]
fn sysret_traps_at_once_if_it_sets_tf() {
    let mut k = with_syscalls();
    k.set(reg::RCX, CODE + 0x100);
    k.set(reg::R11, rflags::TF | 2);
    assert_eq!(k.run_to_handler(&[0x48, 0x0f, 0x07]), vector::DB);
    assert_eq!(k.frame::<2>(), [CODE + 0x100, u64::from(USER_CODE64)]);
}
