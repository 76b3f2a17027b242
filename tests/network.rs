//! The guest's network, end to end, on the software processor: to servers on the host's loopback
//! interface, from clients there through published ports, and where it may not go.

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use common::home::Home;
use common::{eventually, hex, noise};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// What a connection to a server of the host's may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server on the loopback interface with a thread for each connection; gives its port.
fn serve(address: &str, each: impl Fn(TcpStream) + Clone + Send + 'static) -> u16 {
    let listener = TcpListener::bind((address, 0)).expect("listen");
    let port = listener.local_addr().expect("address").port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let each = each.clone();
            stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
            thread::spawn(move || each(stream));
        }
    });
    port
}

/// Answers one request with a page.
fn page(mut stream: TcpStream) {
    let mut request = [0; 1024];
    if stream.read(&mut request).is_ok_and(|len| len > 0) {
        let page = "HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nhello\n";
        let _ = stream.write_all(page.as_bytes());
    }
}

/// Reads to the end, then says how much it was and what.
fn digest(mut stream: TcpStream) {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut total = 0;
    while let Ok(len @ 1..) = stream.read(&mut buffer) {
        hash.update(&buffer[..len]);
        total += len;
    }
    let _ = writeln!(stream, "{total} {}", hex(hash.finalize()));
}

/// Asks a server behind a published port for its page.
fn fetch(port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A name server that knows two names; tells of each question.
fn name_server() -> (SocketAddr, mpsc::Receiver<String>) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let address = socket.local_addr().expect("address");
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let query = &buffer[..len];
            let mut name = Vec::new();
            let mut at = 12;
            while let Some(&label @ 1..) = query.get(at) {
                name.push(String::from_utf8_lossy(&query[at + 1..][..label.into()]).into_owned());
                at += usize::from(label) + 1;
            }
            let name = name.join(".");
            let wants_v4 = query[at + 1..at + 3] == [0, 1];
            let address = match &*name {
                "gateway.test" => Some([10, 0, 2, 2]),
                "metadata.test" => Some([169, 254, 169, 254]),
                _ => None,
            };
            let answers = address.filter(|_| wants_v4);
            let mut answer = query[..2].to_vec();
            let code = if address.is_some() { 0 } else { 3 };
            answer.extend([
                0x81,
                0x80 | code,
                0,
                1,
                0,
                u8::from(answers.is_some()),
                0,
                0,
                0,
                0,
            ]);
            answer.extend(&query[12..at + 5]);
            if let Some(address) = answers {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                answer.extend(address);
            }
            let _ = socket.send_to(&answer, from);
            let _ = sender.send(name);
        }
    });
    (address, receiver)
}

/// Where the host listens for a port of a machine's.
fn published(home: &Home, name: &str, port: &str) -> u16 {
    let text = home.done(&["port", name, port]);
    let address: SocketAddr = text.parse().expect("an address");
    address.port()
}

/// A count of a machine's network.
fn count(home: &Home, name: &str, counter: &str) -> u64 {
    let text = home.done(&["inspect", "--sample", "1ms", name]);
    let inspected: Value = serde_json::from_str(&text).expect("JSON");
    let count = &inspected["network"]["counters"][counter];
    count
        .as_u64()
        .unwrap_or_else(|| panic!("no {counter} in {inspected}"))
}

#[test]
fn the_host_is_the_gateway_of_a_full_network() {
    let home = Home::new();
    let (v4, v6) = (serve("127.0.0.1", page), serve("::1", page));
    home.start_with("vm", &["--network", "full"], &["sleep", "1000"]);
    let wget = |url: &str| home.sh("vm", &format!("wget -qO- {url}"));
    assert_eq!(wget(&format!("http://10.0.2.2:{v4}/")), "hello");
    assert_eq!(
        wget(&format!("http://[fd53:6b72:7279:2::2]:{v6}/")),
        "hello"
    );
    for target in ["10.0.2.2", "10.0.2.3", "fd53:6b72:7279:2::2"] {
        let ping = home.sh("vm", &format!("ping -c 2 -w 20 {target}"));
        assert!(ping.contains("2 packets received"), "{ping}");
    }
    // What nobody listens at is refused at once.
    let refused = home.exec("vm", &["wget", "-qO-", "http://10.0.2.2:1/"]);
    assert!(refused.stderr.contains("refused"), "{}", refused.stderr);
    assert_eq!(
        home.sh("vm", "hostname; cat /etc/resolv.conf"),
        "skerry\nnameserver 10.0.2.3"
    );
}

