//! Cancelling: before, during and after a call, in a host function, by many threads; time limits.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use crate::common::{builder, sandbox};
use skerry_sandbox::{CallError, InterruptHandle, Killed, Status};

#[test]
fn with_no_call_active_a_kill_says_so_and_the_next_call_is_not_hit() {
    let mut sandbox = sandbox();
    let handle = sandbox.interrupt_handle();
    assert_eq!(handle.kill(), Killed::NothingActive);
    assert_eq!(handle.current(), None);
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
    assert_eq!(handle.kill(), Killed::NothingActive);
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
    drop(sandbox);
    assert_eq!(handle.kill(), Killed::NothingActive);
}

/// Kills as soon as a call is active.
fn killer(handle: InterruptHandle) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        while handle.kill() == Killed::NothingActive {
            std::thread::yield_now();
        }
    })
}

#[test]
fn a_call_that_spins_is_killed_and_the_sandbox_poisoned_until_restored() {
    let mut sandbox = sandbox();
    let snapshot = sandbox.snapshot().unwrap();
    for _ in 0..20 {
        let thread = killer(sandbox.interrupt_handle());
        let error = sandbox.call::<()>("spin", ()).unwrap_err();
        assert!(matches!(error, CallError::Cancelled), "{error}");
        thread.join().unwrap();
        assert!(matches!(sandbox.status(), Status::Poisoned(_)));
        let error = sandbox.call::<i32>("add", (1, 2)).unwrap_err();
        assert!(matches!(error, CallError::Poisoned(_)), "{error}");
        assert!(sandbox.snapshot().is_err());
        sandbox.restore(&snapshot).unwrap();
        assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
    }
}

#[test]
fn a_kill_meant_for_one_call_never_hits_the_next() {
    let token = Arc::new(Mutex::new(None));
    let seen = token.clone();
    let handle: Arc<Mutex<Option<InterruptHandle>>> = Arc::default();
    let of_call = handle.clone();
    let mut sandbox = builder()
        .host_fn("host_add", move |a: i32, b: i32| {
            let handle = of_call.lock().unwrap();
            *seen.lock().unwrap() = handle.as_ref().and_then(InterruptHandle::current);
            a + b
        })
        .build()
        .unwrap();
    let own = sandbox.interrupt_handle();
    *handle.lock().unwrap() = Some(own.clone());
    assert_eq!(sandbox.call::<i32>("call_host", (1, 2)).unwrap(), 3);
    let old = token.lock().unwrap().take().expect("a call was active");
    assert_eq!(own.kill_call(old), Killed::NothingActive);
    assert_eq!(sandbox.call::<i32>("call_host", (1, 2)).unwrap(), 3);
    let new = token.lock().unwrap().take().unwrap();
    assert_ne!(old, new);
}

#[test]
fn a_kill_during_a_host_function_takes_effect_when_it_returns() {
    let handle: Arc<Mutex<Option<InterruptHandle>>> = Arc::default();
    let of_call = handle.clone();
    let returned = Arc::new(AtomicBool::new(false));
    let done = returned.clone();
    let mut sandbox = builder()
        .host_fn("host_add", move |a: i32, b: i32| {
            let handle = of_call.lock().unwrap();
            if a == 666
                && let Some(handle) = handle.as_ref()
            {
                assert_eq!(handle.kill(), Killed::Call);
                std::thread::sleep(Duration::from_millis(5));
            }
            done.store(true, Ordering::SeqCst);
            a + b
        })
        .build()
        .unwrap();
    *handle.lock().unwrap() = Some(sandbox.interrupt_handle());
    let snapshot = sandbox.snapshot().unwrap();
    let error = sandbox.call::<i32>("call_host", (666, 2)).unwrap_err();
    assert!(matches!(error, CallError::Cancelled), "{error}");
    assert!(returned.load(Ordering::SeqCst));
    sandbox.restore(&snapshot).unwrap();
    assert_eq!(sandbox.call::<i32>("call_host", (1, 2)).unwrap(), 3);
}

