//! The committed agent as PID 1 under the committed kernel, in QEMU's TCG, over a virtio port.
//!
//!     cargo test -p skerry-agent --test pid1 -- --ignored
//!
//! Needs qemu-system-x86_64, mkfs.erofs and mkfs.ext4 (Debian: qemu-system-x86, erofs-utils, e2fsprogs).

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use skerry_protocol::host::{Control, ExecSession};
use skerry_protocol::message::{
    BlockDevice, ExecRequest, ExitStatus, RootSpec, Setup, ShutdownMode, Upper, WinSize,
};
use skerry_protocol::mux::{Mux, Side};
use skerry_protocol::{CONTROL_PORT, EXEC_PORT};

/// A guest with the demo image as its root.
struct Guest {
    monitor: Child,
    mux: Mux,
    control: Control<UnixStream>,
    directory: tempfile::TempDir,
}

fn committed(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

fn tool(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A "newc" archive with the agent alone: no device nodes, no directories.
fn initrd() -> Vec<u8> {
    let mut archive = Vec::new();
    let mut entry = |name: &str, mode: u32, data: &[u8]| {
        let fields = [
            1,
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        archive.extend_from_slice(b"070701");
        for field in fields {
            archive.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    };
    entry(
        "init",
        0o100_755,
        &std::fs::read(committed("agent/agent-x86_64")).unwrap(),
    );
    entry("TRAILER!!!", 0, &[]);
    archive
}

/// Unpacks the demo image and makes an EROFS of it.
fn root_image(directory: &Path) -> PathBuf {
    let layout = directory.join("layout");
    let root = directory.join("root");
    std::fs::create_dir_all(&layout).unwrap();
    std::fs::create_dir_all(&root).unwrap();
    let demo = committed("demo/demo.oci.tar");
    tool(
        "tar",
        &[
            "-xf",
            demo.to_str().unwrap(),
            "-C",
            layout.to_str().unwrap(),
        ],
    );
    for blob in std::fs::read_dir(layout.join("blobs/sha256")).unwrap() {
        let path = blob.unwrap().path();
        if std::fs::read(&path).unwrap().starts_with(&[0x1f, 0x8b]) {
            tool(
                "tar",
                &["-xzf", path.to_str().unwrap(), "-C", root.to_str().unwrap()],
            );
        }
    }
    let image = directory.join("root.erofs");
    tool(
        "mkfs.erofs",
        &["--quiet", image.to_str().unwrap(), root.to_str().unwrap()],
    );
    image
}

impl Guest {
    fn start(upper: Upper, env: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("initrd"), initrd()).unwrap();
        let root = root_image(directory.path());
        std::fs::File::create(path("scratch"))
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
        tool("mkfs.ext4", &["-q", "-F", &path("scratch")]);
        let listener = UnixListener::bind(path("port")).unwrap();
        let log = std::fs::File::create(path("log")).unwrap();
        let kernel = committed("kernel/bzImage-x86_64");
        let monitor = Command::new("qemu-system-x86_64")
            .args([
                "-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "512",
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
            ])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))])
            .args(["-serial", "stdio", "-kernel", kernel.to_str().unwrap()])
            .args(["-initrd", &path("initrd")])
            .args(["-append", "console=ttyS0 panic=-1 skerry.transport=console"])
            .args(["-chardev", &format!("socket,id=port,path={}", path("port"))])
            .args(["-device", "virtio-serial-pci"])
            .args(["-device", "virtserialport,chardev=port,name=skerry.agent"])
            .args([
                "-drive",
                &format!(
                    "id=r,if=none,format=raw,readonly=on,file={}",
                    root.display()
                ),
            ])
            .args(["-device", "virtio-blk-pci,drive=r,serial=root"])
            .args([
                "-drive",
                &format!("id=s,if=none,format=raw,file={}", path("scratch")),
            ])
            .args(["-device", "virtio-blk-pci,drive=s,serial=scratch"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("qemu-system-x86_64");
        let (stream, _) = listener.accept().unwrap();
        let mux = Mux::start(stream, Side::Host).unwrap();
        let stream = mux.accept(CONTROL_PORT).unwrap_or_else(|error| {
            panic!("{error}: {}", std::fs::read_to_string(path("log")).unwrap())
        });
        let mut control = Control::accept(stream).unwrap();
        let setup = Setup {
            root: RootSpec::Image {
                device: BlockDevice::Serial("root".to_owned()),
                fs_type: "erofs".to_owned(),
                upper,
            },
            hostname: "testbox".to_owned(),
            nameservers: vec!["192.0.2.1".to_owned()],
            env: env
                .iter()
                .map(|(name, value)| ((*name).into(), (*value).into()))
                .collect(),
            entropy: vec![0x5a; 64],
            wall_clock: 2_000_000_000_000_000_000,
            ..Setup::default()
        };
        control.set_up(&setup).unwrap_or_else(|error| {
            panic!("{error}: {}", std::fs::read_to_string(path("log")).unwrap())
        });
        Self {
            monitor,
            mux,
            control,
            directory,
        }
    }

    fn exec(&self, request: ExecRequest) -> ExecSession<UnixStream> {
        ExecSession::start(self.mux.connect(EXEC_PORT).unwrap(), request).unwrap()
    }

    /// Status, output and errors of a shell script.
    fn sh(&self, script: &str) -> (u8, String, String) {
        self.run(ExecRequest::new(["sh", "-c", script]))
    }

    fn run(&self, request: ExecRequest) -> (u8, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let status = self
            .exec(request)
            .wait(&mut out, &mut err)
            .unwrap_or_else(|error| panic!("{error}: {}", self.log()));
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.shell_code(), text(out), text(err))
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// Powers the guest off and waits for its end.
    fn power_off(mut self) -> String {
        self.control.shut_down(ShutdownMode::PowerOff).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.monitor.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "still on: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        self.log()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Fails when it has ended, as it should have.
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64, mkfs.erofs and mkfs.ext4"]
fn a_guest_boots_runs_commands_and_powers_off() {
    let mut guest = Guest::start(Upper::Tmpfs { size: 0 }, &[("FROM_SETUP", "yes")]);
    let (code, out, err) = guest.sh("echo hello; echo $FROM_SETUP >&2; exit 42");
    assert_eq!((code, out.as_str(), err.as_str()), (42, "hello\n", "yes\n"));

    // Names, mounts, links.
    assert_eq!(
        guest.sh("hostname; cat /etc/hostname").1,
        "testbox\ntestbox\n"
    );
    assert_eq!(guest.sh("cat /etc/resolv.conf").1, "nameserver 192.0.2.1\n");
    assert_eq!(guest.sh("grep -c testbox /etc/hosts").1, "2\n");
    let mounts = guest.sh("cat /proc/mounts").1;
    for mount in [
        "overlay / overlay",
        "proc /proc proc",
        "sysfs /sys sysfs",
        "cgroup2 /sys/fs/cgroup cgroup2",
        "devtmpfs /dev devtmpfs",
        "devpts /dev/pts devpts",
        "tmpfs /dev/shm tmpfs",
        "mqueue /dev/mqueue mqueue",
    ] {
        assert!(mounts.contains(mount), "{mount} is not in:\n{mounts}");
    }
    assert_eq!(
        guest.sh("echo x | cat /dev/stdin; ls /dev/fd | head -1").1,
        "x\n0\n"
    );
    assert_eq!(guest.sh("stat -c %a /tmp /root").1, "1777\n700\n");
    assert_eq!(guest.sh("cat /proc/sys/kernel/modules_disabled").1, "1\n");
    assert_eq!(
        guest.sh("ping -c 1 127.0.0.1 > /dev/null && echo up").1,
        "up\n"
    );
    assert_eq!(guest.sh("date -u +%Y").1, "2033\n");
    assert_eq!(guest.sh("ulimit -n; ulimit -Hn").1, "1024\n524288\n");

    // Users and files.
    let request = ExecRequest {
        user: "demo".to_owned(),
        cwd: b"/home/demo".to_vec(),
        ..ExecRequest::new([
            "sh",
            "-c",
            "id; pwd; echo $HOME; touch a && ls; touch /etc/x",
        ])
    };
    let (code, out, err) = guest.run(request);
    let expected = "uid=1000(demo) gid=1000(demo) groups=100(users),1000(demo)\n";
    assert_eq!(out, format!("{expected}/home/demo\n/home/demo\na\n"));
    assert!(
        code == 1 && err.contains("Permission denied"),
        "{code} {err}"
    );
    let request = ExecRequest {
        cwd: b"/work/new".to_vec(),
        ..ExecRequest::new(["pwd"])
    };
    assert_eq!(guest.run(request).1, "/work/new\n");

    // Signals and orphans.
    assert_eq!(guest.sh("kill -9 $$").0, 137);
    assert_eq!(
        guest
            .sh("for i in $(seq 50); do (sleep 0.05 &) ; done; echo")
            .0,
        0
    );
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(guest.sh("ps -o stat= | grep -c Z").1, "0\n");

    guest.control.ping().unwrap();
    guest.control.set_clock(1_000_000_000_000_000_000).unwrap();
    guest.control.reseed(&[7; 300]).unwrap();
    assert_eq!(guest.sh("date -u +%Y").1, "2001\n");
    let log = guest.power_off();
    assert!(log.contains("Power down"), "{log}");
}

#[test]
#[ignore = "needs qemu-system-x86_64, mkfs.erofs and mkfs.ext4"]
fn data_terminals_and_disks_work_inside_a_guest() {
    let disk = BlockDevice::Serial("scratch".to_owned());
    let guest = Guest::start(Upper::Ext4(disk), &[]);
    assert_eq!(guest.sh("echo kept > /file; sync; cat /file").1, "kept\n");

    let data: Vec<u8> = (0..10_000_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let request = ExecRequest {
        stdin: true,
        ..ExecRequest::new(["cat"])
    };
    let session = guest.exec(request);
    session.pump_stdin(io::Cursor::new(data.clone())).unwrap();
    let mut out = Vec::new();
    assert_eq!(
        session.wait(&mut out, &mut io::sink()).unwrap(),
        ExitStatus::Code(0)
    );
    assert!(out == data, "{} bytes of {}", out.len(), data.len());

    let size = WinSize {
        rows: 33,
        cols: 99,
        ..WinSize::default()
    };
    let request = ExecRequest {
        tty: Some(size),
        stdin: true,
        user: "demo".to_owned(),
        ..ExecRequest::new([
            "sh",
            "-c",
            "stty size; tty; read line; echo got $line > /dev/tty",
        ])
    };
    let session = guest.exec(request);
    session.stdin().unwrap().write_all(b"text\n").unwrap();
    let mut out = Vec::new();
    session.wait(&mut out, &mut io::sink()).unwrap();
    let text = String::from_utf8(out).unwrap();
    assert!(
        text.contains("33 99\r\n") && text.contains("/dev/pts/0\r\n"),
        "{text}"
    );
    assert!(text.contains("got text\r\n"), "{text}");
    drop(guest.power_off());
}

#[test]
#[ignore = "needs qemu-system-x86_64, mkfs.erofs and mkfs.ext4"]
fn a_read_only_root_takes_no_writes() {
    let guest = Guest::start(Upper::ReadOnly, &[]);
    let (code, _, err) = guest.sh("touch /file");
    assert!(code != 0 && err.contains("Read-only"), "{err}");
    assert_eq!(
        guest
            .sh("cat /etc/hostname; touch /dev/shm/x && echo yes")
            .1,
        "testbox\nyes\n"
    );
    drop(guest.power_off());
}

/// What a workload that counts has counted to.
fn count(guest: &Guest) -> u64 {
    let text = guest.sh("cat /tmp/count").1;
    text.trim().parse().unwrap()
}

#[test]
#[ignore = "needs qemu-system-x86_64, mkfs.erofs and mkfs.ext4"]
fn processes_stand_still_between_freeze_and_thaw_and_clones_learn_of_it_first() {
    let mut guest = Guest::start(Upper::Tmpfs { size: 0 }, &[]);
    // All live in a cgroup that they see as the root, and may make others below it.
    assert_eq!(guest.sh("cat /proc/self/cgroup").1, "0::/\n");
    let script = "cd /sys/fs/cgroup; mkdir a && echo $$ > a/cgroup.procs && cat /proc/self/cgroup; \
                  setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > /tmp/.c; mv /tmp/.c /tmp/count; \
                  done' < /dev/null > /dev/null 2>&1 &";
    assert_eq!(guest.sh(script).1, "0::/a\n");
    assert_eq!(guest.sh("ls /run/skerry").1, "");

    let ticks = ExecRequest::new(["sh", "-c", "while :; do date +%s%N; sleep 0.02; done"]);
    let session = guest.exec(ticks);
    let (sender, ticks) = std::sync::mpsc::channel();
    std::thread::spawn(move || session.wait(&mut Lines(sender), &mut io::sink()));
    ticks.recv().unwrap();
    guest.control.freeze().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    while ticks.try_recv().is_ok() {}
    assert!(ticks.recv_timeout(Duration::from_millis(700)).is_err());
    // A command that comes meanwhile stands still as well, and the agent does not.
    let late = guest.mux.connect(EXEC_PORT).unwrap();
    let late = std::thread::spawn(move || {
        let session = ExecSession::start(late, ExecRequest::new(["true"])).unwrap();
        session.wait(&mut io::sink(), &mut io::sink()).unwrap()
    });
    std::thread::sleep(Duration::from_millis(200));
    guest.control.ping().unwrap();
    assert!(!late.is_finished());
    guest.control.thaw().unwrap();
    ticks.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(late.join().unwrap(), ExitStatus::Code(0));
    let first = count(&guest);
    std::thread::sleep(Duration::from_millis(200));
    assert!(count(&guest) > first);

    // A host that meets the guest anew makes it another, and only then do its processes go on.
    let watch = "while ! [ -e /run/skerry/clone ]; do :; done; hostname; date -u +%Y; \
                 cat /run/skerry/clone";
    let watcher = guest.exec(ExecRequest::new(["sh", "-c", watch]));
    for generation in 1..3u32 {
        guest.control.freeze().unwrap();
        let setup = Setup {
            hostname: format!("clone{generation}"),
            entropy: vec![0xa5; 64],
            wall_clock: 2_500_000_000_000_000_000,
            ..Setup::default()
        };
        guest.control.set_up(&setup).unwrap();
    }
    let mut text = Vec::new();
    watcher.wait(&mut text, &mut io::sink()).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert!(text.starts_with("clone"), "{text}");
    assert!(text.contains("\n2049\ngeneration "), "{text}");
    let text = guest.sh("hostname; cat /run/skerry/clone").1;
    assert!(text.starts_with("clone2\ngeneration 2\nid "), "{text}");

    // A workload that shares out resources leaves no room for commands beside its cgroups.
    // Those that run there have children all the time, so it takes as many rounds as it takes.
    let script = "exec 2> /dev/null; cd /sys/fs/cgroup; mkdir -p b; \
                  until echo +memory > cgroup.subtree_control; do \
                  for p in $(cat cgroup.procs); do echo $p > b/cgroup.procs; done; done; \
                  cat cgroup.subtree_control";
    assert_eq!(guest.sh(script).1, "memory\n");
    assert_eq!(guest.sh("cat /proc/self/cgroup").1, "0::/exec\n");
    guest.control.sync().unwrap();
    guest.control.compact().unwrap();
    drop(guest.power_off());
}

/// Tells of each write.
struct Lines(std::sync::mpsc::Sender<()>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Whoever asked may be gone.
        let _ = self.0.send(());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64, mkfs.erofs and mkfs.ext4"]
fn the_power_button_powers_off() {
    let mut guest = Guest::start(Upper::Tmpfs { size: 0 }, &[]);
    let mut qmp = UnixStream::connect(guest.directory.path().join("qmp")).unwrap();
    qmp.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"system_powerdown\"}")
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while guest.monitor.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "still on: {}", guest.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Not a test of the guest: what a host sees whose guest never says hello.
#[test]
fn a_port_that_closes_before_the_hello_is_an_error() {
    let (host, guest) = UnixStream::pair().unwrap();
    let mux = Mux::start(host, Side::Host).unwrap();
    drop(guest);
    assert!(mux.accept(CONTROL_PORT).is_err());
    let mut nothing = [0; 1];
    assert!(
        mux.connect(EXEC_PORT)
            .and_then(|mut stream| stream.read_exact(&mut nothing))
            .is_err()
    );
}
