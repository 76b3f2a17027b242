//! What was measured, in a table against the limits, and as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use skerry_benches::median;

use crate::rows::{GROUPS, Group};
use crate::run::System;

/// Times of all rounds.
pub struct Results {
    peer: String,
    rounds: usize,
    scale: u32,
    what: &'static str,
    times: BTreeMap<(System, u32, String), Vec<f64>>,
    checksums: BTreeMap<String, String>,
    clocks: BTreeMap<System, f64>,
    failed: BTreeSet<(System, &'static str)>,
}

/// One row's numbers: medians of the times, and of the ratios of each round.
struct Line {
    native: f64,
    tcg: f64,
    skerry: f64,
    to_tcg: f64,
    to_native: f64,
}

impl Results {
    pub fn new(peer: String, rounds: usize, scale: u32, cpu_time: bool) -> Self {
        Self {
            peer,
            rounds,
            scale,
            what: if cpu_time {
                "seconds of processor time"
            } else {
                "seconds"
            },
            times: BTreeMap::new(),
            checksums: BTreeMap::new(),
            clocks: BTreeMap::new(),
            failed: BTreeSet::new(),
        }
    }

    /// Notes a time.
    pub fn add(&mut self, system: System, cpus: u32, name: &str, seconds: f64) {
        let key = (system, cpus, name.to_owned());
        self.times.entry(key).or_default().push(seconds);
    }

    /// Notes what a workload computed, which is an error if it computed something else before.
    pub fn computed(&mut self, name: &str, checksum: &str) -> Result<()> {
        let known = self
            .checksums
            .entry(name.to_owned())
            .or_insert_with(|| checksum.to_owned());
        if known != checksum {
            bail!("{name} computed {checksum}, and {known} elsewhere");
        }
        Ok(())
    }

    /// Notes by what share a clock was off.
    pub fn clock(&mut self, system: System, share: f64) {
        let worst = self.clocks.entry(system).or_default();
        *worst = worst.max(share);
    }

    /// Notes that a group did not come to its end in this round.
    pub fn failed(&mut self, system: System, group: &Group, names: &[&str], round: usize) {
        self.failed.insert((system, group.name));
        // The next round's times pair with each other's all the same.
        for cpus in group.cpus {
            for name in names {
                let key = (system, *cpus, (*name).to_owned());
                self.times
                    .entry(key)
                    .or_default()
                    .resize(round + 1, f64::NAN);
            }
        }
    }

    pub fn any_failed(&self) -> bool {
        !self.failed.is_empty()
    }

    fn times(&self, system: System, cpus: u32, name: &str) -> &[f64] {
        let key = (system, cpus, name.to_owned());
        self.times.get(&key).map_or(&[], Vec::as_slice)
    }

    fn median(&self, system: System, cpus: u32, name: &str) -> f64 {
        median_of(self.times(system, cpus, name).iter().copied())
    }

    /// The median of what each round's pair says.
    fn ratio(&self, name: &str, (a, b): ((System, u32), (System, u32))) -> f64 {
        let (above, below) = (self.times(a.0, a.1, name), self.times(b.0, b.1, name));
        median_of(above.iter().zip(below).map(|(a, b)| a / b))
    }

    fn line(&self, cpus: u32, name: &str) -> Line {
        let (native, tcg, skerry) = (System::Native, System::Tcg, System::Skerry);
        let ours = (skerry, cpus);
        Line {
            native: self.median(native, cpus, name),
            tcg: self.median(tcg, cpus, name),
            skerry: self.median(skerry, cpus, name),
            to_tcg: self.ratio(name, (ours, (tcg, cpus))),
            to_native: self.ratio(name, (ours, (native, cpus))),
        }
    }

    /// How much faster a system's last number of processors is than its first.
    fn scaling(&self, system: System, group: &Group, name: &str) -> f64 {
        match group.cpus {
            [first, .., last] => self.ratio(name, ((system, *first), (system, *last))),
            _ => f64::NAN,
        }
    }

    fn measured<'g>(&self, group: &'g Group) -> Vec<(&'g str, u32)> {
        let cpus = *group.cpus.last().unwrap_or(&1);
        let any = |name: &str| {
            System::ALL
                .iter()
                .any(|system| !self.times(*system, cpus, name).is_empty())
        };
        let rows = group.rows.iter().copied();
        rows.filter(|name| any(name)).map(|n| (n, cpus)).collect()
    }