#[test]
fn many_threads_may_kill_one_call() {
    let mut sandbox = sandbox();
    let snapshot = sandbox.snapshot().unwrap();
    for _ in 0..10 {
        let start = Arc::new(Barrier::new(5));
        let hit = Arc::new(AtomicU64::new(0));
        let done = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (handle, start) = (sandbox.interrupt_handle(), start.clone());
                let (hit, done) = (hit.clone(), done.clone());
                std::thread::spawn(move || {
                    start.wait();
                    while !done.load(Ordering::SeqCst) {
                        if handle.kill() == Killed::Call {
                            hit.fetch_add(1, Ordering::Relaxed);
                        }
                        std::thread::yield_now();
                    }
                })
            })
            .collect();
        start.wait();
        let error = sandbox.call::<()>("spin", ()).unwrap_err();
        done.store(true, Ordering::SeqCst);
        assert!(matches!(error, CallError::Cancelled), "{error}");
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(hit.load(Ordering::Relaxed) > 0);
        sandbox.restore(&snapshot).unwrap();
        assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
    }
}

/// Calls while another thread kills at random: each call ends with its value or as cancelled, and after
/// each a restored sandbox works. `SKERRY_TEST_KILLS=100000` is the long form.
#[test]
fn kills_at_any_moment() {
    let short = match crate::backend() {
        skerry_sandbox::Backend::Kvm => 300,
        _ => 3000,
    };
    let kills: u64 = std::env::var("SKERRY_TEST_KILLS").map_or(short, |n| n.parse().unwrap());
    let mut sandbox = sandbox();
    let snapshot = sandbox.snapshot().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let sent = Arc::new(AtomicU64::new(0));
    let thread = {
        let (handle, stop, sent) = (sandbox.interrupt_handle(), stop.clone(), sent.clone());
        std::thread::spawn(move || {
            let mut n = 1_u64;
            while !stop.load(Ordering::Relaxed) {
                n = n
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                for _ in 0..n >> 54 {
                    std::hint::spin_loop();
                }
                if handle.kill() == Killed::Call {
                    sent.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::yield_now();
            }
        })
    };
    let mut cancelled = 0;
    let mut n = 0_i32;
    while cancelled < kills {
        n = n.wrapping_add(1);
        let ended = match n % 3 {
            0 => sandbox.call::<i32>("add", (n, 1)),
            1 => sandbox.call::<i32>("call_host", (n, 1)),
            _ => sandbox
                .call::<u64>("work", (n as u64 % 2000,))
                .map(|_| n.wrapping_add(1)),
        };
        match ended {
            Ok(value) => assert_eq!(value, n.wrapping_add(1)),
            Err(CallError::Cancelled) => {
                cancelled += 1;
                sandbox.restore(&snapshot).unwrap();
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    stop.store(true, Ordering::Relaxed);
    thread.join().unwrap();
    assert!(sent.load(Ordering::Relaxed) >= cancelled);
}

#[test]
fn a_call_ends_at_its_time_limit() {
    let limit = Duration::from_millis(30);
    let mut sandbox = builder().call_timeout(limit).build().unwrap();
    let snapshot = sandbox.snapshot().unwrap();
    for _ in 0..3 {
        let started = Instant::now();
        let error = sandbox.call::<()>("spin", ()).unwrap_err();
        assert!(
            matches!(error, CallError::TimedOut(told) if told == limit),
            "{error}"
        );
        assert!(started.elapsed() >= limit);
        assert!(started.elapsed() < limit * 20, "{:?}", started.elapsed());
        sandbox.restore(&snapshot).unwrap();
        // A short call after it is not hit by what was left of the limit.
        for _ in 0..100 {
            assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
        }
    }
    sandbox.set_call_timeout(None).unwrap();
    assert!(sandbox.call::<u64>("work", (100_000_u64,)).is_ok());
}

#[test]
fn processor_time_is_limited_and_waiting_is_not_counted() {
    let limit = Duration::from_millis(30);
    let mut sandbox = builder()
        .call_cpu_time(limit)
        .host_fn("host_add", |a: i32, b: i32| {
            std::thread::sleep(Duration::from_millis(100));
            a + b
        })
        .build()
        .unwrap();
    let snapshot = sandbox.snapshot().unwrap();
    assert_eq!(sandbox.call::<i32>("call_host", (1, 2)).unwrap(), 3);
    let error = sandbox.call::<()>("spin", ()).unwrap_err();
    assert!(
        matches!(error, CallError::CpuTime(told) if told == limit),
        "{error}"
    );
    sandbox.restore(&snapshot).unwrap();
    assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
}

#[test]
fn limits_of_many_sandboxes_hold_at_once() {
    let threads: Vec<_> = (1..=8_u64)
        .map(|n| {
            std::thread::spawn(move || {
                let limit = Duration::from_millis(10 * n);
                let mut sandbox = builder().call_timeout(limit).build().unwrap();
                let started = Instant::now();
                let error = sandbox.call::<()>("spin", ()).unwrap_err();
                assert!(matches!(error, CallError::TimedOut(_)), "{error}");
                assert!(started.elapsed() >= limit);
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_guest_that_never_gets_ready_is_given_up() {
    let started = Instant::now();
    let error = builder()
        .init_timeout(Duration::from_nanos(1))
        .build()
        .unwrap_err();
    assert!(error.to_string().contains("initialised"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn instructions_are_limited_and_counted() {
    const LIMIT: u64 = 100_000;
    let made = builder().call_instructions(LIMIT).build();
    if crate::backend() == skerry_sandbox::Backend::Kvm {
        assert!(matches!(made, Err(skerry_sandbox::BuildError::Budget(_))));
        return;
    }
    let mut sandbox = made.unwrap();
    let snapshot = sandbox.snapshot().unwrap();
    for _ in 0..50 {
        let before = sandbox.instructions().unwrap();
        assert_eq!(sandbox.call::<i32>("add", (1, 2)).unwrap(), 3);
        let add = sandbox.instructions().unwrap() - before;
        assert!((20..600).contains(&add), "{add}");
        let before = sandbox.instructions().unwrap();
        let error = sandbox.call::<()>("spin", ()).unwrap_err();
        assert!(matches!(error, CallError::BudgetSpent(LIMIT)), "{error}");
        let spent = sandbox.instructions().unwrap() - before;
        assert!((LIMIT..LIMIT + 8192).contains(&spent), "{spent}");
        sandbox.restore(&snapshot).unwrap();
    }
    // A budget that is not spent is not carried over.
    for _ in 0..1000 {
        assert!(sandbox.call::<u64>("work", (1000_u64,)).is_ok());
    }
    sandbox.set_call_instructions(None).unwrap();
    assert!(sandbox.call::<u64>("work", (200_000_u64,)).is_ok());
}

/// What the issue promises of a call's cost, wherever it runs.
#[test]
fn a_call_takes_few_instructions() {
    if crate::backend() == skerry_sandbox::Backend::Kvm {
        return;
    }
    let mut sandbox = builder().call_instructions(u64::MAX).build().unwrap();
    let mut count = |name: &str| {
        let mut last = 0;
        // Cold, interpreted, compiled: it is the same number.
        for n in 0..3000 {
            let before = sandbox.instructions().unwrap();
            assert_eq!(sandbox.call::<i32>(name, (n, 2)).unwrap(), n + 2);
            last = sandbox.instructions().unwrap() - before;
        }
        last
    };
    let (plain, with_host) = (count("add"), count("call_host"));
    println!("a call {plain} instructions, one with a host call {with_host}");
    assert!(plain < 600, "{plain}");
    assert!(with_host - plain < 500, "{with_host} - {plain}");
}
