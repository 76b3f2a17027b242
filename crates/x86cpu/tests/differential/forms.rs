//! Short lists of instruction forms that belong together in compiled code.

use iced_x86::Code;

/// Instructions that may come together as one: on the stack, and moves.
pub const ON_STACK: [Code; 9] = [
    Code::Push_r64,
    Code::Push_r64,
    Code::Pop_r64,
    Code::Pop_r64,
    Code::Mov_r64_rm64,
    Code::Mov_rm64_r64,
    Code::Mov_r32_rm32,
    Code::Mov_rm32_r32,
    Code::Mov_r64_rm64,
];

/// What a conditional branch may stand behind.
pub const BEFORE_BRANCH: [Code; 30] = [
    Code::Cmp_rm8_r8,
    Code::Cmp_r8_rm8,
    Code::Cmp_rm8_imm8,
    Code::Cmp_rm16_r16,
    Code::Cmp_rm16_imm16,
    Code::Cmp_rm32_r32,
    Code::Cmp_r32_rm32,
    Code::Cmp_rm32_imm8,
    Code::Cmp_rm64_r64,
    Code::Cmp_r64_rm64,
    Code::Cmp_rm64_imm32,
    Code::Test_rm8_r8,
    Code::Test_rm8_imm8,
    Code::Test_rm16_imm16,
    Code::Test_rm32_r32,
    Code::Test_rm32_imm32,
    Code::Test_rm64_r64,
    Code::Test_rm64_imm32,
    Code::And_rm32_imm8,
    Code::And_rm64_r64,
    Code::And_r32_rm32,
    Code::Add_rm64_imm8,
    Code::Add_rm32_r32,
    Code::Add_r64_rm64,
    Code::Sub_rm32_imm32,
    Code::Sub_rm64_r64,
    Code::Inc_rm32,
    Code::Inc_rm64,
    Code::Dec_rm32,
    Code::Dec_rm64,
];
