//! What is measured, and what each may cost at most.

use anyhow::{Result, bail};

/// The row that no guest program measures: from process start to power-off.
pub const BOOT: &str = "boot";

/// Workloads that have their limits in common.
pub struct Group {
    pub name: &'static str,
    pub rows: &'static [&'static str],
    /// Processors of the machines that it runs on, one after the other. The last counts.
    pub cpus: &'static [u32],
    /// Of TCG's time, each row at most.
    pub tcg_each: f64,
    /// Of TCG's time, the geometric mean at most.
    pub tcg_mean: Option<f64>,
    /// Of the native time, each row at most.
    pub native_each: Option<f64>,
    /// Of the native time, the geometric mean at most.
    pub native_mean: Option<f64>,
    /// How much faster it is at least than on one processor.
    pub scaling: Option<f64>,
}

const NONE: Group = Group {
    name: "",
    rows: &[],
    cpus: &[1],
    tcg_each: f64::INFINITY,
    tcg_mean: None,
    native_each: None,
    native_mean: None,
    scaling: None,
};

/// All, in the order in which they run.
pub const GROUPS: [Group; 6] = [
    Group {
        name: "start",
        rows: &[BOOT],
        tcg_each: 0.5,
        ..NONE
    },
    Group {
        name: "files",
        rows: &["sha256sum", "gzip", "awk", "shell-loop", "sort", "grep"],
        tcg_each: 0.7,
        tcg_mean: Some(0.4),
        native_mean: Some(2.5),
        ..NONE
    },
    Group {
        name: "kernel",
        rows: &["fork-exec", "fork-exec-dynamic", "syscalls", "ping-pong"],
        tcg_each: 0.8,
        ..NONE
    },
    Group {
        name: "vectors",
        rows: &["sse2", "avx2", "x87", "memcpy", "strlen"],
        tcg_each: 0.25,
        native_each: Some(1.5),
        ..NONE
    },
    Group {
        name: "languages",
        rows: &[
            "python-start",
            "python-nbody",
            "python-json",
            "python-regex",
            "gcc",
            "tcc",
        ],
        tcg_each: 0.5,
        native_each: Some(3.0),
        ..NONE
    },
    Group {
        name: "two-processors",
        rows: &["sha256sum-twice"],
        cpus: &[1, 2],
        tcg_each: 0.7,
        scaling: Some(1.8),
        ..NONE
    },
];

/// The rows that are meant: all, or those named, also by their group.
pub fn chosen(only: &[String]) -> Result<Vec<&'static str>> {
    let mut rows = Vec::new();
    for wanted in only {
        let before = rows.len();
        for group in &GROUPS {
            let whole = group.name == wanted;
            rows.extend(group.rows.iter().filter(|row| whole || *row == wanted));
        }
        if rows.len() == before {
            bail!("There is no workload or group {wanted}: {}", known());
        }
    }
    if only.is_empty() {
        rows.extend(GROUPS.iter().flat_map(|group| group.rows));
    }
    Ok(rows)
}

fn known() -> String {
    let groups: Vec<String> = GROUPS
        .iter()
        .map(|group| format!("{} ({})", group.name, group.rows.join(", ")))
        .collect();
    groups.join("; ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn rows_are_chosen_by_name_and_by_group() {
        let chosen = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&n| n.to_owned()).collect();
            super::chosen(&names)
        };
        assert_eq!(chosen(&["gzip"]).unwrap(), ["gzip"]);
        assert_eq!(chosen(&["start", "x87"]).unwrap(), ["boot", "x87"]);
        assert_eq!(chosen(&[]).unwrap().len(), 23);
        assert!(chosen(&["nonsense"]).is_err());
    }
}
