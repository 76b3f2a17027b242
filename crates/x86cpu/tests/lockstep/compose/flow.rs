//! How programs get from one block to another.

use iced_x86::{Code, Instruction, MemoryOperand, Register as R};

use super::{Draft, at};
use crate::forms::BEFORE_BRANCH;
use crate::program::{END, Item, Label, undefined_at_joins};
use crate::world::{CALLS, FUEL, JUMPS, SAVED};

impl Draft<'_> {
    /// Ends the program when it has gone round often enough.
    pub(super) fn fuel(&mut self) {
        if self.random.one_in(2) {
            // All flags defined by the way.
            self.fixed(Instruction::with2(Code::Sub_rm32_imm8, at(FUEL), 1).ok());
            self.branch(Code::Jbe_rel32_64, END);
            return;
        }
        // No flag touched.
        self.define();
        self.fixed(Instruction::with2(Code::Mov_rm64_r64, at(SAVED), R::RCX).ok());
        self.fixed(Instruction::with2(Code::Mov_r64_rm64, R::RCX, at(FUEL)).ok());
        let less = MemoryOperand::with_base_displ(R::RCX, -1);
        self.fixed(Instruction::with2(Code::Lea_r64_m, R::RCX, less).ok());
        self.fixed(Instruction::with2(Code::Mov_rm64_r64, at(FUEL), R::RCX).ok());
        let (empty, on) = (self.local(), self.local());
        self.branch(Code::Jrcxz_rel8_64, empty);
        self.branch(Code::Jmp_rel32_64, on);
        self.keep(Item::Label(empty));
        self.branch(Code::Jmp_rel32_64, END);
        self.keep(Item::Label(on));
        self.fixed(Instruction::with2(Code::Mov_r64_rm64, R::RCX, at(SAVED)).ok());
    }

    /// The end of a block of the main part: the next one follows.
    pub(super) fn terminator(&mut self) {
        let to = self.any_block();
        let backward = to as u64 <= self.block;
        match self.random.below(16) {
            0 => {}
            1..8 => {
                if backward {
                    self.fuel();
                }
                self.conditional(to);
            }
            8 => {
                if backward {
                    self.fuel();
                }
                self.define();
                self.branch(Code::Jmp_rel32_64, to);
            }
            9 => {
                self.fuel();
                self.define();
                let code = self
                    .random
                    .pick(&[Code::Loop_rel8_64_RCX, Code::Jrcxz_rel8_64]);
                let (taken, on) = (self.local(), self.local());
                self.branch(code, taken);
                self.branch(Code::Jmp_rel32_64, on);
                self.keep(Item::Label(taken));
                self.branch(Code::Jmp_rel32_64, to);
                self.keep(Item::Label(on));
            }
            10 | 11 => self.jump_indirect(to),
            12 | 13 => {
                self.fuel();
                self.define();
                let sub = 1 + self.mains + self.random.below(self.subs);
                self.branch(Code::Call_rel32_64, sub as Label);
                self.undefined = undefined_at_joins(&self.program.setting);
            }
            14 => self.call_indirect(),
            _ => {
                // Back to wherever the stack says.
                self.fuel();
                self.define();
                let r = self.register();
                self.keep(Item::Address {
                    register: r,
                    of: to,
                });
                self.instruction(Instruction::with1(Code::Push_r64, r).ok());
                self.add(&[0xc3]);
            }
        }
    }

    fn conditional(&mut self, to: Label) {
        if self.random.one_in(2) {
            let form = self.random.pick(&BEFORE_BRANCH);
            self.among_others(form);
        }
        self.define();
        let code = self.random.pick(&self.composer.conditions);
        if self.condition_fits(code) {
            self.branch(code, to);
        }
    }

    /// An index below 8 in RCX, from the fuel or fixed.
    fn index(&mut self) {
        if self.random.one_in(3) {
            let value = self.random.below(8);
            self.move_value(R::RCX, value);
        } else {
            self.instruction(Instruction::with2(Code::Mov_r64_rm64, R::RCX, at(FUEL)).ok());
            self.instruction(Instruction::with2(Code::And_rm32_imm8, R::ECX, 7).ok());
        }
    }

    fn jump_indirect(&mut self, to: Label) {
        self.fuel();
        match self.random.below(3) {
            0 => {
                self.define();
                let r = self.register();
                self.keep(Item::Address {
                    register: r,
                    of: to,
                });
                self.instruction(Instruction::with1(Code::Jmp_rm64, r).ok());
            }
            1 => {
                self.define();
                let n = self.random.below(8);
                self.instruction(Instruction::with1(Code::Jmp_rm64, at(JUMPS + 8 * n)).ok());
            }
            _ => {
                self.index();
                self.define();
                let memory = MemoryOperand::with_base_index_scale_displ_size(
                    R::None,
                    R::RCX,
                    8,
                    JUMPS as i64,
                    8,
                );
                self.instruction(Instruction::with1(Code::Jmp_rm64, memory).ok());
            }
        }
    }

    fn call_indirect(&mut self) {
        self.fuel();
        let memory = if self.random.one_in(2) {
            self.index();
            MemoryOperand::with_base_index_scale_displ_size(R::None, R::RCX, 8, CALLS as i64, 8)
        } else {
            at(CALLS + 8 * self.random.below(8))
        };
        self.define();
        self.instruction(Instruction::with1(Code::Call_rm64, memory).ok());
    }

    pub(super) fn leave_sub(&mut self) {
        if self.random.one_in(6) {
            self.fuel();
            self.define();
            let sub = 1 + self.mains + self.random.below(self.subs);
            self.branch(Code::Call_rel32_64, sub as Label);
            self.undefined = undefined_at_joins(&self.program.setting);
        }
        self.fuel();
        self.define();
        if self.random.one_in(5) {
            let bytes = 8 * self.random.below(3) as u8;
            self.add(&[0xc2, bytes, 0]);
        } else {
            self.add(&[0xc3]);
        }
    }
}
