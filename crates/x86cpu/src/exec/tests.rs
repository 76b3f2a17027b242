//! What the differential fuzzer can't reach: 16- and 32-bit forms, which a 64-bit host process
//! can't execute. Expected values are the manual's (Intel SDM 2A, 2B) worked by hand.

use crate::cpu::reg;
use crate::flags::rflags::{AF, CF, DF, OF, PF, SF, ZF};
use crate::testing::{CODE, DATA, Outcome, STACK, TestCpu};
use crate::trap::{TrapKind, vector};

fn run(t: &mut TestCpu, code: &[u8]) {
    assert_eq!(t.run_bytes(code), Outcome::End, "{code:02x?}");
}

fn set(t: &mut TestCpu, r: u8, value: u64) {
    t.cpu.gpr[usize::from(r)] = value;
}

fn get(t: &TestCpu, r: u8) -> u64 {
    t.cpu.gpr[usize::from(r)]
}

fn fault(t: &mut TestCpu, code: &[u8]) -> u8 {
    match t.run_bytes(code) {
        Outcome::Trap(TrapKind::Fault { vector, .. }) => vector,
        other => panic!("{code:02x?}: {other:?}"),
    }
}

/// Runs a one-byte BCD instruction on AX with CF and AF given; AX and the flags that are defined.
fn bcd(code: &[u8], ax: u64, flags: u64) -> (u64, u64) {
    let mut t = TestCpu::new32();
    set(&mut t, reg::RAX, ax);
    t.cpu.flags.set_bits(flags);
    run(&mut t, code);
    (get(&t, reg::RAX), t.cpu.flags.bits())
}

#[test]
fn decimal_adjustment() {
    // 79 + 35 = 114 in BCD: AL = 0xae before DAA.
    let (ax, flags) = bcd(&[0x27], 0xae, 0);
    assert_eq!((ax, flags & (CF | AF)), (0x14, CF | AF));
    // 9 + 8: AL = 0x11 with AF.
    let (ax, flags) = bcd(&[0x27], 0x11, AF);
    assert_eq!((ax, flags & (CF | AF)), (0x17, AF));
    // 35 - 47: AL = 0xee with CF and AF, DAS gives 88 and a borrow.
    let (ax, flags) = bcd(&[0x2f], 0xee, CF | AF);
    assert_eq!((ax, flags & (CF | AF)), (0x88, CF | AF));
}

#[test]
fn ascii_adjustment() {
    let (ax, flags) = bcd(&[0x37], 0x000b, 0);
    assert_eq!((ax, flags & (CF | AF)), (0x0101, CF | AF));
    let (ax, flags) = bcd(&[0x37], 0x0035, 0);
    assert_eq!((ax, flags & (CF | AF)), (0x0005, 0));
    let (ax, flags) = bcd(&[0x3f], 0x02fe, AF);
    assert_eq!((ax, flags & (CF | AF)), (0x0108, CF | AF));
    // AAM of 63: AH = 6, AL = 3. AAD back.
    assert_eq!(bcd(&[0xd4, 10], 63, 0).0, 0x0603);
    assert_eq!(bcd(&[0xd5, 10], 0x0603, 0).0, 63);
    let mut t = TestCpu::new32();
    assert_eq!(fault(&mut t, &[0xd4, 0]), vector::DE);
}

#[test]
fn salc_spreads_the_carry() {
    assert_eq!(bcd(&[0xd6], 0x1234, CF).0, 0x12ff);
    assert_eq!(bcd(&[0xd6], 0x1234, 0).0, 0x1200);
}

#[test]
fn all_registers_are_pushed_and_popped() {
    let mut t = TestCpu::new32();
    for r in 0..8u8 {
        if r != reg::RSP {
            set(&mut t, r, 0x1111_1111 * u64::from(r + 1));
        }
    }
    run(&mut t, &[0x60]);
    assert_eq!(get(&t, reg::RSP), STACK - 32);
    let stack = t.read(STACK - 32, 32);
    let word = |n: usize| u32::from_le_bytes(stack[n * 4..][..4].try_into().unwrap());
    assert_eq!(word(0), 0x8888_8888, "EDI is at the top");
    assert_eq!(u64::from(word(3)), STACK, "ESP as it was");
    assert_eq!(word(7), 0x1111_1111);
    for r in 0..8u8 {
        if r != reg::RSP {
            set(&mut t, r, 0);
        }
    }
    run(&mut t, &[0x61]);
    assert_eq!(get(&t, reg::RSP), STACK);
    assert_eq!(get(&t, reg::RDI), 0x8888_8888);
    assert_eq!(get(&t, reg::RAX), 0x1111_1111);
}

#[test]
fn bound_checks_both_ends() {
    let mut t = TestCpu::new32();
    t.write(DATA, &[(-5i32).to_le_bytes(), 10i32.to_le_bytes()].concat());
    set(&mut t, reg::RBX, DATA);
    for (index, inside) in [(-5i32, true), (10, true), (-6, false), (11, false)] {
        t.cpu.rip = CODE;
        set(&mut t, reg::RAX, u64::from(index as u32));
        // bound eax, [ebx]
        if inside {
            run(&mut t, &[0x62, 0x03]);
        } else {
            assert_eq!(fault(&mut t, &[0x62, 0x03]), vector::BR);
        }
    }
}

