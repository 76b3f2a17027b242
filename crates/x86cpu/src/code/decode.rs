//! From guest memory to blocks.

use std::sync::Arc;

use iced_x86::{Decoder, DecoderError, FlowControl, Instruction, Mnemonic};

use crate::code::cache::{BlockRef, KeyBits, NewBlock, in_page};
use crate::code::lower::Lowering;
use crate::cpu::Cpu;
use crate::mem::{PAGE_MASK, PAGE_SIZE};
use crate::trap::Trap;

/// Bytes that are looked at for one block; so many of them at first, which is enough for most.
const WINDOW: usize = 256;
const FIRST_LOOK: usize = 64;
/// Instructions in one block.
const INSTRUCTIONS: u16 = 48;
/// How often bytes that change while they are decoded are decoded again at once; then pending
/// requests have their turn.
const RETRIES: u32 = 8;
/// Bytes of the longest instruction.
const LONGEST: usize = 15;

/// Branches that leave mode and privilege as they are.
fn is_near(i: &Instruction) -> bool {
    i.is_jcc_short_or_near()
        || i.is_jmp_short_or_near()
        || i.is_call_near()
        || i.is_jmp_near_indirect()
        || i.is_call_near_indirect()
        || i.is_loop()
        || i.is_loopcc()
        || i.is_jcx_short()
        || i.mnemonic() == Mnemonic::Ret
}

/// Why decoding stopped.
enum Stop {
    /// A block was made.
    Made,
    /// The first instruction needs bytes past the window.
    Short,
    /// The first instruction is longer than instructions can be.
    TooLong,
}

/// A block's worth of ops.
#[derive(Clone, Copy, Default)]
struct Shape {
    /// Ops that run one after the other.
    main: usize,
    count: u16,
    len: u16,
    linkable: bool,
    /// It would go on if there were more bytes.
    cut: bool,
}

impl Cpu {
    /// The block to run at the current RIP; decodes it if need be. With [`KeyBits::ONE`] it is a
    /// single instruction.
    #[cold]
    #[inline(never)]
    pub(crate) fn find_block(&mut self, bits: u64) -> Result<BlockRef, Trap> {
        if !self.code_within_limit(1) {
            return Err(self.gp0());
        }
        let linear = self.code_linear();
        let (gpa, global) = self.fetch_from(linear)?;
        let key = self.block_key(gpa, bits);
        if let Some(found) = self.code.find(key)
            && self.usable(found, linear)?
        {
            if bits == 0 {
                self.remember_plain(linear, global, found);
            }
            return Ok(found);
        }
        let block = self.decode_block(linear, gpa, bits)?;
        if bits == 0 {
            self.code.jit.adopt(block);
        }
        if bits == 0 {
            self.remember_plain(linear, global, block);
        }
        Ok(block)
    }

    /// Decodes at `linear`, which is `gpa`.
    fn decode_block(&mut self, linear: u64, gpa: u64, bits: u64) -> Result<BlockRef, Trap> {
        // Not later: ops refer to the code that goes with the blocks.
        if !self.code.has_room() {
            self.flush_blocks();
        }
        if self.code.wants_tables() {
            self.code.take_tables();
            if self.code.jit.is_on() {
                self.mmu.take_jumps();
            }
        }
        self.code.take_scratch(self.features);
        let mut ops = std::mem::take(&mut self.code.scratch.ops);
        let result = self.decode_into(&mut ops, linear, gpa, bits);
        self.code.scratch.ops = ops;
        self.code.share_scratch();
        result
    }

    fn decode_into(
        &mut self,
        ops: &mut Vec<crate::code::Op>,
        linear: u64,
        gpa: u64,
        bits: u64,
    ) -> Result<BlockRef, Trap> {
        let limit = if bits & KeyBits::ONE != 0 {
            1
        } else {
            INSTRUCTIONS
        };
        for _ in 0..RETRIES {
            self.claim_code_page(gpa);
            let slots = self.mmu_slots();
            let Some(page) = slots.page(gpa) else {
                return Err(self.fetch_from_nowhere());
            };
            let version = page.state.version();
            let mut window = [0; WINDOW];
            let all = (PAGE_SIZE - in_page(gpa)).min(WINDOW);
            let mut here = all.min(FIRST_LOOK);
            page.read(in_page(gpa), &mut window[..here]);
            let (mut stop, mut shape) = self.lower_all(ops, &window[..here], limit);
            if here < all && shape.cut {
                here = all;
                page.read(in_page(gpa), &mut window[..here]);
                (stop, shape) = self.lower_all(ops, &window[..here], limit);
            }
            match stop {
                Stop::Made => {}
                Stop::TooLong => return Err(self.gp0()),
                Stop::Short => {
                    return self.decode_crossing(ops, linear, gpa, bits, &window[..here]);
                }
            }
            if !self.code_within_limit(u64::from(shape.len)) {
                if limit > 1 {
                    return self.decode_into(ops, linear, gpa, KeyBits::ONE);
                }
                return Err(self.gp0());
            }
            page.state.add_code(in_page(gpa), usize::from(shape.len));
            let mut again = [0; WINDOW];
            page.read(in_page(gpa), &mut again[..usize::from(shape.len)]);
            let same = again[..usize::from(shape.len)] == window[..usize::from(shape.len)];
            if !same || !page.state.is_claimed() {
                continue;
            }
            let new = NewBlock {
                ops,
                main: shape.main,
                page: page.state,
                version,
                count: shape.count,
                len: shape.len,
                linkable: shape.linkable && bits == 0,
                second: None,
            };
            return self.enter_block(gpa, bits, &new);
        }
        Err(self.resume())
    }

