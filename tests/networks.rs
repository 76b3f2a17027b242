//! Networks that machines share, end to end, on the software processor.

mod common;

use common::eventually;
use common::home::Home;
use serde_json::Value;

fn network(home: &Home, name: &str) -> Value {
    let text = home.done(&["inspect", "--sample", "1ms", name]);
    let inspected: Value = serde_json::from_str(&text).expect("JSON");
    inspected["network"].clone()
}

/// A machine's address on a network.
fn address(home: &Home, name: &str, shared: &str) -> String {
    let network = network(home, name);
    let places = network["shared"].as_array().expect("places");
    let place = places.iter().find(|place| place["network"] == shared);
    let address = place.expect("a place")["address"].as_str();
    address.expect("an address").to_owned()
}

fn counter(home: &Home, name: &str, counter: &str) -> u64 {
    let count = &network(home, name)["counters"][counter];
    count.as_u64().expect("a count")
}

/// Whether a machine gets a page.
fn gets(home: &Home, name: &str, url: &str) -> bool {
    let ran = home.exec(name, &["timeout", "20", "wget", "-qO-", url]);
    ran.status == 0 && ran.stdout == b"box\n"
}

const WEB: &str = "hostname >/tmp/index.html; httpd -p 80 -h /tmp; sleep 1000";
const LOST: &str = "awk '/^Udp: [0-9]/ {print $3}' /proc/net/snmp";

#[test]
fn machines_on_a_network_meet_by_name_and_others_do_not() {
    let home = Home::new();
    home.done(&["network", "create", "--label", "use=test", "lab"]);
    home.done(&["network", "create", "--subnet", "192.168.77.0/28", "other"]);
    let web = [
        "--network",
        "lab",
        "--hostname",
        "box",
        "--network-alias",
        "db",
    ];
    home.start_with("web", &web, &["sh", "-c", WEB]);
    home.start_with("client", &["--network", "lab"], &["sleep", "1000"]);
    home.start_with("far", &["--network", "other"], &["sleep", "1000"]);
    home.start_with("alone", &[], &["sleep", "1000"]);
    let there = address(&home, "web", "lab");
    assert_eq!(home.sh("web", "hostname -i"), there);
    for name in ["web", "box", "db", "web.lab", "WEB", &there] {
        let url = format!("http://{name}/");
        eventually("the server", || gets(&home, "client", &url));
    }
    // All of IP, both ways: echoes, datagrams, a port that nobody published.
    for (who, whom) in [("client", "web"), ("web", "client")] {
        let ping = home.sh(who, &format!("ping -c 3 -w 20 {whom}"));
        assert!(ping.contains("3 packets received"), "{ping}");
    }
    home.sh("web", "syslogd -R client:7777; sleep 0.2; logger x");
    eventually("a datagram", || home.number("client", LOST) >= 1);
    home.sh("web", "head -c 20000000 /dev/zero >/tmp/large");
    let got = home.sh("client", "wget -qO- http://db/large | wc -c");
    assert_eq!(got, "20000000");
    // Those who are not on the network get nowhere, by name or by address.
    for who in ["far", "alone"] {
        assert!(!gets(&home, who, "http://web/"), "{who}");
        assert!(!gets(&home, who, &format!("http://{there}/")), "{who}");
    }
    assert!(counter(&home, "alone", "denied_tcp") >= 1);
    // An address that nobody has is unreachable at once.
    let ran = home.exec("client", &["timeout", "20", "nc", "10.89.0.200", "80"]);
    let told = ran.stderr.contains("nreachable") || ran.stderr.contains("No route");
    assert!(told, "{}", ran.stderr);
    let info = home.done(&["network", "inspect", "lab"]);
    let info: Value = serde_json::from_str(&info).expect("JSON");
    assert_eq!(info[0]["labels"]["use"], "test");
    assert_eq!(info[0]["members"].as_array().expect("members").len(), 2);
    home.refused(&["network", "rm", "lab"], &["lab", "2 machine"]);
    // Whose machine is gone has no name and no address.
    home.kill_process("web");
    eventually("the name's end", || {
        home.exec("client", &["nslookup", "web"]).status != 0
    });
    home.done(&["kill", "client"]);
    eventually("an empty network", || {
        home.run(&["network", "rm", "lab"]).status == 0
    });
    let run = ["run", "--hypervisor", "soft", "--network", "lab"];
    let run = [&run[..], &["demo", "true"]].concat();
    home.refused(&run, &["no network lab"]);
}

#[test]
fn a_machine_sends_with_no_address_but_its_own() {
    let home = Home::new();
    home.done(&["network", "create", "lab"]);
    for name in ["one", "two"] {
        home.start_with(name, &["--network", "lab"], &["sleep", "1000"]);
    }
    let before = counter(&home, "one", "dropped");
    let script = "ip addr add 10.89.0.77/24 dev eth0; ping -c 2 -w 3 -I 10.89.0.77 two";
    assert_ne!(home.exec("one", &["sh", "-c", script]).status, 0);
    assert!(counter(&home, "one", "dropped") >= before + 2);
    assert_eq!(counter(&home, "two", "from_neighbours"), 0);
}

