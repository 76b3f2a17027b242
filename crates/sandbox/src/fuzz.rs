//! Bodies of the fuzz targets: each takes any bytes and must neither panic nor hang.

use std::sync::Arc;
use std::time::Duration;

use skerry_hypervisor::PAGE_SIZE;
use skerry_sandbox_abi::component::{Func, Val};
use skerry_sandbox_abi::wasm::Outcome;
use skerry_sandbox_abi::{Control, Decode, Description, Function, PORT, Reader};

use crate::Value;
use crate::bare::Bare;
use crate::builder::Limits;
use crate::disk::Saved;
use crate::host_fn::HostFunctions;
use crate::layout::{IMAGE_BASE, Layout};
use crate::processor::Backend;
use crate::sandbox::{Exports, Parts, Sandbox};
use crate::snapshot::{Origin, Pages, memory_file};

/// No guest here needs more.
const INSTRUCTIONS: u64 = 2000;

fn limits() -> Limits {
    Limits {
        instructions: Some(INSTRUCTIONS),
        ..Limits::default()
    }
}

/// Any bytes as a guest's program.
pub fn program(bytes: &[u8]) {
    let built = Sandbox::builder()
        .guest(bytes)
        .backend(Backend::Soft)
        .init_timeout(Duration::from_millis(20))
        .build();
    let Ok(mut sandbox) = built else {
        return;
    };
    let names: Vec<_> = sandbox
        .description()
        .exports
        .into_iter()
        .map(|f| f.name)
        .collect();
    if sandbox.set_call_instructions(Some(INSTRUCTIONS)).is_ok() {
        for name in names {
            let _ = sandbox.call_dynamic(&name, &[Value::I32(1)]);
        }
    }
}

fn functions() -> Arc<HostFunctions> {
    let mut functions = HostFunctions::new();
    functions.add("add", |a: i32, b: i32| a.wrapping_add(b));
    functions.add("echo", |bytes: Vec<u8>| bytes);
    functions.add("list", |list: Vec<String>| list.len() as u64);
    Arc::new(functions)
}

fn function(name: &str) -> Function {
    Function {
        name: name.to_owned(),
        parameters: Vec::new(),
        returns: "any".to_owned(),
    }
}

/// Leaves for whatever reason the control page's third word says, over and over.
const PUPPET: [u8; 7] = {
    const VERSION: u8 = core::mem::offset_of!(Control, version) as u8;
    // L: mov eax, [rdi + version]; out PORT, eax; jmp L
    [0x8b, 0x47, VERSION, 0xe7, PORT, 0xeb, 0xf9]
};

