use super::*;

#[test]
fn names_are_those_of_interfaces() {
    for good in ["tap0", "a", "vm-1.lan_x", "fifteen_letters"] {
        Tap::check_name(good).unwrap();
    }
    for bad in [
        "",
        ".",
        "..",
        "sixteen_letters_",
        "a/b",
        "a b",
        "-x",
        "t\u{e4}p",
        "a:1",
        "%d",
    ] {
        assert!(matches!(Tap::open(bad), Err(TapError::Name(_))), "{bad}");
    }
}

#[test]
fn what_is_not_there_is_not_made() {
    let name = "skerry-nowhere";
    assert!(matches!(Tap::open(name), Err(TapError::Missing(_))));
    assert!(matches!(Tap::open(name), Err(TapError::Missing(_))));
}

#[test]
fn an_interface_of_another_kind_is_refused() {
    let refused = Tap::open("lo").unwrap_err();
    assert!(
        matches!(
            refused,
            TapError::NotTap(_) | TapError::Door(_) | TapError::NoDriver(_) | TapError::NotOwned(_)
        ),
        "{refused}"
    );
}

#[test]
fn the_guest_has_an_address_of_its_own() {
    let tap = |address| Tap {
        name: "tap0".to_owned(),
        mtu: 1500,
        address,
        frames: Arc::new(std::fs::File::open("/dev/null").unwrap().into()),
    };
    let own = tap([0xfe, 1, 2, 3, 4, 5]).guest_address();
    assert_ne!(own, [0xfe, 1, 2, 3, 4, 5]);
    assert_eq!(own, tap([0xfe, 1, 2, 3, 4, 5]).guest_address());
    assert_ne!(own, tap([0xfe, 1, 2, 3, 4, 6]).guest_address());
    // Locally given, and of one card.
    assert_eq!(tap([1, 0, 0, 0, 0, 0]).guest_address()[0] & 3, 2);
}

#[test]
fn probing_makes_nothing_and_says_something() {
    let probe = probe_taps();
    assert!(!probe.detail.is_empty());
    assert!(probe.usable || !probe.any);
}
