//! Requests and interrupts that arrive in loops without end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use skerry_x86cpu::CpuExit;
use skerry_x86cpu::testing::{CODE, DATA, STACK, TestCpu};

use crate::machine::{Deadline, RealHost, TUNINGS, furnish, gate, machine};
use crate::{apic, assemble};

const COUNT: u64 = DATA + 0x8000;
const HANDLER: u64 = CODE + 0x3000;

/// Loops of each kind.
fn loops() -> Vec<(&'static str, &'static [u8])> {
    vec![
        ("jmp $", assemble!("2:", "jmp 2b")),
        (
            "jcc",
            assemble!("2:", "inc rax", "cmp rax, -1", "jne 2b", "jmp 2b"),
        ),
        (
            "jcc over a block",
            assemble!(
                "2:",
                "test rax, rax",
                "jnz 3f",
                "inc rbx",
                "3:",
                "inc rax",
                "jmp 2b"
            ),
        ),
        ("loop", assemble!("2:", "loop 2b", "jmp 2b")),
        (
            "interrupts off and on",
            assemble!("2:", "cli", "inc rax", "sti", "inc rbx", "jmp 2b"),
        ),
        (
            "interrupts on for a moment",
            assemble!("2:", "sti", "nop", "cli", "pushfq", "pop rax", "jmp 2b"),
        ),
        ("jrcxz", assemble!("xor ecx, ecx", "2:", "jrcxz 2b", "ud2")),
        (
            "indirect jump",
            assemble!("lea rax, [rip + 2f]", "2:", "jmp rax"),
        ),
        (
            "indirect jumps in turn",
            assemble!(
                "lea rax, [rip + 2f]",
                "lea rbx, [rip + 3f]",
                "2:",
                "jmp rbx",
                "3:",
                "jmp rax",
            ),
        ),
        (
            "jump through memory",
            assemble!(
                "lea rax, [rip + 2f]",
                "mov [{data}], rax",
                "2:",
                "jmp qword ptr [{data}]";
                data = const DATA,
            ),
        ),
        (
            "returns only",
            // Each RET finds its own address again.
            assemble!(
                "lea rax, [rip + 2f]",
                "2:",
                "mov [rsp], rax",
                "mov [rsp + 8], rax",
                "mov [rsp + 16], rax",
                "mov [rsp + 24], rax",
                "lea rbx, [rip + 3f]",
                "mov [rsp], rbx",
                "mov [rsp + 8], rbx",
                "3:",
                "and rsp, -64",
                "mov [rsp], rbx",
                "ret",
            ),
        ),
        (
            "calls in a circle",
            assemble!(
                "2:", "call 3f", "jmp 2b", "3:", "call 4f", "ret", "4:", "inc rax", "ret",
            ),
        ),
        (
            "recursion on a stack that starts again",
            assemble!(
                "mov rbp, rsp",
                "2:",
                "lea rax, [rsp + 0x400]",
                "cmp rax, rbp",
                "cmovb rsp, rbp",
                "call 2b",
            ),
        ),
        (
            "recursion and return",
            assemble!(
                "2:",
                "mov ecx, 40",
                "call 3f",
                "jmp 2b",
                "3:",
                "dec ecx",
                "jz 4f",
                "call 3b",
                "4:",
                "ret",
            ),
        ),
        (
            "rep movs",
            assemble!(
                "2:",
                "mov esi, 0x50000",
                "mov edi, 0x150000",
                "mov ecx, 0x100000",
                "rep movsb",
                "jmp 2b",
            ),
        ),
        (
            "rep scas",
            assemble!(
                "mov al, 0x99",
                "2:",
                "mov edi, 0x50000",
                "mov ecx, 0x200000",
                "repne scasb",
                "jmp 2b",
            ),
        ),
        (
            "rep stos",
            assemble!(
                "2:",
                "mov edi, 0x50000",
                "mov ecx, 0x200000",
                "rep stosb",
                "jmp 2b",
            ),
        ),
        (
            "stores and vectors",
            assemble!(
                "2:",
                "paddd xmm0, xmm1",
                "movups [{data}], xmm0",
                "fld1",
                "fstp qword ptr [{data} + 32]",
                "lock inc qword ptr [{data} + 64]",
                "jmp 2b";
                data = const DATA,
            ),
        ),
        (
            "code that changes itself",
            assemble!(
                "2:",
                "inc dword ptr [rip + 3f + 1]",
                "3:",
                "mov eax, 0",
                "jmp 2b",
            ),
        ),
        (
            "instructions that are interpreted",
            assemble!("2:", "rdtsc", "lahf", "sahf", "jmp 2b"),
        ),
        ("cpuid", assemble!("2:", "xor eax, eax", "cpuid", "jmp 2b")),
    ]
}

fn put(tuning: skerry_x86cpu::Tuning, code: &[u8]) -> TestCpu {
    let mut t = machine(1, tuning);
    t.write(CODE, code);
    t.cpu.gpr[4] = STACK - 0x800;
    t
}