    /// All numbers that have a limit: of what, the number, the limit, whether it is kept.
    fn verdicts(&self) -> Vec<(String, f64, String, bool)> {
        let mut all = Vec::new();
        for group in &GROUPS {
            let rows = self.measured(group);
            let lines: Vec<(&str, Line)> = rows
                .iter()
                .map(|(name, cpus)| (*name, self.line(*cpus, name)))
                .collect();
            let mut most = |what: String, value: f64, limit: Option<f64>| {
                if let Some(limit) = limit
                    && value.is_finite()
                {
                    all.push((what, value, format!("<= {limit}"), value <= limit));
                }
            };
            for (name, line) in &lines {
                most(format!("{name} / TCG"), line.to_tcg, Some(group.tcg_each));
                most(
                    format!("{name} / native"),
                    line.to_native,
                    group.native_each,
                );
            }
            // The mean of a part of the group says nothing.
            if lines.len() == group.rows.len() {
                let tcg = mean(lines.iter().map(|(_, line)| line.to_tcg));
                most(format!("{}, mean / TCG", group.name), tcg, group.tcg_mean);
                let native = mean(lines.iter().map(|(_, line)| line.to_native));
                let what = format!("{}, mean / native", group.name);
                most(what, native, group.native_mean);
            }
            if let Some(limit) = group.scaling {
                for (name, _) in rows {
                    let value = self.scaling(System::Skerry, group, name);
                    if value.is_finite() {
                        let what = format!("{name}, scaling");
                        all.push((what, value, format!(">= {limit}"), value >= limit));
                    }
                }
            }
        }
        all
    }

    /// How many limits are missed.
    pub fn misses(&self) -> usize {
        self.verdicts().iter().filter(|verdict| !verdict.3).count()
    }

    /// The tables.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{}, medians of {} rounds in turn; ratios are medians of each round's pair\npeer: {} (TCG, microvm)\n",
            self.what, self.rounds, self.peer
        );
        if self.scale != 100 {
            writeln!(text, "sizes: {} % of the whole ones", self.scale).ok();
        }
        writeln!(
            text,
            "{:<20} {:>9} {:>9} {:>9} {:>11} {:>14}",
            "", "native", "TCG", "skerry", "skerry/TCG", "skerry/native"
        )
        .ok();
        for group in &GROUPS {
            let rows = self.measured(group);
            for (name, cpus) in &rows {
                let line = self.line(*cpus, name);
                writeln!(
                    text,
                    "{name:<20} {:>9.3} {:>9.3} {:>9.3} {:>11.2} {:>14.2}",
                    line.native, line.tcg, line.skerry, line.to_tcg, line.to_native
                )
                .ok();
                if group.scaling.is_some() {
                    let scaling = |system| self.scaling(system, group, name);
                    writeln!(
                        text,
                        "{:<20} {:>9.2} {:>9.2} {:>9.2}",
                        "  over 1 processor",
                        scaling(System::Native),
                        scaling(System::Tcg),
                        scaling(System::Skerry)
                    )
                    .ok();
                }
            }
            if rows.len() > 1 {
                let lines: Vec<Line> = rows.iter().map(|(n, cpus)| self.line(*cpus, n)).collect();
                writeln!(
                    text,
                    "{:<50} {:>11.2} {:>14.2}",
                    format!("  {}, geometric mean", group.name),
                    mean(lines.iter().map(|line| line.to_tcg)),
                    mean(lines.iter().map(|line| line.to_native))
                )
                .ok();
            }
        }
        self.write_verdicts(&mut text);
        text
    }

    fn write_verdicts(&self, text: &mut String) {
        writeln!(text, "\n{:<34} {:>8} {:>10}", "", "measured", "limit").ok();
        for (what, value, limit, kept) in self.verdicts() {
            let verdict = if kept { "kept" } else { "MISSED" };
            writeln!(text, "{what:<34} {value:>8.2} {limit:>10} {verdict}").ok();
        }
        for (system, share) in &self.clocks {
            let percent = share * 100.0;
            writeln!(
                text,
                "clock, {system:?}: at most {percent:.1} % off the host's"
            )
            .ok();
        }
        for (system, group) in &self.failed {
            writeln!(text, "FAILED: {system:?}, {group}").ok();
        }
    }

    /// The same, and every single time.
    pub fn json(&self) -> Value {
        let times: Vec<Value> = self
            .times
            .iter()
            .map(|((system, cpus, name), seconds)| {
                let system = format!("{system:?}").to_lowercase();
                json!({"name": name, "system": system, "cpus": cpus, "seconds": seconds})
            })
            .collect();
        let rows: Vec<Value> = GROUPS
            .iter()
            .flat_map(|group| {
                self.measured(group)
                    .into_iter()
                    .map(move |row| (group, row))
            })
            .map(|(group, (name, cpus))| {
                let line = self.line(cpus, name);
                json!({
                    "name": name, "group": group.name, "cpus": cpus,
                    "native": line.native, "tcg": line.tcg, "skerry": line.skerry,
                    "skerry/tcg": line.to_tcg, "skerry/native": line.to_native,
                    "scaling": self.scaling(System::Skerry, group, name),
                })
            })
            .collect();
        let limits: Vec<Value> = self
            .verdicts()
            .into_iter()
            .map(|(what, value, limit, kept)| {
                json!({"what": what, "measured": value, "limit": limit, "kept": kept})
            })
            .collect();
        json!({
            "peer": self.peer, "rounds": self.rounds, "scale": self.scale, "what": self.what,
            "rows": rows, "limits": limits, "times": times,
            "failed": self.failed.iter().map(|(s, g)| format!("{s:?}, {g}")).collect::<Vec<_>>(),
        })
    }
}

