//! Signals of Linux on x86-64, by name or number.

/// Signals by name; their numbers are their places from 1 on (signal(7)).
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// The number of a signal: `TERM`, `sigterm` or `15`. The error is a text for people.
pub fn parse(text: &str) -> Result<u8, String> {
    const LAST: u8 = 64;
    if let Ok(number @ 1..=LAST) = text.parse() {
        return Ok(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let place = SIGNALS.iter().position(|signal| *signal == name);
    let number = place.and_then(|place| u8::try_from(place + 1).ok());
    number.ok_or_else(|| format!("no signal {text:?}: use a name such as TERM, or 1 to 64"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_and_numbers() {
        let signal = |text| super::parse(text).ok();
        assert_eq!(signal("KILL"), Some(9));
        assert_eq!(signal("sigterm"), Some(15));
        assert_eq!(signal("SYS"), Some(31));
        assert_eq!(signal("64"), Some(64));
        assert_eq!(signal("0"), None);
        assert_eq!(signal("65"), None);
        assert_eq!(signal("NONE"), None);
    }
}
