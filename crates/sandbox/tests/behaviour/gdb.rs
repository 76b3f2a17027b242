//! Debuggers: the stub by its protocol, and by gdb where that is installed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use object::{Object, ObjectSymbol};
use skerry_sandbox::{Builder, CallError, DebugListener, Fault, Sandbox, Status};

use crate::common::{self, guest};
use crate::rsp::{self, Client};

fn program() -> PathBuf {
    guest("sandbox-debugguest")
}

fn builder() -> Builder {
    common::builder().guest(program())
}

/// The address of a function or variable.
fn address(name: &str) -> u64 {
    let file = std::fs::read(program()).unwrap();
    let file = object::File::parse(&*file).unwrap();
    let symbol = file.symbols().find(|symbol| symbol.name() == Ok(name));
    symbol.expect(name).address()
}

fn listen() -> (DebugListener, SocketAddr) {
    let listener = DebugListener::tcp("127.0.0.1:0").unwrap();
    let address = listener.local_address().unwrap();
    (listener, address)
}

/// A sandbox that a debugger is to connect to.
fn debugged() -> (Sandbox, SocketAddr) {
    let mut sandbox = builder().build().unwrap();
    let (listener, at) = listen();
    sandbox.debug(listener);
    (sandbox, at)
}

/// Runs a debugger beside a sandbox.
fn with<R: Send>(
    at: SocketAddr,
    debugger: impl FnOnce(Client) -> R + Send,
    guest: impl FnOnce(),
) -> R {
    thread::scope(|scope| {
        let debugger = scope.spawn(move || debugger(Client::attach(at)));
        guest();
        debugger.join().unwrap()
    })
}

/// Whether there are debug registers to test; with a note that says so where there are none.
fn hardware(sandbox: &Sandbox) -> bool {
    let has = sandbox.has_debug_registers();
    if !has {
        eprintln!("this KVM's guests have no debug registers: not tested");
    }
    has
}

#[test]
fn without_debug_registers_hardware_breakpoints_are_refused() {
    let (mut sandbox, at) = debugged();
    let has = sandbox.has_debug_registers();
    let target = address("debug_target");
    with(
        at,
        |mut client| {
            for kind in [1, 2] {
                let answer = client.ask(&format!("Z{kind},{target:x},1"));
                // "" is gdb's "not supported".
                assert_eq!(answer, if has { "OK" } else { "" }, "Z{kind}");
            }
            assert_eq!(client.ask("D"), "OK");
        },
        || {
            assert_eq!(
                sandbox.call::<u64>("calculate", (5_u64, 2_u64)).unwrap(),
                17
            );
        },
    );
}

#[test]
fn a_guest_stops_before_its_first_instruction() {
    let (listener, at) = listen();
    let entry = address("_start");
    let found = with(
        at,
        |mut client| {
            let rip = client.rip();
            assert_eq!(client.ask("D"), "OK");
            rip
        },
        || {
            let mut sandbox = builder().gdb(listener).build().unwrap();
            assert!(!sandbox.is_debugged(), "the debugger has left");
            assert_eq!(
                sandbox.call::<u64>("calculate", (5_u64, 2_u64)).unwrap(),
                17
            );
        },
    );
    assert_eq!(found, entry);
}