#[test]
fn a_hundred_mebibytes_survive_both_ways_and_ends_pass_separately() {
    let home = Home::new();
    let data = noise(1 << 20, 9);
    let mut hash = Sha256::new();
    (0..100).for_each(|_| hash.update(&data));
    let expected = hex(hash.finalize());
    let to_host = serve("127.0.0.1", digest);
    let from_host = serve("127.0.0.1", move |mut stream| {
        // After the guest has ended its side, which is all that it does.
        let mut nothing = Vec::new();
        let _ = stream.read_to_end(&mut nothing);
        let _ = (0..100).try_for_each(|_| stream.write_all(&data));
    });
    home.start_with("vm", &["--network", "full"], &["sleep", "1000"]);
    let got = home.sh(
        "vm",
        &format!("nc 10.0.2.2 {from_host} </dev/null | sha256sum"),
    );
    assert_eq!(got.split(' ').next(), Some(&*expected));
    // The host's answer comes after the guest's end has reached it.
    let script =
        format!("nc 10.0.2.2 {from_host} </dev/null | tee /dev/null | nc 10.0.2.2 {to_host}");
    assert_eq!(home.sh("vm", &script), format!("104857600 {expected}"));
}

#[test]
fn a_published_port_takes_a_thousand_requests() {
    let home = Home::new();
    let script = "echo hi >/tmp/index.html; exec httpd -f -p 80 -h /tmp";
    let options = ["-p", "127.0.0.1::80"];
    home.start_with("web", &options, &["sh", "-c", script]);
    let port = published(&home, "web", "80");
    eventually("a server", || {
        fetch(port).is_ok_and(|page| page.ends_with("hi\n"))
    });
    let good = thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(move || {
                    let pages = (0..125).map(|_| fetch(port).expect("a page"));
                    pages.filter(|page| page.ends_with("\r\n\r\nhi\n")).count()
                })
            })
            .collect();
        clients
            .into_iter()
            .map(|client| client.join().expect("client"))
            .sum::<usize>()
    });
    assert_eq!(good, 1000);
    assert!(count(&home, "web", "tcp_accepted") >= 1000);
    let listed = format!("80/tcp -> 127.0.0.1:{port}");
    assert_eq!(home.done(&["port", "web"]), listed);
    home.refused(&["port", "web", "81"], &["81", "web", "not published"]);
    // A port has one owner at a time, and none when the machine is gone.
    let taken = format!("127.0.0.1:{port}:80");
    let run = ["run", "--hypervisor", "soft", "-p", &taken, "demo", "true"];
    home.refused(&run, &["Can't listen", &port.to_string()]);
    home.done(&["kill", "web"]);
    home.refused(&["port", "web"], &["web", "not running"]);
    home.done(&run);
}

#[test]
fn a_thousand_connections_at_once() {
    const COUNT: usize = 1000;
    let home = Home::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let server = thread::spawn(move || {
        let all: Vec<TcpStream> = listener.incoming().flatten().take(COUNT).collect();
        for mut stream in all {
            stream.write_all(b"all are here\n").expect("write");
        }
    });
    home.start_with("vm", &["--network", "full"], &["sleep", "1000"]);
    let script = format!(
        "i=0; while [ $i -lt {COUNT} ]; do nc 10.0.2.2 {port} </dev/null >>/tmp/got & i=$((i+1)); done; \
         wait; grep -c 'all are here' /tmp/got"
    );
    assert_eq!(home.sh("vm", &script), COUNT.to_string());
    server.join().expect("server");
    assert_eq!(count(&home, "vm", "tcp_opened"), COUNT as u64);
}

