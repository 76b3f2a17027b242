//! The state that a case starts from and ends in, and how it is chosen.

/// Where generated code runs.
pub const CODE: u64 = 0x2000_0000;
pub const CODE_LEN: usize = 4096;
/// Where its data is: two pages that can be written, one that can't, nothing around.
pub const DATA: u64 = 0x3000_0000;
pub const DATA_LEN: usize = 3 * 4096;
pub const DATA_WRITABLE: usize = 2 * 4096;
/// XSAVE image with x87, SSE and AVX.
pub const XSAVE_LEN: usize = 832;
const HEADER: usize = 512;
const YMM_HIGH: usize = 576;

/// How the code ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At landing pad 0 or 1.
    Exit(u64),
    /// By an exception.
    Fault {
        vector: u8,
        /// For #PF and those that push one.
        error: u64,
        /// CR2 for #PF.
        address: u64,
        rip: u64,
    },
}

/// Names of the general registers, in encoding order.
pub const REGISTERS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// Bytes as one number, the lowest last.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

/// Arithmetic flags and DF.
pub const FLAGS: u64 = 0x8d5 | 0x400;

/// A small fast generator (xorshift64*): the same cases for the same seed everywhere.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        // Spread small seeds.
        Self((seed ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A number that finds corner cases more often than chance would.
    pub fn integer(&mut self) -> u64 {
        const EDGES: [u64; 16] = [
            0,
            1,
            2,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
            u64::MAX,
            0x0102_0304_0506_0708,
        ];
        match self.below(8) {
            0 | 1 => self.pick(&EDGES),
            2 => self.below(256),
            3 => self.bits() & 0xffff_ffff,
            4 => (1 << self.below(64)) | (1 << self.below(64)),
            5 => (self.bits() as i32) as i64 as u64,
            _ => self.bits(),
        }
    }

    /// 64 bits of vector register: integers, or one double, or two floats.
    pub fn lane(&mut self) -> u64 {
        match self.below(5) {
            0 => self.integer(),
            1 | 2 => self.double(),
            _ => u64::from(self.float()) | u64::from(self.float()) << 32,
        }
    }

    fn double(&mut self) -> u64 {
        const EDGES: [u64; 14] = [
            0,
            1 << 63,
            0x3ff0_0000_0000_0000,
            0xbff0_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            1,
            0x000f_ffff_ffff_ffff,
            0x0010_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0x41df_ffff_ffc0_0000,
            0xc3e0_0000_0000_0000,
        ];
        match self.below(4) {
            0 => self.pick(&EDGES),
            1 => (self.below(2000) as f64 - 1000.0).to_bits(),
            2 => (self.bits() & 0x800f_ffff_ffff_ffff) | (1013 + self.below(20)) << 52,
            _ => self.bits(),
        }
    }

    fn float(&mut self) -> u32 {
        const EDGES: [u32; 13] = [
            0,
            1 << 31,
            0x3f80_0000,
            0xbf80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            1,
            0x007f_ffff,
            0x0080_0000,
            0x7f7f_ffff,
            0x4f00_0000,
        ];
        match self.below(4) {
            0 => self.pick(&EDGES),
            1 => (self.below(2000) as f32 - 1000.0).to_bits(),
            2 => (self.bits() as u32 & 0x807f_ffff) | (117 + self.below(20) as u32) << 23,
            _ => self.bits() as u32,
        }
    }

    /// An x87 register.
    fn extended(&mut self) -> [u8; 10] {
        let (significand, exponent) = match self.below(6) {
            0 => (0, 0),
            1 => (1 << 63, 0x3fff),
            2 => (self.bits() | 1 << 63, 0x3ff0 + self.below(0x40)),
            3 => self.pick(&[
                (1 << 63, 0x7fff),
                (3 << 62, 0x7fff),
                (5 << 61, 0x7fff),
                (1, 0),
                (u64::MAX, 0x7ffe),
                (1 << 63, 1),
                (1 << 62, 0x3fff),
            ]),
            _ => (self.bits() | 1 << 63, self.below(0x8000)),
        };
        let sign = (self.bits() & 1) << 15;
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&significand.to_le_bytes());
        bytes[8..].copy_from_slice(&((exponent | sign) as u16).to_le_bytes());
        bytes
    }
}

/// Everything that a user-mode instruction can see.
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    pub gpr: [u64; 16],
    pub flags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub xsave: [u8; XSAVE_LEN],
    pub data: Vec<u8>,
}