    /// One instruction that goes on in the next page.
    fn decode_crossing(
        &mut self,
        ops: &mut Vec<crate::code::Op>,
        linear: u64,
        gpa: u64,
        bits: u64,
        first: &[u8],
    ) -> Result<BlockRef, Trap> {
        let next = self.wrap_code((linear | PAGE_MASK).wrapping_add(1));
        let gpa2 = self.translate_fetch(next)?;
        for _ in 0..RETRIES {
            self.claim_code_page(gpa);
            self.claim_code_page(gpa2);
            let slots = self.mmu_slots();
            let (Some(page), Some(page2)) = (slots.page(gpa), slots.page(gpa2)) else {
                return Err(self.fetch_from_nowhere());
            };
            let versions = (page.state.version(), page2.state.version());
            let head = first.len();
            let mut window = [0; LONGEST];
            page.read(in_page(gpa), &mut window[..head]);
            page2.read(0, &mut window[head..]);
            let (stop, shape) = self.lower_all(ops, &window, 1);
            if !matches!(stop, Stop::Made) || !self.code_within_limit(u64::from(shape.len)) {
                return Err(self.gp0());
            }
            let len = usize::from(shape.len);
            page.state.add_code(in_page(gpa), head.min(len));
            if len > head {
                page2.state.add_code(0, len - head);
            }
            let mut again = [0; LONGEST];
            page.read(in_page(gpa), &mut again[..head]);
            page2.read(0, &mut again[head..]);
            let claimed = page.state.is_claimed() && page2.state.is_claimed();
            if again[..len] != window[..len] || !claimed {
                continue;
            }
            let new = NewBlock {
                ops,
                main: shape.main,
                page: page.state,
                version: versions.0,
                count: shape.count,
                len: shape.len,
                linkable: false,
                second: Some((gpa2 & !PAGE_MASK, page2.state, versions.1)),
            };
            return self.enter_block(gpa, bits, &new);
        }
        Err(self.resume())
    }

    /// Lowers instructions until the block ends or the bytes do.
    fn lower_all(
        &mut self,
        ops: &mut Vec<crate::code::Op>,
        bytes: &[u8],
        limit: u16,
    ) -> (Stop, Shape) {
        ops.clear();
        let rip = self.rip;
        let code_bits = self.sys.mode.bits();
        let options = self.features.decoder_options();
        let mut decoder = Decoder::with_ip(code_bits, bytes, rip, options);
        let mut lowering = Lowering::new(self, ops, rip, bytes);
        let mut shape = Shape::default();
        let mut instruction = Instruction::default();
        while shape.count < limit && usize::from(shape.len) < bytes.len() {
            let at = usize::from(shape.len);
            decoder.decode_out(&mut instruction);
            let rest = bytes.len() - at;
            if decoder.last_error() == DecoderError::NoMoreBytes && rest < LONGEST {
                shape.cut = true;
                if shape.count == 0 {
                    return (Stop::Short, shape);
                }
                break;
            }
            if instruction.is_invalid() && too_long(code_bits, &bytes[at..], options) {
                if shape.count == 0 {
                    return (Stop::TooLong, shape);
                }
                break;
            }
            lowering.instruction(&instruction, shape.len);
            shape.len += instruction.len() as u16;
            shape.count += 1;
            if lowering.ended() {
                shape.linkable = is_near(&instruction);
                break;
            }
            shape.linkable =
                instruction.flow_control() == FlowControl::Next || is_near(&instruction);
            shape.cut = usize::from(shape.len) == bytes.len() && shape.count < limit;
        }
        shape.main = lowering.finish(shape.len);
        (Stop::Made, shape)
    }

    fn enter_block(&mut self, gpa: u64, bits: u64, new: &NewBlock<'_>) -> Result<BlockRef, Trap> {
        let key = self.block_key(gpa, bits);
        // There is room: a block is far smaller than what was looked for.
        self.code.add(key, new).ok_or_else(|| self.ud())
    }

    /// Code where there is no RAM: an empty bus reads as all ones, which is no instruction.
    fn fetch_from_nowhere(&mut self) -> Trap {
        self.ud()
    }

    fn wrap_code(&self, linear: u64) -> u64 {
        if self.sys.mode.is64() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    fn mmu_slots(&self) -> Arc<crate::mem::SlotTable> {
        self.mmu.slots().clone()
    }
}

/// Whether bytes that are no instruction are the start of one that is too long. (The decoder calls
/// both invalid, but with one byte less than the limit it asks for more.)
fn too_long(code_bits: u32, bytes: &[u8], options: u32) -> bool {
    if bytes.len() < LONGEST {
        return false;
    }
    let mut decoder = Decoder::new(code_bits, &bytes[..LONGEST - 1], options);
    decoder.decode_out(&mut Instruction::default());
    decoder.last_error() == DecoderError::NoMoreBytes
}