#[test]
fn copies_of_a_machine_have_addresses_of_their_own_or_none() {
    let home = Home::new();
    home.done(&["network", "create", "lab"]);
    let inner = ["--network", "none", "--network", "lab"];
    home.start_with("one", &inner, &["sleep", "1000"]);
    let first = address(&home, "one", "lab");
    // Nothing but the network is reached.
    assert!(!gets(&home, "one", "http://1.1.1.1/"));
    assert!(counter(&home, "one", "denied_by_reach") >= 1);
    // The next start goes on from the first one's kept state, and has its own.
    home.start_with("two", &inner, &["sleep", "1000"]);
    let second = address(&home, "two", "lab");
    assert_ne!(first, second);
    let has = |name: &str, address: &str| {
        let list = home.sh(name, "ip -4 addr show eth0");
        list.contains(&format!("{address}/"))
    };
    assert!(has("two", &second) && !has("two", &first));
    let met = "ping -c 1 -w 20 one >/dev/null && hostname -i";
    assert_eq!(home.sh("two", met), second);
    home.done(&["fork", "--name", "child", "one"]);
    assert!(!has("child", &first));
    let ping = home.exec("child", &["ping", "-c", "1", "-w", "3", &second]);
    assert_ne!(ping.status, 0);
    home.done(&["snapshot", "create", "one", "kept"]);
    let soft = ["--hypervisor", "soft", "--network", "lab", "--name", "back"];
    home.done(&[&["restore", "-d"], &soft[..], &["kept"]].concat());
    assert_eq!(
        home.sh("back", "hostname -i"),
        address(&home, "back", "lab")
    );
    let met = "ping -c 1 -w 20 two >/dev/null && echo there";
    assert_eq!(home.sh("back", met), "there");
    let soft = ["run", "--hypervisor", "soft"];
    let alias = [&soft[..], &["--network-alias", "x", "demo", "true"]].concat();
    home.refused(&alias, &["--network-alias"]);
}

#[test]
fn machines_on_a_network_meet_over_ipv6() {
    let home = Home::new();
    home.done(&["network", "create", "--subnet", "fd01:2:3::/64", "six"]);
    home.done(&["network", "create", "--ipv6=false", "four"]);
    home.start_with("web", &["--network", "six"], &["sh", "-c", WEB6]);
    home.start_with(
        "client",
        &["--network", "six", "--network", "four"],
        &["sleep", "1000"],
    );
    let info: Value =
        serde_json::from_str(&home.done(&["network", "inspect", "six"])).expect("JSON");
    let members = info[0]["members"].as_array().expect("members");
    let web = members
        .iter()
        .find(|one| one["names"].to_string().contains("\"web\""));
    let there = web.expect("a member")["address6"]
        .as_str()
        .expect("an address")
        .to_owned();
    assert_eq!(there, "fd01:2:3::2");
    let told = home.sh("client", "nslookup -type=aaaa web");
    assert!(told.contains(&there), "{told}");
    let ping = home.sh("client", &format!("ping -c 2 -w 20 {there}"));
    assert!(ping.contains("2 packets received"), "{ping}");
    let url = format!("http://[{there}]:81/large");
    home.sh("web", "head -c 3000000 /dev/urandom >/tmp/large");
    let script = format!("wget -qO- '{url}' | sha256sum");
    eventually("the server", || {
        home.exec("client", &["wget", "-qO-", &url]).status == 0
    });
    assert_eq!(
        home.sh("client", &script),
        home.sh("web", "sha256sum </tmp/large")
    );
    // One that was made without has no such address.
    let four: Value =
        serde_json::from_str(&home.done(&["network", "inspect", "four"])).expect("JSON");
    assert_eq!(four[0]["members"][0]["address6"], Value::Null);
    assert_eq!(four[0]["subnet6"], Value::Null);
    // The network's gateway answers, and an address that nobody has is unreachable at once.
    home.sh("client", "ping -c 1 -w 20 fd01:2:3::1");
    assert_ne!(
        home.exec("client", &["ping", "-c", "1", "-w", "5", "fd01:2:3::77"])
            .status,
        0
    );
}

const WEB6: &str = "httpd -p '[::]:81' -h /tmp; sleep 1000";

#[test]
fn networks_have_walls_and_gateways_of_their_own() {
    let home = Home::new();
    let options = [
        "--subnet",
        "10.70.0.0/29",
        "--gateway",
        "10.70.0.5",
        "--internal",
    ];
    home.done(&[&["network", "create"], &options[..], &["closed"]].concat());
    home.start_with("in", &["--network", "closed"], &["sleep", "1000"]);
    assert_eq!(address(&home, "in", "closed"), "10.70.0.1");
    assert_eq!(network(&home, "in")["mode"], "none");
    home.sh("in", "ping -c 1 -w 20 10.70.0.5");
    assert!(!gets(&home, "in", "http://192.0.2.1/"));
    assert!(counter(&home, "in", "denied_by_reach") >= 1);
    // Who names a reach has it.
    home.start_with(
        "both",
        &["--network", "closed", "--network", "public"],
        &["sleep", "1000"],
    );
    assert_eq!(network(&home, "both")["mode"], "public");
    for (bad, why) in [
        (
            &["--subnet", "10.71.0.0/24", "--gateway", "10.72.0.1"][..],
            "10.72.0.1",
        ),
        (&["--subnet", "2001:db8::/64"], "unique local"),
        (&["--subnet", "fd05::/64", "--ipv6=false"], "no IPv6"),
        (
            &["--subnet", "10.71.0.0/24", "--subnet", "10.73.0.0/24"],
            "second of its family",
        ),
    ] {
        home.refused(&[&["network", "create"], bad, &["bad"]].concat(), &[why]);
    }
}