#[test]
fn names_are_asked_of_the_servers_that_are_given() {
    let home = Home::new();
    let (server, asked) = name_server();
    // Nobody is at the first: what it doesn't answer, the next one does.
    let dead = UdpSocket::bind("127.0.0.1:0")
        .expect("bind")
        .local_addr()
        .expect("address");
    let web = serve("127.0.0.1", page);
    let (dead, server) = (dead.to_string(), server.to_string());
    let options = ["--network", "full", "--dns", &dead, "--dns", &server];
    home.start_with("vm", &options, &["sleep", "1000"]);
    let url = format!("http://gateway.test:{web}/");
    assert_eq!(home.sh("vm", &format!("wget -qO- {url}")), "hello");
    assert_eq!(asked.recv_timeout(PATIENCE).as_deref(), Ok("gateway.test"));
    let missing = home.exec("vm", &["wget", "-qO-", "http://no.such.test/"]);
    assert!(missing.stderr.contains("bad address"), "{}", missing.stderr);
    assert!(count(&home, "vm", "dns_queries") >= 2);
}

#[test]
fn datagrams_pass_both_ways() {
    let home = Home::new();
    let socket = UdpSocket::bind("127.0.0.1:0").expect("bind");
    socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let port = socket.local_addr().expect("address").port();
    let options = ["--network", "full", "-p", "127.0.0.1::9/udp"];
    home.start_with("vm", &options, &["sleep", "1000"]);
    home.sh(
        "vm",
        &format!("syslogd -R 10.0.2.2:{port}; sleep 0.2; logger from the guest"),
    );
    let mut buffer = vec![0; 65_536];
    let (len, _) = socket.recv_from(&mut buffer).expect("a datagram");
    let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
    assert!(text.contains("from the guest"), "{text}");
    // Nobody is at the guest's port, and its kernel counts what comes there.
    let lost = || home.number("vm", "awk '/^Udp: [0-9]/ {print $3}' /proc/net/snmp");
    let (before, published) = (lost(), published(&home, "vm", "9/udp"));
    let client = UdpSocket::bind("127.0.0.1:0").expect("bind");
    for len in [1, 1000, 60_000] {
        let sent = client.send_to(&noise(len, 3), (Ipv4Addr::LOCALHOST, published));
        assert_eq!(sent.expect("send"), len);
    }
    eventually("three datagrams", || lost() == before + 3);
}

#[test]
fn a_public_network_is_not_the_hosts() {
    let home = Home::new();
    let own = serve("127.0.0.1", page);
    let (server, _asked) = name_server();
    let server = server.to_string();
    home.start_with("vm", &["--dns", &server], &["sleep", "1000"]);
    let targets = [
        format!("10.0.2.2:{own}"),
        "169.254.169.254".to_owned(),
        "192.168.0.1".to_owned(),
        "172.17.0.1".to_owned(),
        "100.100.100.200".to_owned(),
        "[fd00:ec2::254]".to_owned(),
        // By a name, it is the same address.
        "metadata.test".to_owned(),
    ];
    for target in &targets {
        let ran = home.exec(
            "vm",
            &[
                "timeout",
                "20",
                "wget",
                "-qO-",
                &format!("http://{target}/"),
            ],
        );
        assert_ne!(ran.status, 0, "{target}");
        assert!(
            !ran.stderr.contains("timed out"),
            "{target}: {}",
            ran.stderr
        );
    }
    assert_eq!(count(&home, "vm", "denied_tcp"), targets.len() as u64);
    assert_eq!(count(&home, "vm", "tcp_opened"), 0);
    let ping = home.exec("vm", &["ping", "-c", "1", "-w", "2", "192.168.0.1"]);
    assert_ne!(ping.status, 0);
    assert!(count(&home, "vm", "denied_icmp") >= 1);
    home.sh("vm", "syslogd -R 192.168.0.1:514; sleep 0.2; logger x");
    eventually("a denied datagram", || {
        count(&home, "vm", "denied_udp") >= 1
    });
}