#[test]
fn breakpoints_stop_and_leave_no_trace() {
    let (mut sandbox, at) = debugged();
    let target = address("debug_target");
    with(
        at,
        |mut client| {
            let code = client.read(target, 4);
            assert_eq!(client.ask(&format!("Z0,{target:x},1")), "OK");
            let stop = client.go();
            assert!(
                stop.starts_with("T05") && stop.contains("swbreak"),
                "{stop}"
            );
            assert_eq!(client.rip(), target);
            assert_eq!((client.register(5), client.register(4)), (7, 1), "RDI, RSI");
            // The debugger sees the program, not its own breakpoints.
            assert_eq!(client.read(target, 4), code);
            // From the breakpoint on, as gdb does it: without it, one step, with it again.
            assert_eq!(client.ask(&format!("z0,{target:x},1")), "OK");
            let stop = client.step();
            assert!(stop.starts_with("S05") || stop.starts_with("T05"), "{stop}");
            assert_ne!(client.rip(), target);
            assert_eq!(client.ask(&format!("Z0,{target:x},1")), "OK");
            // The next call.
            let stop = client.go();
            assert!(stop.contains("swbreak"), "{stop}");
            assert_eq!(client.register(5), 8);
            assert_eq!(client.ask(&format!("z0,{target:x},1")), "OK");
            client.send("vCont;c");
            // The sandbox goes away.
            assert_eq!(client.receive().as_deref(), Some("W00"));
        },
        || {
            assert_eq!(
                sandbox.call::<u64>("calculate", (7_u64, 1_u64)).unwrap(),
                22
            );
            let between = sandbox.snapshot().unwrap();
            assert_eq!(
                sandbox.call::<u64>("calculate", (8_u64, 1_u64)).unwrap(),
                25
            );
            sandbox.restore(&between).unwrap();
            assert_eq!(sandbox.call::<u64>("watched", ()).unwrap(), 7);
            // What was kept while a breakpoint was set has none.
            let functions = Default::default();
            let mut copy = Sandbox::from_snapshot(&between, &functions).unwrap();
            assert_eq!(copy.call::<u64>("calculate", (9_u64, 0_u64)).unwrap(), 27);
            drop(std::mem::replace(&mut sandbox, common::sandbox()));
            assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
        },
    );
}

#[test]
fn a_step_is_one_instruction() {
    let (mut sandbox, at) = debugged();
    if !hardware(&sandbox) {
        return;
    }
    let target = address("debug_target");
    with(
        at,
        |mut client| {
            assert_eq!(client.ask(&format!("Z1,{target:x},1")), "OK");
            let stop = client.go();
            assert!(stop.contains("hwbreak"), "{stop}");
            assert_eq!(client.rip(), target);
            // From it, although it is still set.
            let mut visited = Vec::new();
            for _ in 0..8 {
                client.step();
                visited.push(client.rip());
            }
            assert_ne!(visited[0], target);
            assert!(
                visited
                    .iter()
                    .all(|rip| rip - target < 0x1000 || *rip >= address("debug_leaf"))
            );
            assert_eq!(client.ask(&format!("z1,{target:x},1")), "OK");
            // Steps to the end of the call, and into the next.
            let (start, end) = (0x1_0000, 0x4000_0000);
            client.send(&format!("vCont;r{start:x},{end:x}:1"));
            let stop = client.receive().unwrap();
            assert!(stop.starts_with("S05"), "{stop}");
            assert_eq!(client.ask("D"), "OK");
        },
        || {
            assert_eq!(sandbox.call::<u64>("calculate", (1_u64, 1_u64)).unwrap(), 4);
            assert_eq!(sandbox.call::<u64>("calculate", (2_u64, 1_u64)).unwrap(), 7);
        },
    );
    // No trap flag and no debug register stays.
    assert_eq!(
        sandbox.call::<u64>("calculate", (3_u64, 1_u64)).unwrap(),
        10
    );
}

#[test]
fn a_watchpoint_stops_compiled_code_after_the_write() {
    let (mut sandbox, at) = debugged();
    if !hardware(&sandbox) {
        return;
    }
    let watched = address("DEBUG_WATCHED");
    let rounds = 20_000_u64;
    with(
        at,
        |mut client| {
            // Reads of it alone can't be told from writes.
            assert_ne!(client.ask(&format!("Z3,{watched:x},8")), "OK");
            assert_eq!(client.ask(&format!("Z2,{watched:x},8")), "OK");
            let stop = client.go();
            assert!(stop.contains(&format!("watch:{watched:x}")), "{stop}");
            let sum: u64 = (0..rounds).map(|n| n * 3).sum();
            assert_eq!(client.read(watched, 8), sum.to_le_bytes());
            assert_eq!(client.ask(&format!("z2,{watched:x},8")), "OK");
            // A read.
            assert_eq!(client.ask(&format!("Z4,{watched:x},8")), "OK");
            let stop = client.go();
            assert!(stop.contains(&format!("awatch:{watched:x}")), "{stop}");
            assert_eq!(client.ask(&format!("z4,{watched:x},8")), "OK");
            client.send("vCont;c");
        },
        || {
            let sum = sandbox.call::<u64>("leaf_often", (rounds,)).unwrap();
            assert_eq!(sandbox.call::<u64>("watched", ()).unwrap(), sum);
        },
    );
}

