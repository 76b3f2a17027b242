//! What random tests are asked for on the command line.

/// Options that all of them have.
pub struct Common {
    pub seed: u64,
    pub cases: u64,
    pub seconds: Option<u64>,
    pub case: Option<u64>,
    /// After so many it is enough.
    pub mismatches: u64,
}

impl Common {
    /// As given to this process: with seed 1 and these numbers where nothing is said. What isn't
    /// known here is `other`'s: the option, and a function that takes its value.
    pub fn parse(
        cases: u64,
        mismatches: u64,
        mut other: impl FnMut(&str, &mut dyn FnMut() -> Option<String>),
    ) -> Result<Self, String> {
        let mut common = Self {
            seed: 1,
            cases,
            seconds: None,
            case: None,
            mismatches,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || {
                let text = arguments.next().unwrap_or_default();
                text.parse::<u64>().map_err(|e| format!("{argument}: {e}"))
            };
            match argument.as_str() {
                "--seed" => common.seed = value()?,
                "--cases" => common.cases = value()?,
                "--seconds" => common.seconds = Some(value()?),
                "--case" => common.case = Some(value()?),
                "--mismatches" => common.mismatches = value()?,
                _ => other(&argument, &mut || arguments.next()),
            }
        }
        Ok(common)
    }
}
