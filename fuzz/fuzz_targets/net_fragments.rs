#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| skerry_net::fuzz::net_fragments(data));