#[test]
fn a_breakpoint_stops_code_that_runs_already_compiled() {
    let mut sandbox = builder().build().unwrap();
    let rounds = 20_000_u64;
    let plain = sandbox.call::<u64>("calculate_often", (rounds,)).unwrap();
    let kinds = if hardware(&sandbox) { 2 } else { 1 };
    let (listener, at) = listen();
    sandbox.debug(listener);
    let leaf = address("debug_leaf");
    with(
        at,
        |mut client| {
            for kind in 0..kinds {
                assert_eq!(client.ask(&format!("Z{kind},{leaf:x},1")), "OK");
                for n in 0..10 {
                    let stop = client.go();
                    assert!(stop.contains("break"), "{stop}");
                    assert_eq!(client.rip(), leaf);
                    let round = client.register(5);
                    assert_eq!(round, n + if kind == 0 { 0 } else { 10 });
                    if kind == 0 {
                        client.ask(&format!("z0,{leaf:x},1"));
                        client.step();
                        client.ask(&format!("Z0,{leaf:x},1"));
                    }
                }
                assert_eq!(client.ask(&format!("z{kind},{leaf:x},1")), "OK");
            }
            assert_eq!(client.ask("D"), "OK");
        },
        || {
            let sum = sandbox.call::<u64>("calculate_often", (rounds,)).unwrap();
            assert_eq!(sum, plain);
        },
    );
}

#[test]
fn a_running_guest_is_interrupted_and_changed() {
    let (mut sandbox, at) = debugged();
    let stop_flag = address("DEBUG_STOP");
    let spin = address("debug_spin");
    with(
        at,
        |mut client| {
            for _ in 0..3 {
                client.send("vCont;c");
                thread::sleep(Duration::from_millis(20));
                client.raw(&[3]);
                let stop = client.receive().unwrap();
                assert!(stop.starts_with("S02") || stop.starts_with("T02"), "{stop}");
                assert!(client.rip() - spin < 0x100);
            }
            assert_eq!(client.write(stop_flag, &[1]), "OK");
            assert_eq!(client.ask("D"), "OK");
        },
        || assert!(sandbox.call::<bool>("spin", ()).unwrap()),
    );
}

#[test]
fn a_debugger_that_hangs_up_lets_the_guest_go_on() {
    let (mut sandbox, at) = debugged();
    let target = address("debug_target");
    let before = sandbox.snapshot().unwrap();
    with(
        at,
        |mut client| {
            client.ask(&format!("Z0,{target:x},1"));
            client.send("vCont;c");
            client.receive().unwrap();
            client.ask(&format!("Z2,{:x},8", address("DEBUG_WATCHED")));
        },
        || {
            assert_eq!(
                sandbox.call::<u64>("calculate", (5_u64, 2_u64)).unwrap(),
                17
            );
            assert!(!sandbox.is_debugged());
            assert_eq!(
                sandbox.call::<u64>("calculate", (6_u64, 2_u64)).unwrap(),
                20
            );
            sandbox.restore(&before).unwrap();
            assert_eq!(
                sandbox.call::<u64>("calculate", (6_u64, 2_u64)).unwrap(),
                20
            );
        },
    );
}