/// Of what was measured: a round that failed has no number.
fn median_of(values: impl Iterator<Item = f64>) -> f64 {
    median(&mut values.filter(|value| value.is_finite()).collect::<Vec<_>>())
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    (values.map(f64::ln).sum::<f64>() / count).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        let mut results = Results::new("peer".into(), 3, 100, false);
        for (native, tcg, skerry) in [(1.0, 2.0, 1.2), (1.0, 8.0, 2.0), (1.0, 4.0, 1.0)] {
            for name in ["x87", "gzip"] {
                results.add(System::Native, 1, name, native);
                results.add(System::Tcg, 1, name, tcg);
                results.add(System::Skerry, 1, name, skerry);
            }
        }
        results
    }

    #[test]
    fn ratios_are_of_pairs() {
        let line = results().line(1, "x87");
        assert_eq!(line.tcg, 4.0);
        assert_eq!(line.to_tcg, 0.25);
        assert_eq!(line.to_native, 1.2);
    }

    #[test]
    fn limits_are_told_apart() {
        let mut results = results();
        assert_eq!(results.misses(), 0);
        for _ in 0..4 {
            results.add(System::Native, 1, "x87", 1.0);
            results.add(System::Skerry, 1, "x87", 1.6);
        }
        let missed: Vec<String> = (results.verdicts().into_iter())
            .filter(|verdict| !verdict.3)
            .map(|verdict| verdict.0)
            .collect();
        assert_eq!(missed, ["x87 / native"]);
    }

    #[test]
    fn a_part_of_a_group_has_no_mean() {
        let verdicts = results().verdicts();
        assert!(!verdicts.iter().any(|verdict| verdict.0.contains("mean")));
    }

    #[test]
    fn a_failed_round_spoils_no_other() {
        let mut results = Results::new(String::new(), 2, 100, false);
        let group = GROUPS.iter().find(|g| g.rows.contains(&"x87")).unwrap();
        results.failed(System::Skerry, group, &["x87"], 0);
        results.add(System::Tcg, 1, "x87", 4.0);
        for (system, seconds) in [(System::Skerry, 1.0), (System::Tcg, 2.0)] {
            results.add(system, 1, "x87", seconds);
        }
        assert_eq!(results.line(1, "x87").to_tcg, 0.5);
        assert!(results.any_failed());
    }

    #[test]
    fn geometric() {
        assert!((mean([1.0, 4.0].into_iter()) - 2.0).abs() < 1e-12);
    }

    #[test]
    fn scaling_is_of_one_system() {
        let mut results = Results::new(String::new(), 1, 100, false);
        results.add(System::Skerry, 1, "sha256sum-twice", 4.0);
        results.add(System::Skerry, 2, "sha256sum-twice", 2.0);
        let group = GROUPS.iter().find(|g| g.scaling.is_some()).unwrap();
        let scaling = results.scaling(System::Skerry, group, "sha256sum-twice");
        assert_eq!(scaling, 2.0);
    }
}
