//! Guest code as assembly text. What the macro makes is `unsafe` code of the test that uses it, which says
//! `#![expect(unsafe_code, reason = "assembled guest code")]`.

/// The machine code of lines of assembly in Intel syntax, as `&'static [u8]`: `assemble!("mov eax,
/// {data}", "2:", "jmp 2b"; data = const 0x1000)`. It may run at any address. Labels are numeric
/// and below 90.
#[macro_export]
macro_rules! assemble {
    ($($line:expr),+ $(,)? $(; $($name:ident = $kind:ident $value:expr),* $(,)?)?) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: the code isn't run here; its first and last addresses are computed.
        unsafe {
            std::arch::asm!(
                "lea {skerry_start}, [rip + 98f]",
                "lea {skerry_end}, [rip + 99f]",
                ".pushsection .rodata.guest, \"a\"",
                "98:",
                $($line,)+
                "99:",
                ".popsection",
                skerry_start = out(reg) start,
                skerry_end = out(reg) end,
                $($($name = $kind $value,)*)?
                options(nomem, nostack, preserves_flags),
            );
        }
        // SAFETY: both are labels of one section, which stays mapped and is never written.
        let bytes: &'static [u8] = unsafe {
            std::slice::from_raw_parts(start, end as usize - start as usize)
        };
        bytes
    }};
}