#[test]
fn what_a_debugger_writes_is_restored() {
    let (mut sandbox, at) = debugged();
    let watched = address("DEBUG_WATCHED");
    let before = sandbox.snapshot().unwrap();
    with(
        at,
        |mut client| {
            assert_eq!(client.write(watched, &77_u64.to_le_bytes()), "OK");
            // Nothing is there, nor across the end of what is.
            assert!(client.ask("m1000,8").starts_with('E'));
            assert!(client.write(0x1000, &[1]).starts_with('E'));
            assert!(client.write(u64::MAX - 3, &[1; 8]).starts_with('E'));
            let stack_end = 0x1_0000_0000_u64;
            assert_eq!(client.read(stack_end - 8, 16).len(), 8);
            assert!(client.write(stack_end - 8, &[1; 16]).starts_with('E'));
            // Ring 0's memory is nobody's business.
            assert!(client.ask("mffffff8000000000,8").starts_with('E'));
            client.ask("D");
        },
        || {
            assert_eq!(sandbox.call::<u64>("watched", ()).unwrap(), 77);
            let after = sandbox.snapshot().unwrap();
            sandbox.restore(&before).unwrap();
            assert_eq!(sandbox.call::<u64>("watched", ()).unwrap(), 0);
            sandbox.restore(&after).unwrap();
            assert_eq!(sandbox.call::<u64>("watched", ()).unwrap(), 77);
        },
    );
}

#[test]
fn a_restore_leaves_no_watchpoint_of_a_call_that_was_killed() {
    let (mut sandbox, at) = debugged();
    if !hardware(&sandbox) {
        return;
    }
    let watched = address("DEBUG_WATCHED");
    let before = sandbox.snapshot().unwrap();
    with(
        at,
        |mut client| {
            assert_eq!(client.ask(&format!("Z2,{watched:x},8")), "OK");
            let stop = client.go();
            assert!(stop.contains(&format!("watch:{watched:x}")), "{stop}");
            client.send("k");
        },
        || {
            let killed = sandbox.call::<u64>("leaf_often", (20_000_u64,));
            assert!(matches!(killed, Err(CallError::Cancelled)), "{killed:?}");
            assert!(!sandbox.is_debugged());
            sandbox.restore(&before).unwrap();
            // It would end in the stub of the debug exception.
            let sum = sandbox.call::<u64>("leaf_often", (20_000_u64,)).unwrap();
            assert_eq!(sandbox.call::<u64>("watched", ()).unwrap(), sum);
        },
    );
}

#[test]
fn registers_of_each_kind_are_read_and_written() {
    const XMM3: usize = 276 + 3 * 16;
    const R12: usize = 12 * 8;
    let (mut sandbox, at) = debugged();
    with(
        at,
        |mut client| {
            let stop = client.go();
            // The guest's own INT3: it stands behind it, as on Linux.
            assert!(stop.starts_with("S05") || stop.starts_with("T05"), "{stop}");
            let mut all = client.registers();
            assert_eq!(all[R12..R12 + 8], 5_u64.to_le_bytes());
            assert_eq!(all[XMM3..XMM3 + 8], 0x1234_5678_9abc_def0_u64.to_le_bytes());
            // Pi, as FLDPI rounds it, in ST(0).
            let pi = [0x35, 0xc2, 0x68, 0x21, 0xa2, 0xda, 0x0f, 0xc9, 0x00, 0x40];
            assert_eq!(all[164..174], pi);
            let mxcsr = u32::from_le_bytes(all[532..536].try_into().unwrap());
            assert_eq!(mxcsr & 0x1f80, 0x1f80);
            assert_eq!(all[140], 0x23, "CS");
            all[R12..R12 + 8].copy_from_slice(&1_u64.to_le_bytes());
            all[XMM3..XMM3 + 8].copy_from_slice(&0x10_u64.to_le_bytes());
            assert_eq!(client.ask(&format!("G{}", rsp::hex(&all))), "OK");
            let changed = client.registers();
            assert_eq!(changed[..536], all[..536]);
            // No other ring.
            all[140] = 8;
            assert!(client.ask(&format!("G{}", rsp::hex(&all))).starts_with('E'));
            client.ask("D");
        },
        || assert_eq!(sandbox.call::<u64>("own_breakpoint", ()).unwrap(), 0x11),
    );
}