/// A guest's program as [`program`] takes it: one segment.
pub fn program_seed() -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    let header: &[(usize, &[u8])] = &[
        (0, b"\x7fELF\x02\x01\x01"),
        (16, &2_u16.to_le_bytes()),
        (18, &62_u16.to_le_bytes()),
        (20, &1_u32.to_le_bytes()),
        (24, &IMAGE_BASE.to_le_bytes()),
        (32, &64_u64.to_le_bytes()),
        (52, &64_u16.to_le_bytes()),
        (54, &56_u16.to_le_bytes()),
        (56, &1_u16.to_le_bytes()),
        (64, &1_u32.to_le_bytes()),
        (68, &5_u32.to_le_bytes()),
        (72, &0x1000_u64.to_le_bytes()),
        (80, &IMAGE_BASE.to_le_bytes()),
        (96, &7_u64.to_le_bytes()),
        (104, &4096_u64.to_le_bytes()),
    ];
    for (at, bytes) in header {
        file[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    file.extend_from_slice(&PUPPET);
    file
}

/// A guest that does only that.
fn puppet() -> Option<Sandbox> {
    let Bare {
        processor,
        region,
        layout,
    } = Bare::new(Backend::Soft, &PUPPET).ok()?;
    let sandbox = Sandbox::assemble(Parts {
        processor,
        region,
        layout,
        functions: functions(),
        limits: limits(),
        exports: Exports::new(Description {
            exports: vec![function("f")],
            ..Description::default()
        }),
        links: vec![Some(0), Some(1), Some(2)],
        origin: Origin::empty(&layout, Bare::SIZE),
    });
    sandbox.ok()
}

/// Any bytes as what a guest leaves in its control page, its output and its log.
pub fn frames(bytes: &[u8]) {
    let Some(mut sandbox) = puppet() else {
        return;
    };
    let (page, rest) = bytes
        .split_at_checked(size_of::<Control>())
        .unwrap_or((bytes, &[]));
    let (output, log) = rest.split_at(rest.len() / 2);
    let Layout {
        control,
        output: output_area,
        log: log_area,
        ..
    } = sandbox.layout;
    for (at, bytes) in [
        (control.at, page),
        (output_area.at, output),
        (log_area.at, log),
    ] {
        let len = bytes.len().min(PAGE_SIZE);
        if let Some(room) = sandbox.region.bytes_mut(at, len as u64) {
            room.copy_from_slice(&bytes[..len]);
        }
    }
    let snapshot = sandbox.snapshot();
    let _ = sandbox.call_dynamic("f", &[Value::I32(1)]);
    let _ = sandbox.metrics();
    if let Ok(snapshot) = snapshot
        && sandbox.restore(&snapshot).is_ok()
    {
        let _ = sandbox.call::<Vec<String>>("f", ("text", 1_u64));
    }
    let _ = Description::read(&mut Reader::new(rest));
    // What the guests for WebAssembly answer.
    let _ = Outcome::<Option<Val>>::decode(&mut Reader::new(rest));
    let _ = Outcome::<Vec<Func>>::decode(&mut Reader::new(rest));
}

/// Any bytes as the configuration and, behind a zero byte, the processor state of a snapshot on disk.
pub fn saved(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let (Some(config), Some(state)) = (parts.next(), parts.next()) else {
        return;
    };
    let Ok(saved) = serde_json::from_slice::<Saved>(config) else {
        return;
    };
    let Ok(state) = serde_json::from_slice(state) else {
        return;
    };
    let size = saved.layout.size;
    if saved.check(size).is_err() {
        return;
    }
    let Ok(file) = memory_file(size) else {
        return;
    };
    let Ok(snapshot) = saved.snapshot(file, Pages::default(), state) else {
        return;
    };
    let made = Sandbox::from_snapshot_on(&snapshot, &functions(), Backend::Soft);
    if let Ok(mut sandbox) = made
        && sandbox.set_call_instructions(Some(INSTRUCTIONS)).is_ok()
    {
        let name = sandbox
            .description()
            .exports
            .first()
            .map(|f| f.name.clone());
        let _ = sandbox.call_dynamic(&name.unwrap_or_default(), &[]);
        let _ = sandbox.restore(&snapshot);
    }
}

/// A snapshot's configuration and state as [`saved`] takes them.
pub fn saved_seed() -> Vec<u8> {
    let sandbox = puppet();
    let snapshot = sandbox.and_then(|mut sandbox| sandbox.snapshot().ok());
    snapshot.map_or_else(Vec::new, |snapshot| {
        let mut bytes = serde_json::to_vec(&snapshot.saved()).unwrap_or_default();
        bytes.push(0);
        bytes.extend(serde_json::to_vec(&snapshot.kept.state).unwrap_or_default());
        bytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::Program;
    use skerry_test_support::{Random, fuzz_briefly};

    const TIME: Duration = Duration::from_secs(3);

    #[test]
    fn any_file_is_a_guest_or_an_error() {
        assert!(Program::parse(&program_seed()).is_ok());
        fuzz_briefly(
            &[program_seed()],
            b"\x00\x01\x02\x03\x05\x06\x07\x3e\xff",
            TIME,
            program,
        );
    }

    #[test]
    fn any_control_page_and_areas_are_an_answer_or_an_error() {
        let mut random = Random::new(7);
        let mut seeds = Vec::new();
        for reason in 0..6_u32 {
            let mut control = [0; size_of::<Control>()];
            control[8..12].copy_from_slice(&reason.to_le_bytes());
            control[32..36].copy_from_slice(&5_u32.to_le_bytes());
            control[40..44].copy_from_slice(&14_u32.to_le_bytes());
            let arguments = [2, 0, 0, 0, 2, 1, 0, 0, 0, 2, 2, 0, 0, 0];
            seeds.push([control.as_slice(), &arguments, &random.bytes(200)].concat());
        }
        fuzz_briefly(
            &seeds,
            b"\x00\x01\x02\x03\x04\x05\x0a\x0d\x40\x7f\xff",
            TIME,
            frames,
        );
    }

    #[test]
    fn any_snapshot_is_a_sandbox_or_an_error() {
        let seed = saved_seed();
        assert!(seed.len() > 1000);
        fuzz_briefly(&[seed], b"0123456789,{}[]\":-\x00", TIME, saved);
    }
}