#[test]
fn loops_count_by_address_size() {
    // 16-bit address size in 32-bit code: CX counts, the upper half stays.
    let mut t = TestCpu::new32();
    set(&mut t, reg::RCX, 0xabcd_0003);
    // inc eax; loop (addr16) -4
    run(&mut t, &[0x40, 0x67, 0xe2, 0xfc]);
    assert_eq!((get(&t, reg::RAX), get(&t, reg::RCX)), (3, 0xabcd_0000));
    // jecxz is not taken, jcxz is.
    let mut t = TestCpu::new32();
    set(&mut t, reg::RCX, 0x1_0000);
    // jecxz +1; inc eax; jcxz +1; inc eax; nop
    run(&mut t, &[0xe3, 0x01, 0x40, 0x67, 0xe3, 0x01, 0x40, 0x90]);
    assert_eq!(get(&t, reg::RAX), 1);
    // 64-bit: RCX counts past 32 bits.
    let mut t = TestCpu::new64();
    set(&mut t, reg::RCX, 0x1_0000_0001);
    // jrcxz +3; dec rcx... the count is not zero after it
    run(&mut t, &[0xe3, 0x03, 0x48, 0xff, 0xc9, 0x90]);
    assert_eq!(get(&t, reg::RCX), 0x1_0000_0000);
}

#[test]
fn calls_and_returns_of_16_bits() {
    let mut t = TestCpu::new16();
    // call +1; hlt-like int3 is skipped over; at target: pop ax; push ax; ret 2 is left out: pop ax.
    run(&mut t, &[0xe8, 0x01, 0x00, 0xcc, 0x58]);
    assert_eq!(get(&t, reg::RAX), 3, "return address");
    assert_eq!(get(&t, reg::RSP), 0xfff0);
}

#[test]
fn the_instruction_pointer_wraps_at_64_kib() {
    let mut t = TestCpu::new16();
    // At 0xfffd: jmp +5 goes to 5.
    t.cpu.rip = 0xfffd;
    t.write(CODE + 0xfffd, &[0xe9, 0x05, 0x00]);
    assert!(t.cpu.step().is_ok());
    assert_eq!(t.cpu.rip, 5);
    // jmp -6 from 5 (3 bytes long) goes to 2; from there -5 wraps to 0.
    t.write(CODE + 5, &[0xe9, 0xfa, 0xff]);
    assert!(t.cpu.step().is_ok());
    assert_eq!(t.cpu.rip, 2);
    t.write(CODE + 2, &[0xe9, 0xf9, 0xff]);
    assert!(t.cpu.step().is_ok());
    assert_eq!(t.cpu.rip, 0xfffe);
}

#[test]
fn the_stack_pointer_wraps_at_its_width() {
    let mut t = TestCpu::new16();
    set(&mut t, reg::RSP, 0xdead_0000);
    set(&mut t, reg::RAX, 0x1234);
    run(&mut t, &[0x50]);
    assert_eq!(get(&t, reg::RSP), 0xdead_fffe, "the upper half stays");
    assert_eq!(t.read(CODE + 0xfffe, 2), [0x34, 0x12]);
    run(&mut t, &[0x5b]);
    assert_eq!(
        (get(&t, reg::RBX), get(&t, reg::RSP)),
        (0x1234, 0xdead_0000)
    );
}

#[test]
fn enter_and_leave_with_levels() {
    let mut t = TestCpu::new32();
    set(&mut t, reg::RBP, STACK + 0x100);
    t.write(STACK + 0x100 - 4, &0x1111u32.to_le_bytes());
    // enter 8, 2
    run(&mut t, &[0xc8, 8, 0, 2]);
    let frame = STACK - 4;
    assert_eq!(get(&t, reg::RBP), frame);
    assert_eq!(get(&t, reg::RSP), frame - 8 - 8);
    assert_eq!(t.read(frame, 4), ((STACK + 0x100) as u32).to_le_bytes());
    assert_eq!(t.read(frame - 4, 4), 0x1111u32.to_le_bytes());
    assert_eq!(t.read(frame - 8, 4), (frame as u32).to_le_bytes());
    run(&mut t, &[0xc9]);
    assert_eq!(
        (get(&t, reg::RSP), get(&t, reg::RBP)),
        (STACK, STACK + 0x100)
    );
}

#[test]
fn strings_of_16_bit_addresses_wrap() {
    let mut t = TestCpu::new16();
    t.write(CODE + 0xfffe, b"ab");
    t.write(CODE, b"cd");
    // The code is at offset 0x100 so that the source does not overwrite it.
    t.cpu.rip = 0x100;
    set(&mut t, reg::RSI, 0xfffe);
    set(&mut t, reg::RDI, 0x2000);
    set(&mut t, reg::RCX, 4);
    run(&mut t, &[0xf3, 0xa4]);
    assert_eq!(t.read(CODE + 0x2000, 4), *b"abcd");
    assert_eq!(
        (get(&t, reg::RSI), get(&t, reg::RDI), get(&t, reg::RCX)),
        (2, 0x2004, 0)
    );
}

