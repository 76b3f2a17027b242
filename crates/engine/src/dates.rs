//! Points in time, for programs and for people.

use std::time::{Duration, SystemTime};

const DAY: u64 = 86_400;

/// RFC 3339, in UTC and to the millisecond.
pub fn rfc3339(time: SystemTime) -> String {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let (year, month, day) = civil(since.as_secs() / DAY);
    let second = since.as_secs() % DAY;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_millis()
    )
}

/// A point in time of RFC 3339: `2026-01-31T12:00:00Z`, with fractions of a second and an offset where
/// there are some.
pub fn parse(text: &str) -> Option<SystemTime> {
    let number = |from: usize, to: usize| -> Option<u64> {
        let digits = text.get(from..to)?;
        let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| digits.parse().ok()).flatten()
    };
    let marks = [(4, "-"), (7, "-"), (13, ":"), (16, ":")];
    let separated = marks
        .iter()
        .all(|(at, mark)| text.get(*at..at + 1) == Some(*mark));
    if !separated || !matches!(text.get(10..11), Some("T" | "t" | " ")) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let rest = text.get(19..)?;
    let zone = rest.find(['Z', 'z', '+', '-'])?;
    let (fraction, zone) = rest.split_at(zone);
    let nanoseconds = match fraction.strip_prefix('.') {
        None => fraction.is_empty().then_some(0)?,
        Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) && !digits.is_empty() => {
            format!("{digits:0<9}").get(..9)?.parse().ok()?
        }
        Some(_) => return None,
    };
    let offset = match zone {
        "Z" | "z" => 0,
        _ => {
            let (hours, minutes) = zone.get(1..)?.split_once(':')?;
            let seconds = hours.parse::<i64>().ok()? * 3600 + minutes.parse::<i64>().ok()? * 60;
            if zone.starts_with('-') {
                -seconds
            } else {
                seconds
            }
        }
    };
    // The day's number by looking: a calendar that is right one way is right the other.
    let guess = year.checked_sub(1970)? * 365;
    let days = (guess..guess + 600).find(|days| civil(*days) == (year, month, day))?;
    let within = hour < 24 && minute < 60 && second < 60;
    let seconds = within.then_some(days * DAY + hour * 3600 + minute * 60 + second)?;
    let seconds = u64::try_from(i64::try_from(seconds).ok()? - offset).ok()?;
    Some(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds))
}

/// Year, month and day of the Gregorian calendar, so many days after 1970-01-01.
///
/// Years begin in March here: then the leap day is the last of its year, and the months' lengths
/// repeat every five (31, 30, 31, 30, 31 days: 153).
fn civil(days: u64) -> (u64, u64, u64) {
    const FOUR_CENTURIES: u64 = 146_097;
    // From 0000-03-01 to 1970-01-01.
    let days = days + 719_468;
    let in_era = days % FOUR_CENTURIES;
    let year_of_era = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
    let in_year = in_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * in_year + 2) / 153;
    let day = in_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = days / FOUR_CENTURIES * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

/// How long ago something was, in its largest unit.
pub fn ago(age: Duration) -> String {
    let seconds = age.as_secs();
    let units = [
        ("year", 365 * DAY),
        ("month", 30 * DAY),
        ("week", 7 * DAY),
        ("day", DAY),
        ("hour", 3600),
        ("minute", 60),
        ("second", 1),
    ];
    match units.into_iter().find(|(_, length)| seconds >= *length) {
        None => "just now".to_owned(),
        Some((unit, length)) => match seconds / length {
            1 => format!("1 {unit} ago"),
            count => format!("{count} {unit}s ago"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for seconds in [0, 951_782_399, 951_782_400, 1_700_000_000, 4_107_542_400] {
            let time = SystemTime::UNIX_EPOCH + Duration::from_millis(seconds * 1000 + 7);
            assert_eq!(parse(&rfc3339(time)), Some(time));
        }
        let noon = parse("2026-01-31T12:00:00Z");
        assert_eq!(parse("2026-01-31T13:30:00.0+01:30"), noon);
        for text in [
            "",
            "2026-01-31",
            "2026-02-30T00:00:00Z",
            "2026-01-31T25:00:00Z",
            "2026-01-31T12:00:00",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    fn at(seconds: u64) -> String {
        rfc3339(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
    }

    /// Expected values are those of `date -u -d @N`.
    #[test]
    fn dates() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_709_164_800, "2024-02-29T00:00:00.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(at(seconds), expected);
        }
    }

    #[test]
    fn every_day_of_four_centuries_follows_the_one_before() {
        let (mut year, mut month, mut day) = civil(0);
        for days in 1..=146_097 {
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = match month {
                2 => 28 + u64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            day += 1;
            if day > length {
                (month, day) = (month + 1, 1);
            }
            if month > 12 {
                (year, month) = (year + 1, 1);
            }
            assert_eq!(civil(days), (year, month, day));
        }
    }

    #[test]
    fn ages() {
        for (seconds, expected) in [
            (0, "just now"),
            (1, "1 second ago"),
            (119, "1 minute ago"),
            (7200, "2 hours ago"),
            (13 * DAY, "1 week ago"),
            (400 * DAY, "1 year ago"),
        ] {
            assert_eq!(ago(Duration::from_secs(seconds)), expected);
        }
    }
}