impl State {
    /// Prints the registers; `before` is put in front of the line that has the flags.
    pub fn print(&self, before: &str) {
        for (names, values) in REGISTERS.chunks(4).zip(self.gpr.chunks(4)) {
            let row: Vec<String> = names
                .iter()
                .zip(values)
                .map(|(name, value)| format!("{name:>3}={value:016x}"))
                .collect();
            println!("  {}", row.join(" "));
        }
        println!(
            "  {before}flags={:03x} fs={:x} gs={:x} mxcsr={:04x} fcw={:04x} fsw={:04x} tags={:02x}",
            self.flags & FLAGS,
            self.fs_base,
            self.gs_base,
            self.mxcsr(),
            self.fcw(),
            self.fsw(),
            self.tags()
        );
    }

    /// A random state; general registers aren't pointers yet.
    pub fn random(random: &mut Random) -> Self {
        let mut data = vec![0; DATA_LEN];
        for chunk in data.chunks_exact_mut(8) {
            let value = random.bits();
            chunk.copy_from_slice(&value.to_le_bytes());
        }
        Self {
            gpr: std::array::from_fn(|_| random.integer()),
            flags: random.bits() & FLAGS & if random.one_in(4) { !0 } else { !0x400 } | 2,
            fs_base: DATA + random.below(4096),
            gs_base: DATA + random.below(4096),
            xsave: random_xsave(random),
            data,
        }
    }

    pub fn st(&self, n: usize) -> &[u8] {
        &self.xsave[32 + 16 * n..][..10]
    }

    pub fn vector(&self, n: usize) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&self.xsave[160 + 16 * n..][..16]);
        bytes[16..].copy_from_slice(&self.xsave[YMM_HIGH + 16 * n..][..16]);
        bytes
    }

    pub fn fcw(&self) -> u16 {
        u16::from_le_bytes([self.xsave[0], self.xsave[1]])
    }

    pub fn fsw(&self) -> u16 {
        u16::from_le_bytes([self.xsave[2], self.xsave[3]])
    }

    /// Abridged tag word.
    pub fn tags(&self) -> u8 {
        self.xsave[4]
    }

    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([
            self.xsave[24],
            self.xsave[25],
            self.xsave[26],
            self.xsave[27],
        ])
    }
}

/// An image with all components, none in its initial configuration.
pub fn random_xsave(random: &mut Random) -> [u8; XSAVE_LEN] {
    let mut image = [0; XSAVE_LEN];
    let fcw: u16 = match random.below(12) {
        0 => 0x37f & !(1 << random.below(6)),
        1 => random.bits() as u16 & 0xf00 | 0x7f,
        2 => random.bits() as u16 & 0xf3f | 0x40,
        _ => 0x37f,
    };
    let top = if random.one_in(3) {
        0
    } else {
        random.below(8) as u16
    };
    let mut fsw = top << 11 | random.bits() as u16 & 0x4700;
    if random.one_in(6) {
        fsw |= random.bits() as u16 & 0x7f;
    }
    // The summary bits follow from the others.
    if fsw & !fcw & 0x3f != 0 {
        fsw |= 0x8080;
    }
    image[..2].copy_from_slice(&fcw.to_le_bytes());
    image[2..4].copy_from_slice(&fsw.to_le_bytes());
    image[4] = match random.below(4) {
        0 => 0,
        1 => 0xff,
        2 => 0x0fu8.rotate_left(u32::from(top)),
        _ => random.bits() as u8,
    };
    for st in 0..8 {
        image[32 + 16 * st..][..10].copy_from_slice(&random.extended());
    }
    let mxcsr: u32 = match random.below(12) {
        0 => random.bits() as u32 & 0xffff,
        1 => random.bits() as u32 & 0x6000 | 0x1f80,
        2 => random.bits() as u32 & 0xe07f | 0x1f80,
        3 => 0x1f80 & !(0x80 << random.below(6)),
        4 => 0x1f80 | random.bits() as u32 & 0x3f,
        _ => 0x1f80,
    };
    image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    image[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
    image[HEADER] = 7;
    for (start, len) in [(160, 256), (YMM_HIGH, 256)] {
        for chunk in image[start..start + len].chunks_exact_mut(8) {
            chunk.copy_from_slice(&random.lane().to_le_bytes());
        }
    }
    image
}
