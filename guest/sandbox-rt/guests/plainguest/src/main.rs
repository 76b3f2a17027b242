//! A guest that needs nothing of its host.

#![no_std]
#![no_main]

use skerry_sandbox_rt::guest_fn;

#[guest_fn]
fn double(value: i32) -> i32 {
    value.wrapping_mul(2)
}

/// Panics where it can't be done.
#[guest_fn]
fn divide(a: i32, b: i32) -> i32 {
    a / b
}
