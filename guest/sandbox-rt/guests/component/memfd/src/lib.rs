//! Nothing. On Linux wasmtime's runtime depends on `memfd`, which needs the standard library, also where it
//! is built without and never uses it. A guest is built for Linux's target and has no standard library.

#![no_std]