/// What a machine was denied: for each what it was, as JSON.
fn denials(home: &Home, name: &str) -> Vec<Value> {
    let text = home.done(&["inspect", "--sample", "1ms", name]);
    let inspected: Value = serde_json::from_str(&text).expect("JSON");
    let denied = inspected["network"]["denied"].as_array();
    denied.expect("denials").clone()
}

#[test]
fn rules_allow_names_and_what_they_lead_to() {
    let home = Home::new();
    let (own, other) = (serve("127.0.0.1", page), serve("127.0.0.1", page));
    let (server, asked) = name_server();
    let (server, rule) = (server.to_string(), format!("*.test:{own}"));
    let options = [
        "--network",
        "full",
        "--dns",
        &server,
        "--network-allow",
        &rule,
    ];
    home.start_with("vm", &options, &["sleep", "1000"]);
    let gets = |name: &str, port: u16| {
        let url = format!("http://{name}:{port}/");
        let ran = home.exec("vm", &["timeout", "20", "wget", "-qO-", &url]);
        ran.status == 0 && ran.stdout == b"hello\n"
    };
    // The address alone is not what the rule names, until the name has led to it.
    assert!(!gets("10.0.2.2", own));
    assert!(gets("gateway.test", own));
    assert!(gets("10.0.2.2", own));
    assert!(!gets("gateway.test", other));
    // A name that no rule allows is not even asked for.
    assert!(!gets("gateway.example", own));
    assert!(asked.try_iter().all(|name| name == "gateway.test"));
    assert!(count(&home, "vm", "denied_names") >= 1);
    assert_eq!(count(&home, "vm", "denied_unlisted"), 2);
    let denied = denials(&home, "vm");
    let name = denied.iter().find(|denial| denial["reason"] == "name");
    assert_eq!(name.expect("a name")["name"], "gateway.example");
    let to = format!("10.0.2.2:{other}");
    let found = denied.iter().find(|denial| denial["address"] == *to);
    let found = found.expect("an address");
    assert_eq!(found["name"], "gateway.test");
    assert_eq!(found["reason"], "unlisted");
    // A fork may do no more.
    home.done(&["fork", "--name", "child", "vm"]);
    let url = format!("http://10.0.2.2:{other}/");
    let ran = home.exec("child", &["timeout", "20", "wget", "-qO-", &url]);
    assert_ne!(ran.status, 0);
}

#[test]
fn rules_name_private_addresses_and_names_do_not() {
    let home = Home::new();
    let (own, other) = (serve("127.0.0.1", page), serve("127.0.0.1", page));
    let (server, _asked) = name_server();
    let (server, rule) = (server.to_string(), format!("127.0.0.1:{own}"));
    let allow = ["--network-allow", &rule, "--network-allow", "metadata.test"];
    let options = [&["--dns", &server], &allow[..]].concat();
    home.start_with("vm", &options, &["sleep", "1000"]);
    let status = |vm: &str, url: &str| {
        let ran = home.exec(vm, &["timeout", "20", "wget", "-qO-", url]);
        ran.status
    };
    assert_eq!(status("vm", &format!("http://10.0.2.2:{own}/")), 0);
    assert_ne!(status("vm", &format!("http://10.0.2.2:{other}/")), 0);
    assert_ne!(status("vm", "http://metadata.test/"), 0);
    assert_eq!(count(&home, "vm", "denied_rebinding"), 1);
    let denied = denials(&home, "vm");
    let found = denied.iter().find(|denial| denial["reason"] == "rebinding");
    let found = found.expect("a denial");
    assert_eq!(found["address"], "169.254.169.254:80");
    assert_eq!(found["name"], "metadata.test");
    // What a rule denies is denied, whatever else allows it.
    let options = ["--network", "full", "--network-deny", "127.0.0.0/8"];
    home.start_with("deny", &options, &["sleep", "1000"]);
    assert_ne!(status("deny", &format!("http://10.0.2.2:{own}/")), 0);
    assert_eq!(count(&home, "deny", "denied_by_rule"), 1);
    let bad = home.run(&["run", "--network-allow", "1.2.3.4/99", "demo", "true"]);
    assert_eq!(bad.status, 125);
    assert!(bad.stderr.contains("names no addresses"), "{}", bad.stderr);
}

