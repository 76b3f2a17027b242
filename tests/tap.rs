//! A machine on a network of the host's, by a TAP device: in a network namespace of the test's own, which
//! takes the right to make one, and is skipped by name without.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use common::home::Home;
use common::{eventually, hex, noise};
use serde_json::Value;
use sha2::{Digest, Sha256};

const INNER: &str = "in_a_namespace_of_its_own";
const TAP: &str = "tap=tap0,ip=10.1.0.2/24,gateway=10.1.0.1,ip=fd01::2/64,gateway=fd01::1";

fn succeeds(words: &[&str]) -> bool {
    let (program, args) = words.split_first().expect("a program");
    let mut command = Command::new(program);
    command
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[test]
fn a_machine_is_on_a_network_of_the_hosts() {
    let namespace = [
        "unshare", "--net", "ip", "tuntap", "add", "dev", "t", "mode", "tap",
    ];
    if !succeeds(&namespace) {
        eprintln!("skipped: no right to a network namespace, or no TAP devices or ip(8) here");
        return;
    }
    let inner = Command::new("unshare")
        .arg("--net")
        .arg(std::env::current_exe().expect("the test's own path"))
        .args(["--exact", INNER, "--ignored", "--nocapture"])
        .status();
    assert!(inner.expect("unshare").success());
}

#[test]
fn what_is_no_device_of_the_users_is_refused_with_a_remedy() {
    let home = Home::empty();
    let run = |network: &str, more: &[&str]| {
        let args = ["run", "--hypervisor", "soft", "--network", network];
        [&args[..], more, &["demo", "true"]]
            .concat()
            .iter()
            .map(|&word| word.to_owned())
            .collect::<Vec<String>>()
    };
    let refused = |network: &str, more: &[&str], names: &[&str]| {
        let args = run(network, more);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        home.refused(&args, names);
    };
    refused(
        "tap=skerry-none",
        &[],
        &["no TAP device skerry-none", "ip tuntap add"],
    );
    let twice = ["--network", "tap=two"];
    refused("tap=one", &twice, &["one network card"]);
    for (bad, why) in [
        ("tap=", "no name of a TAP device"),
        ("tap=a,ip=10.1.0.2", "with a prefix"),
        ("tap=a,ip=10.1.0.2/24,gateway=10.2.0.1", "gateway 10.2.0.1"),
        ("tap=a,mac=01:00:00:00:00:00", "one network card"),
        ("tap=a,mtu=9000", "nothing of a TAP device's"),
    ] {
        let ran = home.run(&["run", "--network", bad, "demo", "true"]);
        assert_eq!(ran.status, 125, "{bad}");
        assert!(ran.stderr.contains(why), "{bad}: {}", ran.stderr);
    }
}

fn ip(words: &str) {
    let words: Vec<&str> = ["ip"].into_iter().chain(words.split(' ')).collect();
    assert!(succeeds(&words), "{words:?}");
}

fn inspected(home: &Home, name: &str) -> Value {
    let text = home.done(&["inspect", "--sample", "1ms", name]);
    serde_json::from_str(&text).expect("JSON")
}

#[test]
#[ignore = "another test runs it where nobody else's devices are"]
fn in_a_namespace_of_its_own() {
    ip("link set lo up");
    for (device, address) in [("tap0", "10.1.0.1/24"), ("tap1", "10.2.0.1/24")] {
        ip(&format!("tuntap add dev {device} mode tap"));
        ip(&format!("addr add {address} dev {device}"));
        ip(&format!("link set {device} up"));
    }
    ip("addr add fd01::1/64 dev tap0 nodad");
    ip("link set tap1 mtu 9000");
    let home = Home::new();
    let program = home.guest_program("connections");
    home.start_with(
        "one",
        &["--network", TAP, "-v", &program],
        &["sleep", "1000"],
    );
    the_guest_knows_its_place(&home);
    transfers_pass_both_ways(&home);
    datagrams_pass_both_ways(&home);
    others_are_refused(&home);
    kept_machines_take_a_device_again(&home);
}

fn the_guest_knows_its_place(home: &Home) {
    let addresses = home.sh("one", "ip addr show eth0; ip route; ip -6 route");
    for part in [
        "10.1.0.2/24",
        "fd01::2/64",
        "default via 10.1.0.1",
        "default via fd01::1",
    ] {
        assert!(addresses.contains(part), "{addresses}");
    }
    for target in ["10.1.0.1", "fd01::1"] {
        let ping = home.sh("one", &format!("ping -c 2 -w 20 {target}"));
        assert!(ping.contains("2 packets received"), "{ping}");
    }
    assert_eq!(home.sh("one", "cat /sys/class/net/eth0/mtu"), "1500");
    let network = &inspected(home, "one")["network"];
    let mac = network["tap"]["mac"]
        .as_str()
        .expect("an address")
        .to_owned();
    assert_eq!(home.sh("one", "cat /sys/class/net/eth0/address"), mac);
    assert_eq!(network["tap"]["name"], "tap0");
    assert!(network["counters"]["frames_to_guest"].as_u64() > Some(0));
    // No socket of the host's is needed: its network is not the process's.
    let doctor: Value =
        serde_json::from_str(&home.done(&["doctor", "--format", "json"])).expect("JSON");
    assert_eq!(doctor["tap"]["usable"], true);
    // From the start that was kept, which has no addresses: another's are not left.
    let other = "tap=tap1,ip=10.2.0.7/24,mac=02:53:6b:01:02:03";
    let script = "ip -4 addr show eth0 | grep -c inet; hostname -i; cat /sys/class/net/eth0/address \
                  /sys/class/net/eth0/mtu; ping -c 1 -w 20 10.2.0.1 | grep -c '1 packets received'";
    let run = [
        "run",
        "--rm",
        "--hypervisor",
        "soft",
        "--network",
        other,
        "demo",
        "sh",
        "-c",
        script,
    ];
    for _ in 0..2 {
        assert_eq!(home.done(&run), "1\n10.2.0.7\n02:53:6b:01:02:03\n9000\n1");
    }
}

fn transfers_pass_both_ways(home: &Home) {
    const LEN: usize = 6 << 20;
    let sent = noise(LEN, 3);
    let digest = hex(Sha256::digest(&sent));
    let listener = TcpListener::bind("10.1.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let server = thread::spawn(move || {
        let (mut down, _) = listener.accept().expect("accept");
        down.write_all(&sent).expect("write");
        drop(down);
        let (mut up, _) = listener.accept().expect("accept");
        let mut got = Vec::new();
        up.read_to_end(&mut got).expect("read");
        got
    });
    let script =
        format!("nc 10.1.0.1 {port} </dev/null >/tmp/blob; sha256sum </tmp/blob | cut -c 1-64");
    assert_eq!(home.sh("one", &script), digest);
    home.sh("one", &format!("nc 10.1.0.1 {port} </tmp/blob"));
    assert_eq!(
        hex(Sha256::digest(server.join().expect("the server"))),
        digest
    );
    // And connections that the host opens, at ports that nobody published; over IPv6 too.
    home.sh(
        "one",
        "httpd -p 80 -h /tmp; httpd -p '[::]:81' -h /tmp || true",
    );
    for address in ["10.1.0.2:80", "[fd01::2]:81"] {
        let mut got = Vec::new();
        eventually("the guest's server", || {
            let Ok(mut stream) = TcpStream::connect(address) else {
                return false;
            };
            stream
                .set_read_timeout(Some(Duration::from_secs(20)))
                .expect("a timeout");
            stream
                .write_all(b"GET /blob HTTP/1.0\r\n\r\n")
                .expect("ask");
            got.clear();
            stream.read_to_end(&mut got).is_ok()
        });
        assert_eq!(
            hex(Sha256::digest(&got[got.len() - LEN..])),
            digest,
            "{address}"
        );
    }
}

