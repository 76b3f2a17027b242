//! Programs: instructions and labels that can be laid out again after some are gone.

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, FlowControl, Instruction, Mnemonic as M, Register,
};

use crate::generate::to_rflags;
use crate::state::State;
use crate::world::{ALIAS, CODE_LEN, CODE_SPACE};

/// A label; those from [`LOCAL`] on are within what belongs together.
pub type Label = usize;
/// The first label of its kind.
pub const LOCAL: Label = 1000;
/// More than any program has.
const LABELS: usize = LOCAL + 600;
/// Where programs end.
pub const END: Label = 0;

const AF: u64 = 1 << 4;

/// A piece of a program.
#[derive(Clone)]
pub enum Item {
    /// A place to go to.
    Label(Label),
    /// Code that may stand anywhere.
    Bytes(Vec<u8>),
    /// Code that is encoded for its place.
    Instruction(Instruction),
    /// A near branch; short if asked for and possible.
    Branch { code: Code, to: Label, short: bool },
    /// MOV of a label's address into a register.
    Address { register: Register, of: Label },
    /// An instruction whose memory operand is the code behind a label, written under its own
    /// address or the alias.
    Patch {
        instruction: Instruction,
        label: Label,
        offset: u64,
        alias: bool,
    },
}

/// An item, and whether the program may lose its end without it.
#[derive(Clone)]
pub struct Element {
    pub item: Item,
    pub keep: bool,
}

/// How the world around a program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    pub user: bool,
    /// Code can be written under its own address.
    pub writable_code: bool,
    /// What is in the page behind the data.
    pub behind: Behind,
    /// Whether AF is left undefined at times, and not compared.
    pub loose_af: bool,
    /// Where in its first page the code starts.
    pub offset: u64,
    /// Backward edges before the end.
    pub fuel: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    Nothing,
    Device,
    Ram,
}

/// A program, the state that it starts in and its world.
#[derive(Clone)]
pub struct Program {
    pub elements: Vec<Element>,
    pub start: State,
    pub setting: Setting,
    /// Where it goes on after each of its faults, by their number.
    pub recovery: [Label; 16],
    /// Targets of jumps through memory.
    pub jumps: [Label; 8],
    /// Targets of calls through memory.
    pub calls: [Label; 8],
    pub stack: u64,
}

/// A program at its place.
pub struct Image {
    pub code: Vec<u8>,
    pub base: u64,
    pub labels: Vec<u64>,
    /// Of each element.
    lens: Vec<u64>,
    /// By address: the flags that are undefined before the instruction.
    pub undefined: Vec<(u64, u64)>,
}

impl Image {
    /// Flags that are undefined at an address.
    pub fn undefined_at(&self, rip: u64) -> u64 {
        match self.undefined.binary_search_by_key(&rip, |entry| entry.0) {
            Ok(n) => self.undefined[n].1,
            Err(_) => 0,
        }
    }

    pub fn label(&self, label: Label) -> u64 {
        self.labels.get(label).copied().unwrap_or(0)
    }
}

/// The flags that are undefined after an instruction; `None` if it reads one that is before it.
pub fn undefined_after(before: u64, i: &Instruction) -> Option<u64> {
    if to_rflags(i.rflags_read()) & before != 0 {
        return None;
    }
    // With a count of zero, old flags stay.
    let sometimes = matches!(
        i.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    ) || i.has_rep_prefix()
        || i.has_repne_prefix();
    let kept = if sometimes {
        before
    } else {
        before & !to_rflags(i.rflags_modified())
    };
    Some(kept | to_rflags(i.rflags_undefined()))
}

/// The flags that are undefined where control comes from several places.
pub fn undefined_at_joins(setting: &Setting) -> u64 {
    if setting.loose_af { AF } else { 0 }
}