#[test]
fn an_exit_is_asked_for() {
    for (how, tuning) in TUNINGS {
        for (name, code) in loops() {
            let _deadline = Deadline::new(format!("{name} ({how})"), Duration::from_secs(20));
            let mut t = put(tuning, code);
            let mut shortest = Duration::MAX;
            for wait in [0, 1, 3, 7, 12] {
                let shared = t.cpu.shared.clone();
                let asker = std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(wait));
                    let at = Instant::now();
                    shared.request_exit();
                    at
                });
                let exit = t.cpu.run();
                let ended = Instant::now();
                assert_eq!(
                    exit,
                    CpuExit::Requested,
                    "{name} ({how}) at {:x}",
                    t.cpu.rip
                );
                let Ok(asked) = asker.join() else {
                    panic!("the asking thread");
                };
                shortest = shortest.min(ended.saturating_duration_since(asked));
                // The processor is in the loop.
                assert!((CODE..CODE + 0x100).contains(&t.cpu.rip), "{name} ({how})");
            }
            // On a busy host one of several is on time.
            assert!(
                shortest < Duration::from_millis(50),
                "{name} ({how}): {shortest:?}"
            );
        }
    }
}

/// Interrupts, from another thread, while the loop runs: each is delivered.
#[test]
fn interrupts_arrive() {
    let handler = apic::handler(assemble!("inc qword ptr [{count}]"; count = const COUNT));
    for (how, tuning) in TUNINGS {
        for (name, code) in loops() {
            if name.starts_with("returns") || name.starts_with("recursion on") {
                // They write below their stack pointer, where interrupts do.
                continue;
            }
            let _deadline = Deadline::new(format!("{name} ({how})"), Duration::from_secs(20));
            let mut t = put(tuning, code);
            t.write(HANDLER, &handler);
            gate(&t, 0x41, HANDLER);
            enable_apic(&mut t);
            let (machine, shared) = (t.machine.clone(), t.cpu.shared.clone());
            let poster = std::thread::spawn(move || {
                for _ in 0..8 {
                    std::thread::sleep(Duration::from_millis(1));
                    machine.post(0, 0x41, false);
                    let started = Instant::now();
                    // Taken from the mailbox.
                    while shared.posted[2].load(Ordering::SeqCst) != 0
                        && started.elapsed() < Duration::from_secs(5)
                    {
                        std::thread::yield_now();
                    }
                }
                std::thread::sleep(Duration::from_millis(2));
                shared.request_exit();
            });
            assert_eq!(t.cpu.run(), CpuExit::Requested, "{name} ({how})");
            assert!(poster.join().is_ok());
            // Two that meet in the APIC are one.
            let count = t.read_u64(COUNT);
            assert!((1..=8).contains(&count), "{name} ({how}): {count}");
        }
    }
}

pub fn enable_apic(t: &mut TestCpu) {
    let rip = t.cpu.rip;
    t.cpu.rip = CODE + 0x2000;
    let code = [apic::enable(), assemble!("sti", "nop", "out 0x99, al")].concat();
    t.write(CODE + 0x2000, &code);
    let exit = t.cpu.run();
    assert!(
        matches!(exit, CpuExit::PortOut { port: 0x99, .. }),
        "{exit:?}"
    );
    t.cpu.forget_devices();
    t.cpu.rip = rip;
}

/// The APIC's own timer ends loops, too, and is armed again by its handler.
#[test]
fn the_timer_ticks() {
    let handler = apic::handler(assemble!(
        "inc qword ptr [{count}]",
        "mov ecx, 0x838",
        "mov eax, 2000000",
        "xor edx, edx",
        "wrmsr",
        "cmp qword ptr [{count}], 15",
        "jb 2f",
        "cli",
        "hlt",
        "2:";
        count = const COUNT,
    ));
    let start = assemble!(
        // Divide by 1, one shot, 2 million ticks.
        "mov ecx, 0x83e",
        "mov eax, 0xb",
        "xor edx, edx",
        "wrmsr",
        "mov ecx, 0x832",
        "mov eax, 0x42",
        "wrmsr",
        "mov ecx, 0x838",
        "mov eax, 2000000",
        "wrmsr",
        "2:",
        "inc rbx",
        "jmp 2b",
    );
    for (how, tuning) in TUNINGS {
        let _deadline = Deadline::new(format!("timer ({how})"), Duration::from_secs(30));
        let host = RealHost::new();
        let mut t = furnish(TestCpu::with_host(host.clone(), 1, tuning));
        assert!(host.shared.set(t.cpu.shared.clone()).is_ok());
        t.write(CODE, start);
        t.write(HANDLER, &handler);
        gate(&t, 0x42, HANDLER);
        enable_apic(&mut t);
        let exit = t.cpu.run();
        assert!(matches!(exit, CpuExit::Halted { .. }), "{how}: {exit:?}");
        assert_eq!(t.read_u64(COUNT), 15, "{how}");
        let _keep: Arc<RealHost> = host;
    }
}
