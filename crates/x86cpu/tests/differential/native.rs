//! The oracle: runs code on the host processor itself, with a state of our choice.
//!
//! Everything sits at fixed low addresses, so that the code that loads and stores the state needs no
//! register. A fault arrives as a signal, whose handler makes the interrupted context continue in
//! the code that stores the state.
#![expect(unsafe_code, reason = "runs generated machine code")]

use std::arch::global_asm;
use std::io;

use crate::state::{CODE, CODE_LEN, DATA, DATA_LEN, DATA_WRITABLE, End, State, XSAVE_LEN};

const CONTEXT: u64 = 0x1000_0000;

/// Lies at [`CONTEXT`]; offsets are in the assembly below.
#[repr(C, align(4096))]
struct Context {
    gpr: [u64; 16],
    flags: u64,
    host_rsp: u64,
    entry: u64,
    exits: [u64; 2],
    marker: u64,
    guest_fs: u64,
    guest_gs: u64,
    host_fs: u64,
    host_gs: u64,
    fault: u64,
    fault_rip: u64,
    fault_error: u64,
    fault_address: u64,
    pad: [u64; 2],
    xsave: [u8; 2816],
}

const _: () = {
    assert!(std::mem::offset_of!(Context, flags) == 0x80);
    assert!(std::mem::offset_of!(Context, exits) == 0x98);
    assert!(std::mem::offset_of!(Context, marker) == 0xa8);
    assert!(std::mem::offset_of!(Context, host_gs) == 0xc8);
    assert!(std::mem::offset_of!(Context, xsave) == 0x100);
    assert!(size_of::<Context>() == 4096);
};

