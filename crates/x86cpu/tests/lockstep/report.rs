//! Compares two outcomes and says what differs.

use std::time::Duration;

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

use crate::Worlds;
use crate::program::{Image, Program, undefined_at_joins};
use crate::state::{REGISTERS, hex};
use crate::world::{Outcome, Watch};

/// Everything that differs; the interpreter's first.
pub fn differences(
    program: &Program,
    image: &Image,
    expected: &Outcome,
    actual: &Outcome,
) -> Vec<String> {
    let mut out = Vec::new();
    let mask = |rip: u64| !(image.undefined_at(rip) | undefined_at_joins(&program.setting));
    let mut number = |place: &str, name: &str, a: u64, b: u64| {
        if a != b {
            out.push(format!("{place}{name}: interpreter {a:x}, compiled {b:x}"));
        }
    };
    let (a, b) = (expected.faults.len() as u64, actual.faults.len() as u64);
    number("", "faults", a, b);
    for (n, (a, b)) in expected.faults.iter().zip(&actual.faults).enumerate() {
        let place = format!("fault {n} ({} at {:x}): ", a.vector, a.rip);
        number(&place, "vector", a.vector, b.vector);
        number(&place, "error", a.error, b.error);
        number(&place, "rip", a.rip, b.rip);
        number(&place, "cs", a.cs, b.cs);
        number(
            &place,
            "flags",
            a.flags & mask(a.rip),
            b.flags & mask(a.rip),
        );
        number(&place, "rsp", a.rsp, b.rsp);
        number(&place, "ss", a.ss, b.ss);
        number(&place, "cr2", a.cr2, b.cr2);
    }
    let (a, b) = (expected.stops.len() as u64, actual.stops.len() as u64);
    number("", "exits", a, b);
    for (n, (a, b)) in expected.stops.iter().zip(&actual.stops).enumerate() {
        let place = format!("exit {n} ({:x?}): ", a.exit);
        if a.exit != b.exit {
            number(&format!("{place}{:x?}", b.exit), "", 0, 1);
        }
        for (k, name) in REGISTERS.iter().enumerate() {
            number(&place, name, a.gpr[k], b.gpr[k]);
        }
        number(&place, "rip", a.rip, b.rip);
        if let (Some(a), Some(b)) = (a.retired, b.retired) {
            number(&place, "instructions", a, b);
        }
        number(
            &place,
            "flags",
            a.flags & mask(a.rip),
            b.flags & mask(a.rip),
        );
    }
    number("", "cr2", expected.cr2, actual.cr2);
    number("", "cpl", expected.cpl.into(), actual.cpl.into());
    for n in 0..6 {
        if expected.segments[n] != actual.segments[n] {
            out.push(format!(
                "segment {n}: interpreter {:x?}, compiled {:x?}",
                expected.segments[n], actual.segments[n]
            ));
        }
    }
    compare_units(expected, actual, &mut out);
    for ((name, address, a), (_, _, b)) in expected.memory.iter().zip(&actual.memory) {
        if a == b {
            continue;
        }
        let differing = (0..a.len()).filter(|&n| a[n] != b[n]);
        for n in differing.take(8) {
            out.push(format!(
                "{name} {:x}: interpreter {:02x}, compiled {:02x}",
                address + n as u64,
                a[n],
                b[n]
            ));
        }
    }
    out
}

fn compare_units(expected: &Outcome, actual: &Outcome, out: &mut Vec<String>) {
    let (a, b) = (&expected.xsave, &actual.xsave);
    if a == b {
        return;
    }
    let mut field = |name: &str, range: std::ops::Range<usize>| {
        let (a, b) = (&a[range.clone()], &b[range]);
        if a != b {
            out.push(format!(
                "{name}: interpreter {}, compiled {}",
                hex(a),
                hex(b)
            ));
        }
    };
    for (name, range) in [
        ("fcw", 0..2),
        ("fsw", 2..4),
        ("tags", 4..6),
        ("fop", 6..8),
        ("fip", 8..16),
        ("fdp", 16..24),
        ("mxcsr", 24..32),
        ("header", 512..576),
    ] {
        field(name, range);
    }
    for n in 0..8 {
        field(&format!("st{n}"), 32 + 16 * n..48 + 16 * n);
    }
    for n in 0..16 {
        field(&format!("xmm{n}"), 160 + 16 * n..176 + 16 * n);
        field(&format!("ymm{n}, upper"), 576 + 16 * n..592 + 16 * n);
    }
}

/// Prints a program.
fn listing(program: &Program, image: &Image) {
    println!("  {:x?}", program.setting);
    let mut formatter = IntelFormatter::new();
    let mut decoder = Decoder::with_ip(64, &image.code, image.base, DecoderOptions::NONE);
    while decoder.can_decode() {
        let i = decoder.decode();
        for (label, address) in image.labels.iter().enumerate() {
            if *address == i.ip() {
                println!("{label}:");
            }
        }
        let mut text = String::new();
        formatter.format(&i, &mut text);
        let at = (i.ip() - image.base) as usize;
        let bytes: Vec<String> = image.code[at..at + i.len()]
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        println!("  {:x}  {:32} {text}", i.ip(), bytes.join(" "));
    }
    program.start.print(&format!("stack={:x} ", program.stack));
}

/// Prints a program and what differs.
pub fn print(program: &Program, image: &Image, expected: &Outcome, actual: &Outcome) {
    listing(program, image);
    for fault in expected.faults.iter().take(6) {
        println!("  {fault:x?}");
    }
    for stop in expected.stops.iter().take(6) {
        println!("  exit {:x?} at {:x}", stop.exit, stop.rip);
    }
    for difference in differences(program, image, expected, actual)
        .iter()
        .take(40)
    {
        println!("  ! {difference}");
    }
}

/// The same for a program that fails in new machines.
pub fn shrunk(program: &Program, number: u64) {
    let Some(image) = program.image() else {
        return;
    };
    println!("  shrunk to");
    let watch = Watch::start(Duration::from_secs(2));
    let limit = Duration::from_secs(10);
    let dies = crate::signal::in_a_process(limit, || {
        Worlds::new(number, &watch).run(program, &image);
        false
    });
    if dies {
        listing(program, &image);
        println!("  ! the process dies, or the processor doesn't come back");
    } else if let Some((expected, different)) = Worlds::new(number, &watch).run(program, &image) {
        let names: Vec<&str> = different.iter().map(|(name, _)| *name).collect();
        if let Some((_, actual)) = different.first() {
            print(program, &image, &expected, actual);
        }
        println!("  in {}", names.join(", "));
    }
}