#[test]
fn strings_run_backwards() {
    let mut t = TestCpu::new32();
    t.write(DATA, b"abcdefgh");
    t.cpu.rflags |= DF;
    set(&mut t, reg::RSI, DATA + 7);
    set(&mut t, reg::RDI, DATA + 9);
    set(&mut t, reg::RCX, 8);
    run(&mut t, &[0xf3, 0xa4]);
    assert_eq!(t.read(DATA + 2, 8), *b"abcdefgh");
    assert_eq!(get(&t, reg::RDI), DATA + 1);
}

#[test]
fn long_repeats_cross_pages_and_keep_their_place() {
    let mut t = TestCpu::new64();
    let bytes: Vec<u8> = (0..20_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
    t.write(DATA, &bytes);
    set(&mut t, reg::RSI, DATA + 3);
    set(&mut t, reg::RDI, DATA + 0x10_000 + 5);
    set(&mut t, reg::RCX, 19_000);
    run(&mut t, &[0xf3, 0xa4]);
    assert_eq!(t.read(DATA + 0x10_005, 19_000), bytes[3..19_003]);
    // rep stosd
    set(&mut t, reg::RAX, 0x0403_0201);
    set(&mut t, reg::RDI, DATA + 2);
    set(&mut t, reg::RCX, 3000);
    run(&mut t, &[0xf3, 0xab]);
    let filled = t.read(DATA + 2, 12_000);
    assert!(filled.chunks(4).all(|c| c == [1, 2, 3, 4]));
    // repne scasb finds, repe cmpsb ends at the difference.
    t.write(DATA, &[b'x'; 6000]);
    t.write(DATA + 5000, b"y");
    set(&mut t, reg::RAX, u64::from(b'y'));
    set(&mut t, reg::RDI, DATA);
    set(&mut t, reg::RCX, 6000);
    run(&mut t, &[0xf2, 0xae]);
    assert_eq!((get(&t, reg::RCX), get(&t, reg::RDI)), (999, DATA + 5001));
    assert!(t.cpu.flags.zf());
    t.write(DATA + 0x8000, &[b'x'; 6000]);
    set(&mut t, reg::RSI, DATA);
    set(&mut t, reg::RDI, DATA + 0x8000);
    set(&mut t, reg::RCX, 6000);
    run(&mut t, &[0xf3, 0xa6]);
    assert_eq!((get(&t, reg::RCX), get(&t, reg::RSI)), (999, DATA + 5001));
    assert!(!t.cpu.flags.zf() && !t.cpu.flags.cf());
}

#[test]
fn overlapping_repeats_copy_element_by_element() {
    let mut t = TestCpu::new64();
    t.write(DATA, b"ab");
    set(&mut t, reg::RSI, DATA);
    set(&mut t, reg::RDI, DATA + 2);
    set(&mut t, reg::RCX, 10);
    run(&mut t, &[0xf3, 0xa4]);
    assert_eq!(t.read(DATA, 12), *b"abababababab");
    // Words one byte apart.
    t.write(DATA, b"abcdefgh\0\0\0\0");
    set(&mut t, reg::RSI, DATA);
    set(&mut t, reg::RDI, DATA + 1);
    set(&mut t, reg::RCX, 5);
    run(&mut t, &[0xf3, 0x66, 0xa5]);
    let mut model = *b"abcdefgh\0\0\0\0";
    for n in (0..10).step_by(2) {
        let pair = [model[n], model[n + 1]];
        model[n + 1..n + 3].copy_from_slice(&pair);
    }
    assert_eq!(t.read(DATA, 11), model[..11]);
}

#[test]
fn arithmetic_of_16_and_8_bits_in_16_bit_code() {
    let mut t = TestCpu::new16();
    set(&mut t, reg::RAX, 0xdead_7fff);
    // inc ax
    run(&mut t, &[0x40]);
    assert_eq!(get(&t, reg::RAX), 0xdead_8000);
    assert_eq!(t.cpu.flags.bits() & (OF | SF | ZF | AF), OF | SF | AF);
    // add ah, 0x80: 0x80 + 0x80
    run(&mut t, &[0x80, 0xc4, 0x80]);
    assert_eq!(get(&t, reg::RAX), 0xdead_0000);
    assert_eq!(t.cpu.flags.bits() & (OF | CF | ZF | PF), OF | CF | ZF | PF);
    // imul ax, ax, -2 with 32-bit prefix: eax = 3 * -2
    set(&mut t, reg::RAX, 3);
    run(&mut t, &[0x66, 0x6b, 0xc0, 0xfe]);
    assert_eq!(get(&t, reg::RAX), 0xffff_fffa);
}
