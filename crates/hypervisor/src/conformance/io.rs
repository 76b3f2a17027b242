//! Ports and memory-mapped devices.

use iced_x86::code_asm::*;

use super::guest::{CODE, DATA, Guest, HOLE, REPORT, next, report, reported, stop};
use crate::cpuid::{CpuidEntry, CpuidResult};
use crate::error::RunError;
use crate::exit::Exit;
use crate::memory::Gpa;
use crate::traits::{Hypervisor, Vcpu};

pub(super) fn port_out_in_long_mode<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.mov(edx, 0x3f8)?;
        a.mov(eax, 0xaabb_ccdd_u32)?;
        a.out(dx, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)?;
        a.out(0x80, al)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    for (port, size, data) in [
        (0x3f8, 1, 0xdd),
        (0x3f8, 2, 0xccdd),
        (0x3f8, 4, 0xaabb_ccdd),
        (0x80, 1, 0xdd),
    ] {
        assert_eq!(next(&mut vcpu), Exit::PortOut { port, size, data });
    }
}

pub(super) fn port_in_of_every_size<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.mov(edx, 0x60)?;
        a.mov(rax, u64::MAX)?;
        a.in_(al, dx)?;
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(rax, u64::MAX)?;
        a.in_(ax, dx)?;
        a.mov(qword_ptr(DATA + 8), rax)?;
        a.mov(rax, u64::MAX)?;
        a.in_(eax, dx)?;
        a.mov(qword_ptr(DATA + 16), rax)?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    for size in [1, 2, 4] {
        assert_eq!(next(&mut vcpu), Exit::PortIn { port: 0x60, size });
        vcpu.complete_read(0x1122_3344_5566_7788);
    }
    assert_eq!(reported(&mut vcpu), 0x5566_7788);
    assert_eq!(guest.read(DATA), 0xffff_ffff_ffff_ff88);
    assert_eq!(guest.read(DATA + 8), 0xffff_ffff_ffff_7788);
    assert_eq!(
        guest.read(DATA + 16),
        0x5566_7788,
        "a 32-bit IN zero-extends"
    );
}

pub(super) fn mmio_read_of_every_size<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.mov(ebx, HOLE as u32)?;
        a.mov(rax, u64::MAX)?;
        a.mov(al, byte_ptr(rbx + 1))?;
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(rax, u64::MAX)?;
        a.mov(ax, word_ptr(rbx + 2))?;
        a.mov(qword_ptr(DATA + 8), rax)?;
        a.mov(rax, u64::MAX)?;
        a.mov(eax, dword_ptr(rbx + 4))?;
        a.mov(qword_ptr(DATA + 16), rax)?;
        a.mov(rax, qword_ptr(rbx + 8))?;
        a.mov(qword_ptr(DATA + 24), rax)?;
        a.movzx(eax, byte_ptr(rbx + 16))?;
        a.add(rax, qword_ptr(rbx + 24))?;
        a.mov(qword_ptr(DATA + 32), rax)?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    for (offset, size) in [(1, 1), (2, 2), (4, 4), (8, 8), (16, 1), (24, 8)] {
        assert_eq!(
            next(&mut vcpu),
            Exit::MmioRead {
                gpa: Gpa(HOLE + offset),
                size
            }
        );
        vcpu.complete_read(0x1122_3344_5566_7788);
    }
    reported(&mut vcpu);
    assert_eq!(guest.read(DATA), 0xffff_ffff_ffff_ff88);
    assert_eq!(guest.read(DATA + 8), 0xffff_ffff_ffff_7788);
    assert_eq!(guest.read(DATA + 16), 0x5566_7788);
    assert_eq!(guest.read(DATA + 24), 0x1122_3344_5566_7788);
    assert_eq!(guest.read(DATA + 32), 0x1122_3344_5566_7788 + 0x88);
}

pub(super) fn mmio_write_of_every_size<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.mov(ebx, HOLE as u32)?;
        a.mov(rax, 0x1122_3344_5566_7788_u64)?;
        a.mov(byte_ptr(rbx + 1), al)?;
        a.mov(word_ptr(rbx + 2), ax)?;
        a.mov(dword_ptr(rbx + 4), eax)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.mov(dword_ptr(rbx + 16), 0x1234)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    for (offset, size, data) in [
        (1, 1, 0x88),
        (2, 2, 0x7788),
        (4, 4, 0x5566_7788),
        (8, 8, 0x1122_3344_5566_7788),
        (16, 4, 0x1234),
    ] {
        assert_eq!(
            next(&mut vcpu),
            Exit::MmioWrite {
                gpa: Gpa(HOLE + offset),
                size,
                data
            }
        );
    }
}

/// Collects the fragments of one access of `len` bytes at `gpa`; their answers are consecutive
/// byte values.
fn answer_fragments(vcpu: &mut impl Vcpu, gpa: u64, len: u64) {
    let mut done = 0;
    while done < len {
        match next(vcpu) {
            Exit::MmioRead { gpa: Gpa(at), size } => {
                assert_eq!(at, gpa + done, "fragments in order");
                let mut bytes = [0; 8];
                for (byte, n) in bytes.iter_mut().zip(0..u64::from(size)) {
                    *byte = (done + n + 1) as u8;
                }
                vcpu.complete_read(u64::from_le_bytes(bytes));
                done += u64::from(size);
            }
            other => panic!("{other:?} instead of a fragment"),
        }
    }
    assert_eq!(done, len);
}