#[test]
fn a_crash_is_seen_before_the_call_fails() {
    let cases: [(&str, u8); 4] = [("crash", 11), ("divide", 8), ("illegal", 4), ("panics", 6)];
    for (function, signal) in cases {
        let (mut sandbox, at) = debugged();
        with(
            at,
            |mut client| {
                let stop = client.go();
                assert_eq!(&stop[1..3], format!("{signal:02x}"), "{function}: {stop}");
                if function == "crash" {
                    assert_eq!(client.register(5), 0x66, "RDI");
                    let inner = address("debug_inner");
                    assert!(client.rip() - inner < 0x40);
                }
                client.send(&format!("vCont;C{signal:02x}"));
                assert_eq!(client.receive().as_deref(), Some("W00"));
            },
            || {
                let error = match function {
                    "crash" => sandbox.call::<u64>("crash", (0x66_u64,)).unwrap_err(),
                    "divide" => sandbox.call::<u64>("divide", (1_u64, 0_u64)).unwrap_err(),
                    "panics" => sandbox.call::<()>("panics", ("oh",)).unwrap_err(),
                    _ => sandbox.call::<()>(function, ()).unwrap_err(),
                };
                match function {
                    "panics" => assert!(matches!(error, CallError::Panicked(_)), "{error}"),
                    _ => assert!(matches!(error, CallError::Fault(_)), "{error}"),
                }
                assert!(matches!(sandbox.status(), Status::Poisoned(_)));
                drop(sandbox);
            },
        );
    }
}

#[test]
fn a_fault_can_be_mended() {
    let (mut sandbox, at) = debugged();
    with(
        at,
        |mut client| {
            let stop = client.go();
            assert!(stop.starts_with("S0b") || stop.starts_with("T0b"), "{stop}");
            let rax_rip = client.rip();
            // Each pointer to where nothing is leads to a variable now.
            let mut all = client.registers();
            for n in 0..16 {
                if all[n * 8..n * 8 + 8] == 0x66_u64.to_le_bytes() {
                    let at = address("DEBUG_WATCHED").to_le_bytes();
                    all[n * 8..n * 8 + 8].copy_from_slice(&at);
                }
            }
            client.ask(&format!("G{}", rsp::hex(&all)));
            assert_eq!(client.rip(), rax_rip);
            client.send("vCont;c");
        },
        || {
            sandbox.call::<u64>("crash", (0x66_u64,)).unwrap();
            assert_eq!(sandbox.call::<u64>("watched", ()).unwrap(), 1);
        },
    );
}

#[test]
fn a_killed_guest_is_a_cancelled_call() {
    let (mut sandbox, at) = debugged();
    with(
        at,
        |mut client| client.send("k"),
        || {
            let error = sandbox.call::<u64>("watched", ()).unwrap_err();
            assert!(matches!(error, CallError::Cancelled), "{error}");
            assert!(!sandbox.is_debugged());
        },
    );
}

