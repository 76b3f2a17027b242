//! The plug-ins and the request handler of `crates/sandbox/examples`.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};
use skerry_sandbox_rt::{HostError, guest_fn, host_fn, serde_value};

/// A request, as the host has parsed it.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    method: String,
    path: String,
    body: String,
}

/// What the host sends back.
#[derive(Debug, Serialize, Deserialize)]
struct Response {
    status: u32,
    body: String,
}

serde_value!(Request, Response);

#[host_fn]
fn lookup(key: &str) -> Result<Option<String>, HostError>;

/// Answers a request.
#[guest_fn]
fn handle(request: Request) -> Result<Response, HostError> {
    let (status, body) = match (request.method.as_str(), request.path.as_str()) {
        ("GET", "/") => (200, "hello\n".to_string()),
        ("GET", path) => match path.strip_prefix("/greet/") {
            Some(name) => match lookup(name)? {
                Some(title) => (200, format!("good day, {title} {name}\n")),
                None => (200, format!("hello, {name}\n")),
            },
            None if path == "/spin" => loop {
                core::hint::spin_loop();
            },
            None if path == "/crash" => panic!("asked to crash"),
            None => (404, format!("there is no {path}\n")),
        },
        ("POST", "/reverse") => (200, request.body.chars().rev().collect()),
        (method, _) => (405, format!("{method} can't be done\n")),
    };
    Ok(Response { status, body })
}

/// A plug-in that does what it should.
#[guest_fn]
fn word_count(text: &str) -> String {
    let mut words: Vec<&str> = text.split_whitespace().collect();
    words.sort_unstable();
    let all = words.len();
    words.dedup();
    format!("{all} words, {} of them different", words.len())
}

/// One that never ends.
#[guest_fn]
fn endless(_text: &str) -> String {
    loop {
        core::hint::spin_loop();
    }
}

/// One that writes where it may not.
#[guest_fn]
fn wild(text: &str) -> String {
    // SAFETY: none; the sandbox is there for it.
    unsafe { (0xdead_0000 as *mut u8).write_volatile(text.len() as u8) };
    String::new()
}

/// One that wants all memory.
#[guest_fn]
fn greedy(text: &str) -> String {
    let mut all = Vec::new();
    loop {
        all.push(text.repeat(1000));
    }
}

/// One that fails in an orderly manner.
#[guest_fn]
fn picky(text: &str) -> Result<String, String> {
    match text.is_ascii() {
        true => Ok(text.to_uppercase()),
        false => Err("only ASCII, please".to_string()),
    }
}
