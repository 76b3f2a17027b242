use skerry_sandbox::*;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn median(n: usize, mut f: impl FnMut()) -> f64 {
    let mut t: Vec<Duration> = (0..n)
        .map(|_| {
            let s = Instant::now();
            f();
            s.elapsed()
        })
        .collect();
    t.sort();
    t[n / 2].as_nanos() as f64 / 1000.0
}

fn main() {
    let path = std::env::args().nth(1).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let backend: Backend = std::env::args()
        .nth(2)
        .unwrap_or("soft".into())
        .parse()
        .unwrap();
    let mut functions = HostFunctions::new();
    functions.add("host_add", |a: i32, b: i32| a.wrapping_add(b));
    functions.add("host_echo", |bytes: Vec<u8>| bytes);
    functions.add("host_fail", |m: String| Err::<i32, String>(m));
    let build = |heap| {
        Sandbox::builder()
            .guest(&bytes[..])
            .backend(backend)
            .heap(heap)
            .host_functions(&functions)
            .build()
            .unwrap()
    };
    let n = if backend == Backend::Soft { 100 } else { 3 };
    println!(
        "create_elf {:.1}",
        median(n, || {
            let _ = build(1 << 20);
        })
    );
    let mut s = build(1 << 20);
    for _ in 0..n * 20 {
        s.call::<i32>("add", (1, 2)).unwrap();
        s.call::<i32>("call_host", (1, 2)).unwrap();
    }
    println!(
        "call {:.2}",
        median(n * 100, || {
            s.call::<i32>("add", (1, 2)).unwrap();
        })
    );
    println!(
        "host call {:.2}",
        median(n * 100, || {
            s.call::<i32>("call_host", (1, 2)).unwrap();
        })
    );
    let snap = s.snapshot().unwrap();
    println!(
        "snapshot {} KiB; take {:.1}",
        snap.size() / 1024,
        median(n, || {
            s.snapshot().unwrap();
        })
    );
    let f = Arc::new(functions.clone());
    println!(
        "from_snapshot {:.1}",
        median(n * 10, || {
            let _ = Sandbox::from_snapshot_on(&snap, &f, backend).unwrap();
        })
    );
    println!(
        "from_snapshot + call {:.1}",
        median(n * 10, || {
            Sandbox::from_snapshot_on(&snap, &f, backend)
                .unwrap()
                .call::<i32>("add", (1, 2))
                .unwrap();
        })
    );
    for heap in [1 << 20, 1 << 30] {
        let mut s = build(heap);
        s.call::<u64>("dirty_pages", (16u64,)).unwrap();
        let snap = s.snapshot().unwrap();
        let mut t = vec![];
        for _ in 0..n * 5 {
            s.call::<u64>("dirty_pages", (16u64,)).unwrap();
            let b = Instant::now();
            s.restore(&snap).unwrap();
            t.push(b.elapsed());
        }
        t.sort();
        println!("restore {} MiB {:?}", heap >> 20, t[t.len() / 2]);
    }
    if backend != Backend::Soft {
        return;
    }
    let mut t = vec![];
    let snap = s.snapshot().unwrap();
    for _ in 0..n {
        let h = s.interrupt_handle();
        let j = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            let b = Instant::now();
            let _ = h.kill();
            b
        });
        let e = s.call::<()>("spin", ()).unwrap_err();
        let end = Instant::now();
        assert!(matches!(e, CallError::Cancelled));
        t.push(end - j.join().unwrap());
        s.restore(&snap).unwrap();
    }
    t.sort();
    println!("kill {:?}", t[t.len() / 2]);
}
