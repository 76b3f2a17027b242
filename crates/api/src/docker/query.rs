//! What docker's clients write into queries: filters, flags, points in time, sizes.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use skerry_engine::{dates, units};

use crate::error::ApiError;

/// A point in time, in nanoseconds since 1970, as docker writes it.
pub(super) fn date(nanoseconds: Option<u64>) -> String {
    match nanoseconds {
        Some(at) => dates::rfc3339(SystemTime::UNIX_EPOCH + Duration::from_nanos(at)),
        None => "0001-01-01T00:00:00Z".to_owned(),
    }
}

/// Filters of a list: by word the values, one of which has to fit.
pub(super) type Filters = BTreeMap<String, Vec<String>>;

/// Both forms in which clients write them: `{"name": ["x"]}` and `{"name": {"x": true}}`.
pub(super) fn filters(text: Option<&str>) -> Result<Filters, ApiError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Values {
        List(Vec<String>),
        Set(BTreeMap<String, bool>),
    }
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(Filters::new());
    };
    let found: BTreeMap<String, Values> = serde_json::from_str(text).map_err(|error| {
        ApiError::invalid(format!("The filters are not JSON as it should be: {error}"))
    })?;
    let list = |values| match values {
        Values::List(list) => list,
        Values::Set(set) => {
            let wanted = set.into_iter().filter(|(_, wanted)| *wanted);
            wanted.map(|(value, _)| value).collect()
        }
    };
    Ok(found
        .into_iter()
        .map(|(word, values)| (word, list(values)))
        .collect())
}

/// A query with nothing but filters.
#[derive(Debug, Deserialize)]
pub(super) struct FilterQuery {
    pub(super) filters: Option<String>,
}

/// Whether a filter `label` or `label=text` fits.
pub(super) fn has_label(labels: &BTreeMap<String, String>, wanted: &str) -> bool {
    match wanted.split_once('=') {
        Some((label, text)) => labels.get(label).is_some_and(|found| found == text),
        None => labels.contains_key(wanted),
    }
}

/// `1` and `true`, as clients write them.
pub(super) fn flag<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    let text = String::deserialize(deserializer)?;
    match text.as_str() {
        "1" | "true" | "True" => Ok(true),
        "" | "0" | "false" | "False" => Ok(false),
        other => Err(serde::de::Error::custom(format!(
            "{other:?} is neither true nor false"
        ))),
    }
}

/// Seconds since 1970, with a fraction maybe, in nanoseconds; 0 is none.
pub(super) fn moment(text: Option<&str>) -> Result<Option<u64>, ApiError> {
    let Some(text) = text.filter(|text| !text.is_empty() && *text != "0") else {
        return Ok(None);
    };
    let wrong = || {
        ApiError::invalid(format!(
            "{text:?} is no time: give seconds since 1970, with a fraction if need be"
        ))
    };
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let seconds: u64 = whole.parse().map_err(|_| wrong())?;
    let part = format!("{part:0<9}");
    let part: u64 = part
        .get(..9)
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(wrong)?;
    Ok(Some(
        seconds.saturating_mul(1_000_000_000).saturating_add(part),
    ))
}

/// A number of bytes, such as `10G`.
pub(super) fn bytes(text: &str) -> Result<u64, ApiError> {
    units::bytes(text)
        .map_err(|why| ApiError::invalid(format!("The size {text:?} can't be read: {why}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_have_fractions() {
        let of = |text| moment(Some(text)).map_err(|_| ());
        assert_eq!(of("1700000000"), Ok(Some(1_700_000_000_000_000_000)));
        assert_eq!(of("1700000000.5"), Ok(Some(1_700_000_000_500_000_000)));
        assert_eq!(of("1.0000000019"), Ok(Some(1_000_000_001)));
        assert_eq!(of("0"), Ok(None));
        assert_eq!(of("soon"), Err(()));
        assert_eq!(of("1.x"), Err(()));
    }
}