fn datagrams_pass_both_ways(home: &Home) {
    let server = UdpSocket::bind("10.1.0.1:0").expect("bind");
    let port = server.local_addr().expect("address").port();
    thread::spawn(move || {
        let mut data = vec![0; 1 << 16];
        while let Ok((len, from)) = server.recv_from(&mut data) {
            let _ = server.send_to(&data[..len], from);
        }
    });
    home.sh("one", "(/programs/connections echo 7001 >/tmp/echo 2>&1) &");
    let client = UdpSocket::bind("10.1.0.1:0").expect("bind");
    client.connect("10.1.0.2:7001").expect("connect");
    client
        .set_read_timeout(Some(Duration::from_secs(2)))
        .expect("a timeout");
    // The longer ones take several packets each way.
    for len in [1, 1472, 8 << 10, 60 << 10] {
        let asked = home.sh(
            "one",
            &format!("/programs/connections ask 10.1.0.1:{port} {len}"),
        );
        assert_eq!(asked, format!("same {len}"));
        let data = noise(len, 9);
        let mut answer = vec![0; 1 << 16];
        eventually("the datagram back", || {
            let _ = client.send(&data);
            client
                .recv(&mut answer)
                .is_ok_and(|got| answer[..got] == data)
        });
    }
}

fn others_are_refused(home: &Home) {
    let run = |network: &str, more: &[&str], names: &[&str]| {
        let args = ["run", "--hypervisor", "soft", "--network", network];
        let args = [&args[..], more, &["demo", "true"]].concat();
        home.refused(&args, names);
    };
    run("tap=tap0", &[], &["tap0 is in use"]);
    run("tap=lo", &[], &["lo is no TAP device"]);
    run("tap=tap1", &["-p", "80:80"], &["whole network"]);
    run("tap=tap1", &["--network", "full"], &["whole network"]);
    run(
        "tap=tap1",
        &["--dns", "127.0.0.1:5353"],
        &["127.0.0.1:5353"],
    );
    run(
        "tap=tap1",
        &["--network-mtu", "9500"],
        &["tap1", "9000", "9500"],
    );
    ip("link set tap1 down");
    run("tap=tap1", &[], &["tap1 is down", "ip link set tap1 up"]);
    ip("link set tap1 up");
    home.refused(
        &["pool", "create", "--network", "tap=tap1", "p", "demo"],
        &["takes one machine"],
    );
    // Who has no rights is told what to ask for.
    let folder = home.path("nobodys");
    std::fs::create_dir(&folder).expect("a folder");
    std::os::unix::fs::chown(&folder, Some(65_534), Some(65_534)).expect("chown");
    let skerry = home.command(&[]);
    let ran = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(skerry.get_program())
        .args([
            "run",
            "--hypervisor",
            "soft",
            "--network",
            "tap=tap1",
            "demo",
            "true",
        ])
        .env("XDG_DATA_HOME", "/proc/self/cwd/nobodys")
        .current_dir(home.path("."))
        .output();
    // Where the program is not this user's to start, there is nothing to see.
    if let Ok(ran) = ran
        && ran.status.code() == Some(125)
    {
        let told = String::from_utf8_lossy(&ran.stderr);
        let remedy =
            told.contains("chmod 0666 /dev/net/tun") || told.contains("is not this user's");
        assert!(remedy, "{told}");
    }
}

