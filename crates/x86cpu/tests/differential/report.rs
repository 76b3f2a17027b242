//! Compares the two ends of a case and says what differs.

use iced_x86::{Formatter, Instruction, IntelFormatter, Mnemonic};

use crate::generate::Case;
use crate::state::{CODE, DATA, End, FLAGS, REGISTERS, State, hex};

/// What tells two ends apart. The host's kernel is mapped in its half of the address space, so that
/// faults there say "present"; which byte of a large or masked operand a page fault names, and
/// whether it was reading or writing first, is the processor's own business.
fn compare_ends(case: &Case, host: &End, ours: &End) -> Option<String> {
    let same = match (host, ours) {
        (
            End::Fault {
                vector: 14,
                error,
                address,
                rip,
            },
            End::Fault {
                vector: 14,
                error: e,
                address: a,
                rip: r,
            },
        ) => {
            let blurred = case
                .instructions
                .iter()
                .any(|i| i.ip() == *rip && (saves(i) || masked(i) || two_operands(i)));
            let bits = if *address >= KERNEL { 6 } else { 7 };
            rip == r && (blurred || error & bits == e & bits && address == a)
        }
        (
            End::Fault { vector, rip, .. },
            End::Fault {
                vector: v, rip: r, ..
            },
        ) => {
            rip == r
                && (vector == v
                    || case
                        .instructions
                        .iter()
                        .any(|i| two_operands(i) || indexed(i) || saves(i)))
        }
        (a, b) => a == b,
    };
    (!same).then(|| format!("end: host {host:x?}; ours {ours:x?}"))
}

/// Instructions with operands of hundreds of bytes (iced gives XSAVE's no size).
fn saves(i: &Instruction) -> bool {
    use Mnemonic as M;
    i.memory_size().size() > 32
        || i.is_save_restore_instruction()
        || matches!(i.mnemonic(), M::Fnstenv | M::Fldenv)
}

/// Which of two memory operands is looked at first is the processor's own business.
fn two_operands(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Movsb | M::Movsw | M::Movsd | M::Movsq | M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq
    ) && i.is_string_instruction()
}

/// Some processors want the base of these to be canonical, too, before an index or the position of
/// an element is added.
fn indexed(i: &Instruction) -> bool {
    use Mnemonic as M;
    i.is_vsib()
        || matches!(
            i.mnemonic(),
            M::Bt
                | M::Bts
                | M::Btr
                | M::Btc
                | M::Vmaskmovps
                | M::Vmaskmovpd
                | M::Vpmaskmovd
                | M::Vpmaskmovq
        )
}

fn masked(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        Mnemonic::Maskmovdqu | Mnemonic::Maskmovq | Mnemonic::Vmaskmovdqu
    )
}

/// The end of the lower half belongs to it, too.
const KERNEL: u64 = 0x7fff_ffff_f000;

/// Everything that differs; the host's end and state first.
pub fn compare(case: &Case, host: (&End, &State), ours: (&End, &State)) -> Vec<String> {
    let mut out = Vec::new();
    out.extend(compare_ends(case, host.0, ours.0));
    let end = host.0;
    let (host, ours) = (host.1, ours.1);
    let mut number = |name: &str, host: u64, ours: u64| {
        if host != ours {
            out.push(format!("{name}: host {host:04x}; ours {ours:04x}"));
        }
    };
    for (n, name) in REGISTERS.iter().enumerate() {
        number(name, host.gpr[n], ours.gpr[n]);
    }
    let mask = FLAGS & !case.undefined_flags(end);
    number("flags", host.flags & mask, ours.flags & mask);
    let mask = comparable_mxcsr(case, end, host.mxcsr());
    let mxcsr = |state: &State| u64::from(state.mxcsr() & mask);
    number("mxcsr", mxcsr(host), mxcsr(ours));
    number("fcw", host.fcw().into(), ours.fcw().into());
    number("fsw", host.fsw().into(), ours.fsw().into());
    number("tags", host.tags().into(), ours.tags().into());
    for n in 0..16 {
        let (h, o) = (host.vector(n), ours.vector(n));
        if h != o {
            out.push(format!("ymm{n}: host {}; ours {}", hex(&h), hex(&o)));
        }
    }
    for n in 0..8 {
        let (h, o) = (host.st(n), ours.st(n));
        if h != o {
            out.push(format!("st{n}: host {}; ours {}", hex(h), hex(o)));
        }
    }
    if host.data != ours.data {
        compare_data(case, host, ours, &mut out);
    }
    out
}

fn compare_data(case: &Case, host: &State, ours: &State, out: &mut Vec<String>) {
    let differing = (0..host.data.len())
        .filter(|&n| host.data[n] != ours.data[n])
        .filter(|n| !case.ignored.iter().any(|range| range.contains(n)));
    for n in differing.take(8) {
        let (h, o) = (host.data[n], ours.data[n]);
        out.push(format!(
            "memory {:x}: host {h:02x}; ours {o:02x}, before {:02x}",
            DATA + n as u64,
            case.start.data[n]
        ));
    }
}

/// The bits of MXCSR that an unmasked exception defines for certain: dot products compute in steps,
/// and stop after the first that raises one; and with an unmasked overflow or underflow the
/// precision flag is about the result with an unbounded exponent, which isn't known here.
fn comparable_mxcsr(case: &Case, end: &End, host: u32) -> u32 {
    use Mnemonic as M;
    const RANGE: u32 = 3 << 3;
    const PRECISION: u32 = 1 << 5;
    let End::Fault {
        vector: 19, rip, ..
    } = end
    else {
        return 0xffff;
    };
    let at = case.instructions.iter().find(|i| i.ip() == *rip);
    match at.map(Instruction::mnemonic) {
        Some(M::Dpps | M::Dppd | M::Vdpps | M::Vdppd) => 0xffc0,
        _ if host & !(host >> 7) & RANGE != 0 => 0xffff & !PRECISION,
        _ => 0xffff,
    }
}

/// Prints a case and what differs.
pub fn print(case: &Case, host: &End, ours: &End, differences: &[String]) {
    let bytes: Vec<String> = case.code.iter().map(|b| format!("{b:02x}")).collect();
    println!("  bytes: {}", bytes.join(" "));
    let mut formatter = IntelFormatter::new();
    for i in &case.instructions {
        let mut text = String::new();
        formatter.format(i, &mut text);
        println!(
            "  +{:02x} {text}    ({:?})",
            i.ip().wrapping_sub(CODE),
            i.code()
        );
    }
    let start = &case.start;
    start.print("");
    for i in &case.instructions {
        for k in 0..i.op_count() {
            let register = i.op_register(k);
            if register.is_xmm() || register.is_ymm() {
                println!("  {register:?}={}", hex(&start.vector(register.number())));
            }
            if register.is_st() || register.is_mm() {
                println!("  {register:?}={}", hex(start.st(register.number())));
            }
        }
    }
    if case.instructions.iter().any(saves) {
        let area = start.gpr[7].wrapping_sub(DATA) as usize;
        for (name, at) in [("mxcsr", 24..32), ("header", 512..576)] {
            let bytes = start
                .data
                .get(area.saturating_add(at.start)..area.saturating_add(at.end));
            println!("  {name} at rdi: {:02x?}", bytes.unwrap_or(&[]));
        }
    }
    println!("  host {host:x?}; ours {ours:x?}");
    for difference in differences {
        println!("  ! {difference}");
    }
}
