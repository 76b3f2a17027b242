//! Control flow of compiled code: within a page by links, elsewhere through the jump cache.

use std::mem::offset_of;

use super::access::entry;
use super::asm::{Mem, R11, RCX, Short};
use super::classify::Align;
use super::compile::{Compiler, Exit, Link, Work};
use super::loops::Copies;
use super::ready::Branch;
use super::registers::{Address, GUEST_RCX, GUEST_RSP};
use super::trace::Step;
use crate::mem::area::{Area, Frame, JUMP_ROTATE};

impl Compiler<'_> {
    /// Goes to another trace, or to this one's start.
    pub(super) fn go(&mut self, exit: Exit) {
        self.noted = exit.noted;
        self.store_noted();
        self.count(exit.done);
        let offset = super::trace::in_page(exit.target);
        let Some(offset) = offset else {
            self.asm.load(R11, Mem::frame(offset_of!(Frame, rip_page)));
            match i32::try_from(exit.target) {
                Ok(target) => self.asm.lea(R11, Mem::base(R11, target)),
                // No branch in the page goes so far.
                Err(_) => self.asm.constant32(R11, 0),
            }
            self.jump();
            return;
        };
        if offset == self.head && self.copies == Copies::Warm {
            self.next_turn();
            return;
        }
        // A loop in copies looks by itself.
        if exit.poll && (offset != self.head || self.copies == Copies::Once) {
            self.poll(exit.target);
        }
        if offset == self.head {
            let again = self.asm.jmp();
            self.asm.bind(again, self.direct);
            return;
        }
        self.settle_x87();
        self.leave(exit.target, Link::Call);
    }

    /// Jumps to the guest address in R11, another page of straight code or a direct branch.
    pub(super) fn jump(&mut self) {
        self.indirect(Work::Goto, 0);
        self.jump_found();
    }

    /// Looks the guest address in R11 up in the jump cache.
    pub(super) fn find_jump(&mut self) -> Short {
        let tags = offset_of!(Area, jump_tag) as i32;
        self.hash_jump();
        self.asm.load(RCX, entry(RCX, tags));
        self.asm.lea(RCX, Mem::indexed(RCX, R11, 0, 0));
        self.asm.jrcxz()
    }

    /// The index of the address in R11, into RCX.
    pub(super) fn hash_jump(&mut self) {
        self.asm.rorx(RCX, R11, JUMP_ROTATE as u8);
        self.asm.lea(RCX, Mem::indexed(RCX, R11, 0, 0));
        self.asm
            .pext(RCX, RCX, Mem::frame(offset_of!(Frame, jump_mask)));
    }

    /// Goes there, after [`Compiler::find_jump`].
    pub(super) fn jump_found(&mut self) {
        self.settle_x87();
        let codes = offset_of!(Area, jump_code) as i32;
        self.hash_jump();
        self.asm.jmp_memory(entry(RCX, codes));
    }

    /// Looks the target of a branch up, which is in R11, before anything is changed. Without code for it,
    /// an indirect branch is the interpreter's: it may be no address at all.
    pub(super) fn indirect(&mut self, work: Work, n: usize) {
        let hit = self.find_jump();
        let call = self.call(work, n, false);
        self.interpret(call);
        self.asm.here(hit);
    }

    /// Compiles a near branch. Says whether the trace ends here.
    pub(super) fn branch(&mut self, n: usize, step: &Step, branch: Branch) -> bool {
        let after = i64::from(step.at) + step.instruction.len() as i64;
        if !matches!(branch, Branch::Conditional { .. } | Branch::Jump { .. }) {
            self.store_noted();
        }
        match branch {
            Branch::Conditional { condition, target } => {
                let taken = step.follow.is_some_and(|next| i64::from(next) == target)
                    && step.follow.map(i64::from) != Some(after);
                let (condition, aside) = if taken {
                    (condition ^ 1, after)
                } else {
                    (condition, target)
                };
                if step.follow.is_none() && target == i64::from(self.head) {
                    // A loop: what goes back doesn't go out of its way.
                    let from = self.asm.jcc(condition ^ 1);
                    self.leaving.push((from, self.exit(step, after)));
                    self.go(self.exit(step, target));
                    return true;
                }
                let from = self.asm.jcc(condition);
                self.leaving.push((from, self.exit(step, aside)));
                if step.follow.is_some() {
                    self.went(step, if taken { target } else { after });
                    return false;
                }
                self.go(self.exit(step, after));
            }
            Branch::Zero { target } | Branch::Loop { target } => {
                let is_loop = matches!(branch, Branch::Loop { .. });
                if is_loop {
                    self.asm.lea(GUEST_RCX, Mem::base(GUEST_RCX, -1));
                }
                self.asm.mov(RCX, GUEST_RCX);
                let zero = self.asm.jrcxz();
                let other = self.asm.jmp();
                self.asm.here(zero);
                let (if_zero, if_not) = if is_loop {
                    (after, target)
                } else {
                    (target, after)
                };
                self.leaving.push((other, self.exit(step, if_not)));
                self.go(self.exit(step, if_zero));
            }
            Branch::Jump { target } => {
                if step.follow.is_some() {
                    self.went(step, target);
                    return false;
                }
                self.go(self.exit(step, target));
            }
            Branch::Call { target } => {
                self.push_return(n, after);
                if step.follow.is_some() {
                    self.went(step, target);
                    return false;
                }
                self.go(self.exit(step, target));
            }
            Branch::Return { extra } => {
                let call = self.call(Work::Branch, n, true);
                let from = Address::of(GUEST_RSP, 0);
                let from = self.access(n, &from, 8, Align::None, false, call);
                self.asm.load(R11, from);
                self.indirect(Work::Jump, n);
                self.asm.lea(GUEST_RSP, Mem::base(GUEST_RSP, 8 + extra));
                self.count(n + 1);
                self.jump_found();
            }
            Branch::Indirect { call, register } => {
                let target = Mem::frame(offset_of!(Frame, target));
                self.indirect_target(n, step, register);
                self.indirect(Work::Jump, n);
                if call {
                    self.asm.store(target, R11);
                    self.push_return(n, after);
                    self.asm.load(R11, target);
                }
                self.count(n + 1);
                self.jump_found();
            }
        }
        true
    }

    /// Where the trace itself goes back in the page without a look at requests: whatever leaves it
    /// looks then, or there could be a loop that never does.
    pub(super) fn went(&mut self, step: &Step, target: i64) {
        self.went_back |= target <= i64::from(step.at);
    }

    pub(super) fn exit(&self, step: &Step, target: i64) -> Exit {
        Exit {
            target,
            poll: self.went_back || target <= i64::from(step.at),
            noted: self.noted,
            done: self.current + 1,
        }
    }

    pub(super) fn push_return(&mut self, n: usize, after: i64) {
        let call = self.call(Work::Branch, n, true);
        let to = Address::of(GUEST_RSP, -8);
        let to = self.access(n, &to, 8, Align::None, true, call);
        self.asm.load(RCX, Mem::frame(offset_of!(Frame, rip_page)));
        self.asm.lea(RCX, Mem::base(RCX, after as i32));
        self.asm.store(to, RCX);
        self.asm.lea(GUEST_RSP, Mem::base(GUEST_RSP, -8));
    }

    /// Loads the target of an indirect near branch into R11.
    pub(super) fn indirect_target(&mut self, n: usize, step: &Step, register: Option<u8>) {
        if let Some(register) = register {
            let source = self.value(register, R11);
            if source != R11 {
                self.asm.mov(R11, source);
            }
            return;
        }
        let Some(address) = Address::new(&step.instruction) else {
            return;
        };
        let call = self.call(Work::Branch, n, true);
        let from = self.access(n, &address, 8, Align::None, false, call);
        self.asm.load(R11, from);
        self.held = None;
    }
}
