//! `skerry boot` on the software processor: kernels, processors, memory, ways to end.

mod common;

use std::path::{Path, PathBuf};

use common::{Ran, run};

/// An initrd made from the host's busybox with this script as `/init`; `None` where the host has
/// no static busybox.
fn initrd(folder: &Path, script: &str) -> Option<PathBuf> {
    use skerry_engine::initrd::{Entry, archive};
    let busybox = std::fs::read("/bin/busybox").ok()?;
    let script = format!(
        "#!/bin/busybox sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\n\
         mount -t proc proc /proc\nmount -t devtmpfs dev /dev\n{script}\npoweroff -f\n"
    );
    let path = folder.join("initrd");
    let bytes = archive(&[
        Entry::folder("dev"),
        Entry::console(),
        Entry::folder("proc"),
        Entry::folder("bin"),
        Entry::program("bin/busybox", &busybox),
        Entry::program("init", script.as_bytes()),
    ]);
    std::fs::write(&path, bytes).expect("initrd");
    Some(path)
}

/// Boots the built-in kernel with a script; `None` (said on stderr) without busybox.
fn boot(script: &str, options: &[&str]) -> Option<Ran> {
    let folder = tempfile::tempdir().expect("folder");
    let Some(initrd) = initrd(folder.path(), script) else {
        eprintln!("skipped: no /bin/busybox on this host (package busybox-static)");
        return None;
    };
    let mut args = vec!["boot", "--hypervisor", "soft", "--timeout", "300"];
    args.extend(["--initrd", initrd.to_str().expect("UTF-8")]);
    args.extend(options);
    Some(run(&args))
}

#[test]
fn boots_to_a_script_and_powers_off() {
    for cpus in ["1", "2"] {
        let Some(ran) = boot("echo BOOT-OK $(nproc)", &["--cpus", cpus]) else {
            return;
        };
        assert_eq!(ran.status, 0, "{}\n{}", ran.text(), ran.stderr);
        assert!(
            ran.text().contains(&format!("BOOT-OK {cpus}")),
            "{}",
            ran.text()
        );
    }
}

#[test]
fn boots_in_every_mode() {
    for mode in ["interpreter", "jit", "jit-stress"] {
        let script = "seq 1 2000 | sha256sum; echo BOOT-OK $(nproc)";
        let options = ["--cpus", "2", "--soft-mode", mode, "--stats"];
        let Some(ran) = boot(script, &options) else {
            return;
        };
        let text = ran.text();
        assert_eq!(ran.status, 0, "{mode}: {text}\n{}", ran.stderr);
        // As `sha256sum` has it of the same numbers anywhere.
        let sum = "6251e5743b6fd6a7d606130bdf7c1507";
        assert!(
            text.contains(sum) && text.contains("BOOT-OK 2"),
            "{mode}: {text}"
        );
        let told = format!("ran on soft ({mode},");
        assert!(ran.stderr.contains(&told), "{}", ran.stderr);
    }
}

#[test]
fn memory_on_both_sides_of_the_hole() {
    let script = "grep MemTotal /proc/meminfo; mount -t tmpfs -o size=5G tmp /mnt 2>/dev/null";
    let Some(ran) = boot(script, &["--memory", "8G"]) else {
        return;
    };
    let text = ran.text();
    let kib: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|word| word.parse().ok())
        .expect("MemTotal");
    assert!(kib > 7_800 << 10, "{kib} KiB");
}

#[test]
fn a_panic_is_a_crash_with_its_own_status() {
    let Some(ran) = boot("echo c > /proc/sysrq-trigger; sleep 100", &[]) else {
        return;
    };
    assert_eq!(ran.status, 123, "{}\n{}", ran.text(), ran.stderr);
    assert!(ran.stderr.contains("panic"), "{}", ran.stderr);
    assert!(ran.stderr.contains("RIP"), "{}", ran.stderr);
}

#[test]
fn a_reset_ends_it_under_no_reboot() {
    let Some(ran) = boot("reboot -f; sleep 100", &["--no-reboot"]) else {
        return;
    };
    assert_eq!(ran.status, 0, "{}\n{}", ran.text(), ran.stderr);
}

#[test]
fn the_time_limit_ends_it() {
    let Some(ran) = boot("sleep 1000", &["--timeout", "5s"]) else {
        return;
    };
    assert_eq!(ran.status, 124, "{}", ran.stderr);
}

#[test]
fn serial_input_reaches_the_guest() {
    let folder = tempfile::tempdir().expect("folder");
    let Some(initrd) = initrd(folder.path(), "echo name?; read name; echo hello $name") else {
        return;
    };
    let initrd = initrd.to_str().expect("UTF-8");
    let command = common::skerry(&[
        "boot",
        "--hypervisor",
        "soft",
        "--timeout",
        "300",
        "--initrd",
        initrd,
    ]);
    let ran = common::run_with(command, b"heron\n");
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    assert!(ran.text().contains("hello heron"), "{}", ran.text());
}

#[test]
fn disks_are_read_and_written() {
    let folder = tempfile::tempdir().expect("folder");
    let disk = folder.path().join("disk.img");
    let mut bytes = vec![0u8; 1 << 20];
    bytes[..6].copy_from_slice(b"marker");
    std::fs::write(&disk, &bytes).expect("disk");
    let disk = disk.to_str().expect("UTF-8");
    let script =
        "head -c 6 /dev/vda; echo; printf written | dd of=/dev/vda seek=1 2>/dev/null; sync";
    let Some(ran) = boot(script, &["--disk", disk]) else {
        return;
    };
    assert!(ran.text().contains("marker"), "{}", ran.text());
    let after = std::fs::read(disk).expect("disk");
    assert_eq!(&after[512..519], b"written");
    // Read-only: the guest's write fails and the file stays.
    let script = "printf again | dd of=/dev/vda seek=2 2>/dev/null || echo refused";
    let ran = boot(script, &["--disk", &format!("{disk},ro")]).expect("busybox is there");
    assert!(ran.text().contains("refused"), "{}", ran.text());
    assert_eq!(std::fs::read(disk).expect("disk"), after);
}