#[test]
fn a_poisoned_sandbox_is_looked_at() {
    let mut sandbox = builder().build().unwrap();
    let before = sandbox.snapshot().unwrap();
    let error = sandbox.call::<u64>("crash", (0x77_u64,)).unwrap_err();
    let CallError::Fault(Fault::AccessViolation {
        address: 0x77, rip, ..
    }) = error
    else {
        panic!("{error}");
    };
    let (listener, at) = listen();
    with(
        at,
        |mut client| {
            assert_eq!(client.rip(), rip);
            assert_eq!(client.register(5), 0x77);
            let why = client.ask(&format!("qRcmd,{}", rsp::hex(b"why")));
            assert!(
                String::from_utf8(rsp::bytes(&why[1..]))
                    .unwrap()
                    .contains("0x77"),
                "{why}"
            );
            assert_eq!(client.receive().as_deref(), Some("OK"));
            // Nothing can be changed.
            let all = client.registers();
            assert!(client.ask(&format!("G{}", rsp::hex(&all))).starts_with('E'));
            assert!(
                client
                    .write(address("DEBUG_WATCHED"), &[1])
                    .starts_with('E')
            );
            assert!(client.ask(&format!("Z0,{rip:x},1")).starts_with('E'));
            // And the guest does not go on.
            assert_eq!(client.go(), "X0b");
        },
        || sandbox.debug_post_mortem(listener).unwrap(),
    );
    sandbox.restore(&before).unwrap();
    assert_eq!(
        sandbox.call::<u64>("calculate", (5_u64, 2_u64)).unwrap(),
        17
    );
}

#[test]
fn mappings_are_seen() {
    let (mut sandbox, at) = debugged();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let bytes: Vec<u8> = (0..10_000_u32).map(|n| n as u8 ^ (n >> 8) as u8).collect();
    std::fs::write(&path, &bytes).unwrap();
    let mapped = sandbox
        .map_file(&path, skerry_sandbox::MapMode::CopyOnWrite)
        .unwrap();
    with(
        at,
        |mut client| {
            assert_eq!(client.read(mapped.address + 4000, 200), bytes[4000..4200]);
            assert_eq!(client.read(mapped.address + 9990, 20)[..10], bytes[9990..]);
            assert_eq!(client.write(mapped.address + 8190, b"abcd"), "OK");
            assert_eq!(client.read(mapped.address + 8189, 6)[1..5], *b"abcd");
            client.ask("D");
        },
        || assert_eq!(sandbox.call::<u64>("watched", ()).unwrap(), 0),
    );
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

/// A generator that needs no seed of anybody's (Marsaglia's xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number that is often at an edge.
    fn edge(&mut self) -> u64 {
        let edges = [
            0,
            1,
            0x1000,
            0x20_0000,
            0x4000_0000,
            0xffff_f000,
            1 << 47,
            u64::MAX,
        ];
        let edge = edges[self.next() as usize % edges.len()];
        match self.next() % 3 {
            0 => edge.wrapping_add(self.next() % 32).wrapping_sub(16),
            1 => edge,
            _ => self.next() >> (self.next() % 64),
        }
    }

    fn packet(&mut self) -> String {
        let (a, b) = (self.edge(), self.edge());
        let bytes: Vec<u8> = (0..self.next() % 40).map(|_| self.next() as u8).collect();
        let data = rsp::hex(&bytes);
        match self.next() % 14 {
            0 => format!("m{a:x},{b:x}"),
            1 => format!("m{a:x},{:x}", b % 0x1000),
            2 => format!("M{a:x},{:x}:{data}", bytes.len()),
            3 => format!("M{a:x},{b:x}:{data}"),
            4 => format!("Z{},{a:x},{b:x}", self.next() % 6),
            5 => format!("Z{},{a:x},{:x}", self.next() % 5, b % 9),
            6 => format!("z{},{a:x},{:x}", self.next() % 5, b % 9),
            7 => format!("G{data}"),
            8 => format!(
                "G{}",
                rsp::hex(&(0..536).map(|_| self.next() as u8).collect::<Vec<_>>())
            ),
            9 => format!("p{a:x}"),
            10 => format!("P{a:x}={data}"),
            11 => format!("qXfer:auxv:read::{a:x},{b:x}"),
            12 => format!("qRcmd,{data}"),
            _ => [
                "g", "?", "qOffsets", "qC", "vCont?", "vCont;s", "D", "k", "s", "!",
            ][self.next() as usize % 10]
                .to_owned(),
        }
    }
}