pub(super) fn mmio_across_pages<H: Hypervisor>(hypervisor: &H) {
    let at = HOLE + 0x1000 - 3;
    let guest = Guest::new(hypervisor, |a| {
        a.mov(ebx, at as u32)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(dword_ptr(rbx), 0x4433_2211)?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    answer_fragments(&mut vcpu, at, 8);
    let mut written = Vec::new();
    loop {
        match next(&mut vcpu) {
            Exit::MmioWrite { gpa, size, data } => {
                assert_eq!(gpa.0, at + written.len() as u64);
                written.extend_from_slice(&data.to_le_bytes()[..size.into()]);
            }
            Exit::PortOut { port: REPORT, .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(guest.read(DATA), 0x0807_0605_0403_0201);
    assert_eq!(written, [0x11, 0x22, 0x33, 0x44]);
}

pub(super) fn mmio_wider_than_eight_bytes<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.mov(ebx, HOLE as u32)?;
        a.movdqu(xmm0, xmmword_ptr(rbx))?;
        a.movdqu(xmmword_ptr(DATA), xmm0)?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    answer_fragments(&mut vcpu, HOLE, 16);
    reported(&mut vcpu);
    assert_eq!(guest.read(DATA), 0x0807_0605_0403_0201);
    assert_eq!(guest.read(DATA + 8), 0x100f_0e0d_0c0b_0a09);
}

pub(super) fn string_output<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.mov(esi, DATA as u32)?;
        a.mov(ecx, 5)?;
        a.mov(edx, 0x3f8)?;
        a.cld()?;
        a.rep().outsb()?;
        a.mov(eax, esi)?;
        report(a)?;
        a.mov(eax, ecx)?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    guest.write(DATA, u64::from_le_bytes(*b"Hello..."));
    let mut vcpu = guest.start();
    for byte in b"Hello" {
        let exit = Exit::PortOut {
            port: 0x3f8,
            size: 1,
            data: u32::from(*byte),
        };
        assert_eq!(next(&mut vcpu), exit);
    }
    assert_eq!(reported(&mut vcpu), DATA as u32 + 5);
    assert_eq!(reported(&mut vcpu), 0);
}

pub(super) fn string_input<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.mov(edi, DATA as u32)?;
        a.mov(ecx, 4)?;
        a.mov(edx, 0x1f0)?;
        a.cld()?;
        a.rep().insw()?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    for value in [0x1111, 0x2222, 0x3333, 0x4444] {
        assert_eq!(
            next(&mut vcpu),
            Exit::PortIn {
                port: 0x1f0,
                size: 2
            }
        );
        vcpu.complete_read(value);
    }
    reported(&mut vcpu);
    assert_eq!(guest.read(DATA), 0x4444_3333_2222_1111);
}

pub(super) fn read_must_be_completed<H: Hypervisor>(hypervisor: &H) {
    let guest = Guest::new(hypervisor, |a| {
        a.in_(al, 0x60)?;
        a.movzx(eax, al)?;
        report(a)?;
        stop(a)?;
        Ok(vec![])
    });
    let mut vcpu = guest.start();
    assert_eq!(
        next(&mut vcpu),
        Exit::PortIn {
            port: 0x60,
            size: 1
        }
    );
    let refused = vcpu.run();
    assert!(
        matches!(refused, Err(RunError::ReadNotCompleted { .. })),
        "{refused:?}"
    );
    vcpu.complete_read(0x5a);
    assert_eq!(reported(&mut vcpu), 0x5a);
}

pub(super) fn cpuid_as_given<H: Hypervisor>(hypervisor: &H) {
    let mut guest = Guest::new(hypervisor, |a| {
        for leaf in [0, 0x8000_0002_u32] {
            a.mov(eax, leaf)?;
            a.xor(ecx, ecx)?;
            a.cpuid()?;
            a.mov(dword_ptr(DATA), ebx)?;
            a.mov(dword_ptr(DATA + 4), ecx)?;
            a.mov(dword_ptr(DATA + 8), edx)?;
            report(a)?;
        }
        stop(a)?;
        Ok(vec![])
    });
    guest
        .cpuid
        .entries
        .retain(|entry| entry.leaf != 0x8000_0002);
    guest.cpuid.entries.push(CpuidEntry {
        leaf: 0x8000_0002,
        subleaf: None,
        result: CpuidResult {
            eax: 0x6b53_7265,
            ebx: 1,
            ecx: 2,
            edx: 3,
        },
    });
    let mut vcpu = guest.start();
    for leaf in [0, 0x8000_0002] {
        let told = guest
            .cpuid
            .get(leaf, 0)
            .expect("a table with the basic leaves");
        assert_eq!(reported(&mut vcpu), told.eax);
        assert_eq!(
            guest.read(DATA),
            u64::from(told.ecx) << 32 | u64::from(told.ebx)
        );
        assert_eq!(guest.read(DATA + 8) as u32, told.edx);
    }
    let boot = vcpu.boot_registers().expect("registers");
    assert!(boot.general.rip > CODE);
}
