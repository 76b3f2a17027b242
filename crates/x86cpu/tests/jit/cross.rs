//! Code that one processor changes while others run it.

use skerry_x86cpu::testing::{CODE, DATA, TestCpu};

use crate::machine::{ALIAS, TUNINGS, alone, another, gate, machine, run_to_halt};
use crate::{apic, assemble};

/// The function that changes: MOV EAX, imm32; RET, its immediate aligned.
const FUNCTION: u64 = CODE + 0x4003;
const WRITER: u64 = CODE;
const READER: u64 = CODE + 0x1000;
const HANDLERS: u64 = CODE + 0x2000;
/// Variables, each in a cache line of its own.
const VALUE: u64 = DATA;
const DONE: u64 = DATA + 64;
const SEQUENCE: u64 = DATA + 192;
const STOP: u64 = DATA + 256;
const ACK: u64 = DATA + 320;
const BREAKPOINTS: u64 = DATA + 384;

fn function(t: &TestCpu) {
    t.write(FUNCTION, assemble!("mov eax, 0", "ret"));
}

/// One writer and `readers` readers, to their ends. Readers say in R15 what went wrong.
fn run_all(t: &TestCpu, readers: u32, alias: bool, rounds: u64, name: &str) {
    let _alone = alone();
    let mut cpus = vec![another(t, 1, WRITER)];
    for n in 0..readers {
        cpus.push(another(t, 2 + n, READER));
    }
    for (n, cpu) in cpus.iter_mut().enumerate() {
        cpu.gpr[3] = FUNCTION + if alias { ALIAS } else { 0 };
        cpu.gpr[5] = DONE + 8 * (n as u64).saturating_sub(1);
        cpu.gpr[9] = rounds;
        cpu.gpr[10] = u64::from(readers);
        cpu.gpr[15] = 0;
    }
    std::thread::scope(|scope| {
        for cpu in &mut cpus {
            scope.spawn(move || run_to_halt(cpu, name));
        }
    });
    for (n, cpu) in cpus.iter().enumerate() {
        assert_eq!(
            cpu.gpr[15], 0,
            "{name}, processor {n}: RAX {:x}, RDX {:x}, R8 {:x}",
            cpu.gpr[0], cpu.gpr[2], cpu.gpr[8]
        );
    }
}

/// Told by a flag that code has changed, a reader serialises and must see it.
#[test]
fn seen_after_a_serialising_instruction() {
    let writer = assemble!(
        "xor r8d, r8d",
        "2:",
        "inc r8d",
        "mov [rbx + 1], r8d",
        "mov [{value}], r8d",
        "xor ecx, ecx",
        "3:",
        "pause",
        "cmp [rbp + 8*rcx], r8d",
        "jne 3b",
        "inc ecx",
        "cmp ecx, r10d",
        "jne 3b",
        "cmp r8d, r9d",
        "jne 2b",
        "hlt";
        value = const VALUE,
    );
    let reader = assemble!(
        "mov esi, {function}",
        "xor r8d, r8d",
        "2:",
        "inc r8d",
        "3:",
        "pause",
        "cmp [{value}], r8d",
        "jne 3b",
        "xor eax, eax",
        "cpuid",
        "call rsi",
        "cmp eax, r8d",
        "jne 4f",
        "mov [rbp], r8d",
        "cmp r8d, r9d",
        "jne 2b",
        "hlt",
        "4:",
        "mov r15d, 1",
        "mov [rbp], r8d",
        "hlt";
        value = const VALUE,
        function = const FUNCTION,
    );
    for (name, tuning) in TUNINGS {
        for (readers, alias) in [(1, false), (1, true), (2, false)] {
            let t = machine(4, tuning);
            function(&t);
            t.write(WRITER, writer);
            t.write(READER, reader);
            let rounds = if readers == 1 { 200 } else { 40 };
            run_all(&t, readers, alias, rounds, name);
        }
    }
}