#[test]
fn what_makes_no_sense_ends_the_session_and_nothing_else() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut sandbox = builder().build().unwrap();
    let fresh = sandbox.snapshot().unwrap();
    for round in 0..200 {
        let (listener, at) = listen();
        sandbox.debug(listener);
        let seed = random.next();
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut random = Random(seed);
                let mut client = Client::connect(at);
                for _ in 0..20 {
                    if round % 4 == 0 {
                        let bytes: Vec<u8> = (0..200).map(|_| random.next() as u8).collect();
                        client.raw(&bytes);
                    } else {
                        client.send(&random.packet());
                    }
                }
            });
            // Whatever comes of it: registers may be others, the debugger may have killed it.
            let _ = sandbox.call::<u64>("calculate", (1_u64, 2_u64));
        });
        sandbox.restore(&fresh).unwrap();
    }
    let (listener, _) = listen();
    sandbox.debug(listener);
    let mut sandbox = Sandbox::from_snapshot(&fresh, &Default::default()).unwrap();
    assert_eq!(
        sandbox.call::<u64>("calculate", (5_u64, 2_u64)).unwrap(),
        17
    );
}

/// Runs gdb; `None` where it isn't installed.
fn gdb(commands: &[&str]) -> Option<String> {
    let mut gdb = Command::new("gdb");
    gdb.args([
        "-batch",
        "-nx",
        "-ex",
        "set pagination off",
        "-ex",
        "set confirm off",
    ]);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    match gdb.output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            Some(text + &String::from_utf8_lossy(&output.stderr))
        }
        Err(error) => {
            println!("skipped: gdb doesn't run here: {error}");
            None
        }
    }
}

#[test]
fn gdb_debugs_a_guest() {
    if gdb(&["show version"]).is_none() || !hardware(&builder().build().unwrap()) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("gdb.sock");
    let listener = DebugListener::unix(&socket).unwrap();
    let file = format!("file {}", program().display());
    let remote = format!("target remote {}", socket.display());
    let text = thread::scope(|scope| {
        let debugger = scope.spawn(|| {
            gdb(&[
                &file,
                &remote,
                "set language c",
                "printf \"entry %d\\n\", $pc == (unsigned long)&_start",
                "break debug_leaf",
                "continue",
                "backtrace",
                "printf \"rdi %lu\\n\", $rdi",
                "delete",
                "watch *(unsigned long*)&DEBUG_WATCHED",
                "continue",
                "delete",
                "hbreak debug_inner",
                "continue",
                "stepi",
                "info registers rip xmm0 st0",
                "continue",
                "backtrace",
                "continue",
            ])
            .unwrap()
        });
        let mut sandbox = builder().gdb(listener).build().unwrap();
        sandbox.call::<u64>("calculate", (41_u64, 2_u64)).unwrap();
        sandbox.call::<u64>("calculate", (43_u64, 2_u64)).unwrap();
        let error = sandbox.call::<u64>("crash", (0x99_u64,)).unwrap_err();
        assert!(matches!(error, CallError::Fault(_)), "{error}");
        drop(sandbox);
        debugger.join().unwrap()
    });
    println!("{text}");
    for wanted in [
        "entry 1",
        "Breakpoint 1, ",
        "rdi 41",
        "Hardware watchpoint 2: *(unsigned long*)&DEBUG_WATCHED",
        "New value = 43",
        "debug_inner () at ",
        "Program received signal SIGSEGV",
        "in debug_outer",
        "[Inferior 1 (process 1) exited normally]",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in:\n{text}");
    }
}