fn kept_machines_take_a_device_again(home: &Home) {
    home.done(&["kill", "one"]);
    let network = ["--network", "tap=tap0,ip=10.1.0.2/24"];
    home.start_with("first", &network, &["sleep", "1000"]);
    home.done(&["snapshot", "create", "first", "kept"]);
    home.done(&["kill", "first"]);
    let restore = ["restore", "-d", "--hypervisor", "soft", "--name", "two"];
    let with = |network: &'static [&'static str]| [&restore[..], network, &["kept"]].concat();
    home.refused(&with(&[]), &["--network tap=NAME"]);
    home.refused(&with(&["--network", "full"]), &["--network tap=NAME"]);
    home.done(&with(&["--network", "tap=tap0,ip=10.1.0.9/24"]));
    let addresses = home.sh("two", "ip -4 addr show eth0 | grep inet");
    assert!(addresses.contains("10.1.0.9/24"), "{addresses}");
    assert!(!addresses.contains("10.1.0.2/24"), "{addresses}");
    home.sh("two", "ping -c 1 -w 20 10.1.0.1");
    home.done(&["kill", "two"]);
    // One with a card of the other kind has no use for a device.
    home.start_with("plain", &[], &["sleep", "1000"]);
    home.done(&["snapshot", "create", "plain", "other"]);
    let args = [
        "restore",
        "-d",
        "--hypervisor",
        "soft",
        "--network",
        "tap=tap0",
        "other",
    ];
    home.refused(&args, &["user-mode network"]);
}