global_asm!(
    ".globl skerry_native_enter",
    "skerry_native_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov qword ptr ds:[0x10000088], rsp",
    "rdfsbase rax",
    "mov qword ptr ds:[0x100000c0], rax",
    "rdgsbase rax",
    "mov qword ptr ds:[0x100000c8], rax",
    "mov rax, qword ptr ds:[0x100000b0]",
    "wrfsbase rax",
    "mov rax, qword ptr ds:[0x100000b8]",
    "wrgsbase rax",
    "mov eax, 7",
    "xor edx, edx",
    "xrstor64 ds:[0x10000100]",
    "push qword ptr ds:[0x10000080]",
    "popfq",
    "mov rax, qword ptr ds:[0x10000000]",
    "mov rcx, qword ptr ds:[0x10000008]",
    "mov rdx, qword ptr ds:[0x10000010]",
    "mov rbx, qword ptr ds:[0x10000018]",
    "mov rsp, qword ptr ds:[0x10000020]",
    "mov rbp, qword ptr ds:[0x10000028]",
    "mov rsi, qword ptr ds:[0x10000030]",
    "mov rdi, qword ptr ds:[0x10000038]",
    "mov r8, qword ptr ds:[0x10000040]",
    "mov r9, qword ptr ds:[0x10000048]",
    "mov r10, qword ptr ds:[0x10000050]",
    "mov r11, qword ptr ds:[0x10000058]",
    "mov r12, qword ptr ds:[0x10000060]",
    "mov r13, qword ptr ds:[0x10000068]",
    "mov r14, qword ptr ds:[0x10000070]",
    "mov r15, qword ptr ds:[0x10000078]",
    "jmp qword ptr ds:[0x10000090]",
    ".globl skerry_native_exit1",
    "skerry_native_exit1:",
    "mov dword ptr ds:[0x100000a8], 1",
    "jmp 2f",
    ".globl skerry_native_exit0",
    "skerry_native_exit0:",
    "mov dword ptr ds:[0x100000a8], 0",
    "2:",
    "mov qword ptr ds:[0x10000000], rax",
    "mov qword ptr ds:[0x10000008], rcx",
    "mov qword ptr ds:[0x10000010], rdx",
    "mov qword ptr ds:[0x10000018], rbx",
    "mov qword ptr ds:[0x10000020], rsp",
    "mov qword ptr ds:[0x10000028], rbp",
    "mov qword ptr ds:[0x10000030], rsi",
    "mov qword ptr ds:[0x10000038], rdi",
    "mov qword ptr ds:[0x10000040], r8",
    "mov qword ptr ds:[0x10000048], r9",
    "mov qword ptr ds:[0x10000050], r10",
    "mov qword ptr ds:[0x10000058], r11",
    "mov qword ptr ds:[0x10000060], r12",
    "mov qword ptr ds:[0x10000068], r13",
    "mov qword ptr ds:[0x10000070], r14",
    "mov qword ptr ds:[0x10000078], r15",
    "mov rsp, qword ptr ds:[0x10000088]",
    "pushfq",
    "pop qword ptr ds:[0x10000080]",
    // A fault comes here with the registers stored and RSP set.
    ".globl skerry_native_fault",
    "skerry_native_fault:",
    "cld",
    "mov rax, qword ptr ds:[0x100000c0]",
    "wrfsbase rax",
    "mov rax, qword ptr ds:[0x100000c8]",
    "wrgsbase rax",
    "mov eax, 7",
    "xor edx, edx",
    "xsave64 ds:[0x10000100]",
    "fninit",
    "vzeroupper",
    "push 0x1f80",
    "ldmxcsr [rsp]",
    "pop rax",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

unsafe extern "C" {
    fn skerry_native_enter();
    fn skerry_native_exit0();
    fn skerry_native_exit1();
    fn skerry_native_fault();
}

fn context() -> *mut Context {
    CONTEXT as *mut Context
}

/// Context registers in the order of `State::gpr`.
const SIGNAL_REGISTERS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Runs with the guest's FS base: no thread-local storage here.
extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context_of: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext_t; `Context` is mapped for the life of the process.
    unsafe {
        let registers = &mut (*context_of.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let context = context();
        let rip = registers[libc::REG_RIP as usize] as u64;
        if !(CODE..CODE + CODE_LEN as u64 + 64).contains(&rip) && (*context).marker != IN_GUEST {
            // Not ours: die of it.
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        (*context).marker = 0;
        for (n, register) in SIGNAL_REGISTERS.iter().enumerate() {
            (*context).gpr[n] = registers[*register as usize] as u64;
        }
        (*context).flags = registers[libc::REG_EFL as usize] as u64;
        (*context).fault = 0x100 | registers[libc::REG_TRAPNO as usize] as u64;
        (*context).fault_rip = rip;
        (*context).fault_error = registers[libc::REG_ERR as usize] as u64;
        (*context).fault_address = registers[libc::REG_CR2 as usize] as u64;
        registers[libc::REG_RIP as usize] = skerry_native_fault as *const () as i64;
        registers[libc::REG_RSP as usize] = (*context).host_rsp as i64;
        registers[libc::REG_EFL as usize] = 2;
    }
}

/// Marker while generated code runs.
const IN_GUEST: u64 = 0x1_0000_0000;

/// Why this host can't be the oracle, if it can't.
pub fn unsuitable() -> Option<&'static str> {
    /// FSGSBASE instructions are enabled for user mode.
    const HWCAP2_FSGSBASE: u64 = 2;
    if !std::arch::is_x86_feature_detected!("avx") {
        return Some("the host has no AVX, whose registers are part of the state");
    }
    // SAFETY: reads the auxiliary vector.
    if unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE == 0 {
        return Some("the host's kernel doesn't let programs set segment bases (FSGSBASE)");
    }
    None
}

/// The host processor.
pub struct Native {
    /// Writable alias of the code page.
    code: *mut u8,
}

fn map(address: u64, len: usize, protection: i32, fd: i32) -> io::Result<*mut u8> {
    let (fixed, private) = (
        libc::MAP_FIXED_NOREPLACE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    let flags = if fd >= 0 { libc::MAP_SHARED } else { private };
    let flags = if address != 0 { flags | fixed } else { flags };
    // SAFETY: a new mapping that replaces none.
    let at = unsafe { libc::mmap(address as *mut _, len, protection, flags, fd, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(at.cast())
}

impl Native {
    /// Maps the sandbox and takes over the signals of faults.
    pub fn new() -> io::Result<Self> {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        map(CONTEXT, size_of::<Context>(), rw, -1)?;
        map(DATA, DATA_LEN, rw, -1)?;
        // SAFETY: a plain descriptor; the size is small.
        let fd = unsafe { libc::memfd_create(c"code".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: the descriptor is ours.
        if fd < 0 || unsafe { libc::ftruncate(fd, CODE_LEN as i64) } != 0 {
            return Err(io::Error::last_os_error());
        }
        map(CODE, CODE_LEN, libc::PROT_READ | libc::PROT_EXEC, fd)?;
        let code = map(0, CODE_LEN, rw, fd)?;
        Self::handle_signals()?;
        // SAFETY: mapped above.
        unsafe {
            (*context()).exits = [
                skerry_native_exit0 as *const () as u64,
                skerry_native_exit1 as *const () as u64,
            ];
        }
        Ok(Self { code })
    }

    fn handle_signals() -> io::Result<()> {
        const STACK: usize = 256 << 10;
        let stack = libc::stack_t {
            ss_sp: map(0, STACK, libc::PROT_READ | libc::PROT_WRITE, -1)?.cast(),
            ss_flags: 0,
            ss_size: STACK,
        };
        // SAFETY: the stack is mapped for good, the handler is async-signal-safe.
        unsafe {
            if libc::sigaltstack(&raw const stack, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            for signal in [
                libc::SIGSEGV,
                libc::SIGILL,
                libc::SIGFPE,
                libc::SIGBUS,
                libc::SIGTRAP,
            ] {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_signal as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                if libc::sigaction(signal, &raw const action, std::ptr::null_mut()) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    }

    /// Bytes that leave generated code at landing pad `n`: `jmp qword ptr [exits + 8 n]`.
    pub fn landing_pad(n: u64) -> [u8; 7] {
        let at = (CONTEXT + 0x98 + 8 * n) as u32;
        let [a, b, c, d] = at.to_le_bytes();
        [0xff, 0x24, 0x25, a, b, c, d]
    }

    /// Runs `code` from `state` and leaves what it made of it in `state`.
    pub fn run(&mut self, code: &[u8], state: &mut State) -> End {
        assert!(code.len() <= CODE_LEN);
        // SAFETY: the code page, the context and the data pages are mapped at these places; the
        // generated code can reach them only, and faults elsewhere.
        unsafe {
            self.code
                .copy_from_nonoverlapping(code.as_ptr(), code.len());
            let context = context();
            (*context).gpr = state.gpr;
            (*context).flags = state.flags | 2;
            (*context).entry = CODE;
            (*context).guest_fs = state.fs_base;
            (*context).guest_gs = state.gs_base;
            (*context).fault = 0;
            (&mut (*context).xsave)[..XSAVE_LEN].copy_from_slice(&state.xsave);
            let data = DATA as *mut u8;
            libc::mprotect(data.cast(), DATA_LEN, libc::PROT_READ | libc::PROT_WRITE);
            data.copy_from_nonoverlapping(state.data.as_ptr(), DATA_LEN);
            let read_only = data.add(DATA_WRITABLE);
            libc::mprotect(read_only.cast(), DATA_LEN - DATA_WRITABLE, libc::PROT_READ);
            (*context).marker = IN_GUEST;
            skerry_native_enter();
            state.gpr = (*context).gpr;
            state.flags = (*context).flags;
            state
                .xsave
                .copy_from_slice(&(&(*context).xsave)[..XSAVE_LEN]);
            state
                .data
                .as_mut_ptr()
                .copy_from_nonoverlapping(data, DATA_LEN);
            match (*context).fault {
                0 => End::Exit((*context).marker & 1),
                fault => End::Fault {
                    vector: fault as u8,
                    error: (*context).fault_error,
                    address: (*context).fault_address,
                    rip: (*context).fault_rip,
                },
            }
        }
    }
}