#[test]
fn a_crash_leaves_a_core_dump_that_gdb_reads() {
    let folder = tempfile::tempdir().unwrap();
    let mut sandbox = builder().core_dumps(folder.path()).build().unwrap();
    let heap: u64 = 1 << 20;
    // On demand, of a guest that is well: nothing changes.
    let well = folder.path().join("well");
    sandbox.core_dump(&well).unwrap();
    assert_eq!(
        sandbox.call::<u64>("calculate", (5_u64, 2_u64)).unwrap(),
        17
    );
    assert!(sandbox.core_dump(&well).is_err(), "no file is overwritten");
    assert_eq!(sandbox.last_core_dump(), None);
    sandbox.call::<u64>("crash", (0x66_u64,)).unwrap_err();
    let path = sandbox.last_core_dump().unwrap().to_owned();
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.len() > heap && metadata.blocks() * 512 < heap);
    let core = std::fs::read(&path).unwrap();
    let core = object::File::parse(&*core).unwrap();
    let segments: Vec<_> = object::Object::segments(&core).collect();
    let text = address("debug_target");
    use object::ObjectSegment;
    let code = segments.iter().find_map(|s| s.data_range(text, 16).ok()?);
    let mut live = [0; 16];
    let program = std::fs::read(program()).unwrap();
    let program = object::File::parse(&*program).unwrap();
    let of_file = object::Object::segments(&program).find_map(|s| s.data_range(text, 16).ok()?);
    live.copy_from_slice(of_file.unwrap());
    assert_eq!(code.unwrap(), live);
    let file = self::program();
    let arguments = [
        format!("file {}", file.display()),
        format!("core-file {}", path.display()),
    ];
    let commands = [
        &arguments[0],
        &arguments[1],
        "backtrace",
        "info registers rdi",
        "info auxv",
    ];
    let Some(text) = gdb(&commands) else {
        return;
    };
    println!("{text}");
    for wanted in [
        "Program terminated with signal SIGSEGV",
        "debug_inner () at ",
        "in debug_outer () at ",
        "in crash () at ",
        "in _start ()",
        "0x66",
        "AT_ENTRY",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in:\n{text}");
    }
}

/// The guest as a program that can be anywhere.
fn movable() -> PathBuf {
    let manifest = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = manifest.join("../../guest/sandbox-rt/Cargo.toml");
    let target = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("sandbox-guests-pie");
    let status = Command::new(env!("CARGO"))
        .args(["rustc", "--quiet", "--release", "--locked"])
        .args(["-p", "sandbox-debugguest", "--manifest-path"])
        .arg(&manifest)
        .arg("--target-dir")
        .arg(&target)
        .args(["--", "-C", "link-arg=-static-pie"])
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        .status()
        .expect("cargo runs");
    assert!(status.success(), "the guest doesn't build");
    target.join("release/sandbox-debugguest")
}

#[test]
fn gdb_finds_a_program_that_was_moved() {
    if gdb(&["show version"]).is_none() {
        return;
    }
    let program = movable();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("gdb.sock");
    let listener = DebugListener::unix(&socket).unwrap();
    let file = format!("file {}", program.display());
    let remote = format!("target remote {}", socket.display());
    let mut path = PathBuf::new();
    let live = thread::scope(|scope| {
        let debugger = scope.spawn(|| {
            let commands = [
                &file,
                &remote,
                "break debug_leaf",
                "continue",
                "backtrace",
                "detach",
            ];
            gdb(&commands).unwrap()
        });
        let builder = Sandbox::builder()
            .guest(program.as_path())
            .backend(crate::backend());
        let made = builder.core_dumps(folder.path()).gdb(listener).build();
        let mut sandbox = made.unwrap();
        sandbox.call::<u64>("calculate", (1_u64, 2_u64)).unwrap();
        sandbox.call::<u64>("crash", (0x66_u64,)).unwrap_err();
        path.push(sandbox.last_core_dump().unwrap());
        debugger.join().unwrap()
    });
    let core = format!("core-file {}", path.display());
    let dead = gdb(&[&file, &core, "backtrace"]).unwrap();
    println!("{live}\n{dead}");
    for wanted in ["Breakpoint 1, ", "in debug_target () at ", "in _start ()"] {
        assert!(live.contains(wanted), "{wanted:?} is not in:\n{live}");
    }
    for wanted in [
        "debug_inner () at ",
        "in debug_outer () at ",
        "in _start ()",
    ] {
        assert!(dead.contains(wanted), "{wanted:?} is not in:\n{dead}");
    }
}