#[test]
fn packets_are_as_long_as_is_said() {
    let home = Home::new();
    let web = serve("127.0.0.1", page);
    let options = ["--network", "full", "--network-mtu", "1400"];
    home.start_with("vm", &options, &["sleep", "1000"]);
    assert_eq!(home.sh("vm", "cat /sys/class/net/eth0/mtu"), "1400");
    assert_eq!(
        home.sh("vm", &format!("wget -qO- http://10.0.2.2:{web}/")),
        "hello"
    );
    home.done(&["snapshot", "create", "vm", "kept"]);
    let restore = [
        "restore",
        "--hypervisor",
        "soft",
        "--network-mtu",
        "9000",
        "kept",
    ];
    home.refused(&restore, &["1400", "--network-mtu"]);
    let bad = [
        "run",
        "--hypervisor",
        "soft",
        "--network-mtu",
        "1000",
        "demo",
        "true",
    ];
    home.refused(&bad, &["1280"]);
}

#[test]
fn without_a_network_there_is_no_card() {
    let home = Home::new();
    let run = ["run", "--hypervisor", "soft", "--network", "none"];
    let ran = home.done(&[&run[..], &["demo", "ls", "/sys/class/net"]].concat());
    assert!(ran.contains("lo") && !ran.contains("eth0"), "{ran}");
    for option in [
        ["-p", "80:80"],
        ["--dns", "9.9.9.9"],
        ["--network-allow", "9.9.9.9"],
    ] {
        let args = [&run[..], &option, &["demo", "true"]].concat();
        home.refused(&args, &["--network none"]);
    }
    home.start_with("vm", &["--network", "none"], &["sleep", "1000"]);
    assert_eq!(home.done(&["port", "vm"]), "");
    home.done(&["snapshot", "create", "vm", "kept"]);
    let restore = ["restore", "-d", "--hypervisor", "soft", "--name", "again"];
    for option in [["-p", "80:80"], ["--network", "full"]] {
        let args = [&restore[..], &option, &["kept"]].concat();
        home.refused(&args, &["without a network card"]);
    }
    home.done(&[&restore[..], &["--network", "none", "kept"]].concat());
}

#[test]
fn connections_of_an_earlier_life_break() {
    let home = Home::new();
    let (sender, accepted) = mpsc::channel();
    let port = serve("127.0.0.1", move |stream| {
        sender.send(stream).expect("send")
    });
    let script = format!("nc 10.0.2.2 {port} </dev/zero >/dev/null; echo $? >/ended; sleep 1000");
    home.start_with("vm", &["--network", "full"], &["sh", "-c", &script]);
    let _held = accepted.recv_timeout(PATIENCE).expect("a connection");
    home.done(&["snapshot", "create", "vm", "kept"]);
    let soft = ["--hypervisor", "soft", "--network", "full"];
    home.done(&[&["restore", "-d", "--name", "again"], &soft[..], &["kept"]].concat());
    eventually("the end of the connection", || {
        home.exec("again", &["cat", "/ended"]).status == 0
    });
    // The one that was there before goes on, and the new one gets along.
    assert_ne!(home.exec("vm", &["cat", "/ended"]).status, 0);
    let web = serve("127.0.0.1", page);
    let wget = format!("wget -qO- http://10.0.2.2:{web}/");
    for name in ["vm", "again"] {
        assert_eq!(home.sh(name, &wget), "hello");
    }
    // A fork reaches as far as its parent.
    home.done(&["fork", "--name", "child", "vm"]);
    assert_eq!(home.sh("child", &wget), "hello");
    eventually("the end of the connection", || {
        home.exec("child", &["cat", "/ended"]).status == 0
    });
}