impl Program {
    /// Lays the program out; `None` if flags that aren't defined would be read, or something
    /// doesn't fit.
    pub fn image(&self) -> Option<Image> {
        let base = CODE_SPACE + self.setting.offset;
        // Distances only shrink when branches do.
        let long = self.place(base, &vec![false; self.elements.len()])?;
        let mut ip = base;
        let mut short = Vec::new();
        for (element, len) in self.elements.iter().zip(&long.lens) {
            short.push(match &element.item {
                Item::Branch { to, short, .. } => *short && long.label(*to).abs_diff(ip) < 110,
                _ => false,
            });
            ip += len;
        }
        let mut image = self.place(base, &short)?;
        for (element, short) in self.elements.iter().zip(&short) {
            let ip = base + image.code.len() as u64;
            let bytes = encode(&element.item, ip, Some(&image.labels), *short)?;
            image.code.extend(bytes);
        }
        if image.code.len() as u64 + self.setting.offset > CODE_LEN as u64 {
            return None;
        }
        image.undefined = self.definedness(&image)?;
        Some(image)
    }

    fn place(&self, base: u64, short: &[bool]) -> Option<Image> {
        let mut ip = base;
        let mut labels = vec![0; LABELS];
        let mut lens = Vec::new();
        for (element, short) in self.elements.iter().zip(short) {
            if let Item::Label(label) = element.item {
                *labels.get_mut(label)? = ip;
            }
            let len = encode(&element.item, ip, None, *short)?.len() as u64;
            lens.push(len);
            ip += len;
        }
        Some(Image {
            code: Vec::new(),
            base,
            labels,
            lens,
            undefined: Vec::new(),
        })
    }

    fn definedness(&self, image: &Image) -> Option<Vec<(u64, u64)>> {
        let join = undefined_at_joins(&self.setting);
        let mut undefined = join;
        let mut out = Vec::new();
        let mut at = 0;
        for (element, len) in self.elements.iter().zip(&image.lens) {
            if matches!(element.item, Item::Label(label) if label < LOCAL) {
                if undefined & !join != 0 {
                    return None;
                }
                undefined = join;
            }
            let end = at + *len as usize;
            while at < end {
                let ip = image.base + at as u64;
                let mut decoder =
                    Decoder::with_ip(64, &image.code[at..end], ip, DecoderOptions::NONE);
                let i = decoder.decode();
                out.push((ip, undefined));
                undefined = undefined_after(undefined, &i)?;
                at += i.len().max(1);
                let leaves = match element.item {
                    Item::Branch { to, .. } => to < LOCAL,
                    _ => i.flow_control() != FlowControl::Next,
                };
                if leaves && undefined & !join != 0 && i.flow_control() != FlowControl::Exception {
                    return None;
                }
            }
        }
        Some(out)
    }
}

/// The bytes of an item; with any addresses of the right length if there are no labels yet.
fn encode(item: &Item, ip: u64, labels: Option<&[u64]>, short: bool) -> Option<Vec<u8>> {
    let instruction = |i: &Instruction| {
        let mut encoder = Encoder::new(64);
        encoder.encode(i, ip).ok()?;
        Some(encoder.take_buffer())
    };
    let address = |label: Label, instead: u64| match labels {
        // Those that aren't in the program are nowhere.
        Some(labels) => labels.get(label).copied().filter(|address| *address != 0),
        None => Some(instead),
    };
    match item {
        Item::Label(_) => Some(Vec::new()),
        Item::Bytes(bytes) => Some(bytes.clone()),
        Item::Instruction(i) => instruction(i),
        Item::Branch { code, to, .. } => {
            let code = if short {
                code.as_short_branch()
            } else {
                code.as_near_branch()
            };
            instruction(&Instruction::with_branch(code, address(*to, ip)?).ok()?)
        }
        Item::Address { register, of } => {
            let address = address(*of, 1 << 40)?;
            instruction(&Instruction::with2(Code::Mov_r64_imm64, *register, address).ok()?)
        }
        Item::Patch {
            instruction: i,
            label,
            offset,
            alias,
        } => {
            let mut i = *i;
            let moved = if *alias { ALIAS - CODE_SPACE } else { 0 };
            i.set_memory_base(Register::RIP);
            i.set_memory_displ_size(8);
            i.set_memory_displacement64(address(*label, CODE_SPACE)? + moved + *offset);
            instruction(&i)
        }
    }
}
