//! `skerry events`.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use anyhow::{Result, bail};
use skerry_engine::Paths;
use skerry_engine::dates;
use skerry_engine::events::{Happened, Reader};
use skerry_engine::vms::now;

use crate::args::{EventsArgs, Filter, Format, Span};

/// Prints what happens.
pub fn execute(args: &EventsArgs) -> Result<u8> {
    for filter in &args.filter {
        let known = ["type", "event", "machine", "container", "image", "label"];
        if !known.contains(&filter.key.as_str()) {
            let key = &filter.key;
            bail!("There is no filter {key}: events knows type, event, machine, image and label");
        }
    }
    let begun = now();
    let time = |text: &Option<String>| text.as_deref().map(|text| point(text, begun)).transpose();
    let since = time(&args.since)?.unwrap_or(begun);
    let until = time(&args.until)?;
    let mut reader = Reader::open(&Paths::of_user()?)?;
    let mut out = io::stdout().lock();
    loop {
        let left = until.map(|until| Duration::from_nanos(until.saturating_sub(now())));
        let Some(event) = reader.next(left)? else {
            return Ok(0);
        };
        if until.is_some_and(|until| event.time > until) {
            return Ok(0);
        }
        if event.time < since || !wanted(&event, &args.filter) {
            continue;
        }
        let written = match args.format {
            Format::Json => writeln!(out, "{}", serde_json::to_string(&event)?),
            Format::Text => line(&mut out, &event),
        };
        match written.and_then(|()| out.flush()) {
            // Nobody listens any more.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(0),
            written => written?,
        }
    }
}

fn line(out: &mut impl Write, event: &Happened) -> io::Result<()> {
    let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(event.time);
    let more: Vec<String> = event
        .attributes
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let text = format!(
        "{} {} {} {} ({})",
        dates::rfc3339(time),
        event.kind.name(),
        event.action,
        event.id,
        more.join(", ")
    );
    // What a terminal could take for an order is a guest's or a user's word.
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    writeln!(out, "{text}")
}

/// Whether an event passes: of several values for one key, one has to fit.
fn wanted(event: &Happened, filters: &[Filter]) -> bool {
    let fits = |filter: &Filter| {
        let value = filter.value.as_str();
        let attribute = |key: &str| event.attributes.get(key).map(String::as_str);
        match filter.key.as_str() {
            "type" => {
                event.kind.name() == value || value == "container" && event.kind.name() == "machine"
            }
            "event" => event.action == value,
            "machine" | "container" => {
                event.kind.name() == "machine"
                    && (event.id.starts_with(value) || attribute("name") == Some(value))
            }
            "image" => attribute("image") == Some(value) || event.id == value,
            _ => match value.split_once('=') {
                Some((key, value)) => attribute(key) == Some(value),
                None => event.attributes.contains_key(value),
            },
        }
    };
    filters.iter().all(|filter| {
        let mut same = filters.iter().filter(|other| other.key == filter.key);
        same.any(fits)
    })
}

/// A point in time, in nanoseconds since 1970.
fn point(text: &str, now: u64) -> Result<u64> {
    const SECOND: f64 = 1e9;
    if let Ok(seconds) = text.parse::<f64>()
        && seconds >= 0.0
    {
        return Ok((seconds * SECOND) as u64);
    }
    if let Ok(Span(span)) = text.parse::<Span>() {
        return Ok(now.saturating_sub(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)));
    }
    match dates::parse(text) {
        Some(time) => {
            let since = time
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            Ok(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
        }
        None => bail!(
            "{text:?} is no time: write 2026-01-31T12:00:00Z, seconds since 1970, or a span before now such as 10m"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_in_time() {
        let now = 100_000_000_000;
        assert_eq!(point("1.5", now).ok(), Some(1_500_000_000));
        assert_eq!(point("10s", now).ok(), Some(90_000_000_000));
        assert_eq!(
            point("1970-01-01T00:01:00Z", now).ok(),
            Some(60_000_000_000)
        );
        assert!(point("tomorrow", now).is_err());
    }

    #[test]
    fn of_one_key_any_value_will_do() {
        let event = Happened {
            time: 0,
            kind: skerry_engine::events::Kind::Machine,
            action: "die".to_owned(),
            id: "0123".to_owned(),
            attributes: [("name", "web"), ("image", "demo"), ("tier", "1")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
        };
        let passes = |filters: &[&str]| {
            let filters: Vec<Filter> = filters.iter().map(|f| f.parse().expect("filter")).collect();
            wanted(&event, &filters)
        };
        assert!(passes(&[]) && passes(&["event=start", "event=die"]) && passes(&["machine=01"]));
        assert!(passes(&[
            "type=machine",
            "label=tier",
            "label=tier=1",
            "image=demo"
        ]));
        assert!(!passes(&["event=start"]) && !passes(&["event=die", "machine=other"]));
        assert!(!passes(&["label=tier=2"]) && !passes(&["type=image"]));
    }
}