/// Readers that don't wait see an aligned immediate old or new, never go back, and see the last one
/// in the end.
#[test]
fn an_aligned_immediate_goes_forward() {
    let writer = assemble!(
        "xor r8d, r8d",
        "2:",
        "inc r8d",
        "mov [rbx + 1], r8d",
        "mov ecx, 40",
        "3:",
        "pause",
        "dec ecx",
        "jnz 3b",
        "cmp r8d, r9d",
        "jne 2b",
        "hlt",
    );
    let reader = assemble!(
        "mov esi, {function}",
        "xor r8d, r8d",
        "2:",
        "call rsi",
        "cmp eax, r8d",
        "jb 4f",
        "cmp eax, r9d",
        "ja 4f",
        "mov r8d, eax",
        "cmp eax, r9d",
        "jne 2b",
        "hlt",
        "4:",
        "mov r15d, 1",
        "hlt";
        function = const FUNCTION,
    );
    for (name, tuning) in TUNINGS {
        for alias in [false, true] {
            let t = machine(4, tuning);
            function(&t);
            t.write(WRITER, writer);
            t.write(READER, reader);
            run_all(&t, 2, alias, 2000, name);
        }
    }
}

/// Linux's way to change an instruction that others may be running (text_poke_bp): a breakpoint
/// over its first byte, the rest, then the first byte; an interrupt to all after each step.
#[test]
fn breakpoint_and_interrupts() {
    let patch = assemble!(
        "7:",
        "pause",
        "cmp dword ptr [{ready}], 0",
        "je 7b",
        "2:",
        "inc qword ptr [{sequence}]",
        "mov byte ptr [rbx], 0xcc",
        "call 5f",
        "movzx edi, r9b",
        "imul edi, edi, 0x01010101",
        "mov [rbx + 1], edi",
        "mov [{value}], edi",
        "call 5f",
        "mov byte ptr [rbx], 0xb8",
        "call 5f",
        "inc qword ptr [{sequence}]",
        "mov ecx, 200",
        "3:",
        "pause",
        "dec ecx",
        "jnz 3b",
        "dec r9",
        "jnz 2b",
        "mov dword ptr [{stop}], 1",
        "hlt",
        "5:",
        "mov r11, [{ack}]",
        "mov ecx, 0x830",
        "mov eax, 0x40",
        "mov edx, 2",
        "wrmsr",
        "6:",
        "pause",
        "cmp [{ack}], r11",
        "je 6b",
        "ret";
        ready = const DONE,
        sequence = const SEQUENCE,
        value = const VALUE,
        stop = const STOP,
        ack = const ACK,
    );
    let reader = assemble!(
        "mov ebx, {function}",
        "sti",
        "mov dword ptr [{ready}], 1",
        "2:",
        "mov rsi, [{sequence}]",
        "mov edx, [{value}]",
        "call rbx",
        "cmp rsi, [{sequence}]",
        "jne 3f",
        "test esi, 1",
        "jnz 3f",
        // Nothing changed meanwhile.
        "test rsi, rsi",
        "jz 6f",
        "cmp eax, edx",
        "jne 4f",
        "jmp 6f",
        "3:",
        // Whole, or the breakpoint's -1.
        "movzx edi, al",
        "imul edi, edi, 0x01010101",
        "cmp eax, edi",
        "jne 5f",
        "6:",
        "cmp dword ptr [{stop}], 0",
        "je 2b",
        "cli",
        "hlt",
        "4:",
        "mov r15d, 1",
        "7:",
        // Interrupts still have to be answered.
        "cmp dword ptr [{stop}], 0",
        "je 7b",
        "cli",
        "hlt",
        "5:",
        "mov r15d, 2",
        "jmp 7b";
        function = const FUNCTION,
        ready = const DONE,
        sequence = const SEQUENCE,
        value = const VALUE,
        stop = const STOP,
    );
    let writer = [apic::enable(), patch].concat();
    let reader = [apic::enable(), reader].concat();
    let breakpoint = assemble!(
        "mov eax, -1",
        "inc dword ptr [{breakpoints}]",
        "add qword ptr [rsp], 4",
        "iretq";
        breakpoints = const BREAKPOINTS,
    );
    let interrupt = apic::handler(assemble!("lock inc qword ptr [{ack}]"; ack = const ACK));
    for (name, tuning) in TUNINGS {
        for alias in [false, true] {
            let t = machine(4, tuning);
            function(&t);
            t.write(WRITER, &writer);
            t.write(READER, &reader);
            t.write(HANDLERS, breakpoint);
            t.write(HANDLERS + 0x100, &interrupt);
            gate(&t, 3, HANDLERS);
            gate(&t, 0x40, HANDLERS + 0x100);
            run_all(&t, 1, alias, 60, name);
        }
    }
}
