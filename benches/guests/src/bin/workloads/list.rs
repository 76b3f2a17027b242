//! The workloads: what each runs, on what input, and how much of it.

use crate::inputs::Input;
use crate::{kernels, system};

/// What the host asked for.
pub struct Settings {
    /// Sizes and counts, of what they are by default.
    pub percent: u64,
    /// Processors of the machine.
    pub cpus: u64,
    /// On the host itself.
    pub native: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            percent: 100,
            cpus: 1,
            native: false,
        }
    }
}

impl Settings {
    /// `count` at the scale asked for, at least 1.
    pub fn scaled(&self, count: u64) -> u64 {
        (count.saturating_mul(self.percent) / 100).max(1)
    }
}

/// What runs.
pub enum Body {
    /// A function of this program, told how often; what it computed.
    Calls(fn(u64) -> u64),
    /// A command whose words have `COUNT` for how much, run once; and one that brings what it needs
    /// from the disk to memory before.
    Command {
        line: &'static [&'static str],
        warm: &'static [&'static str],
    },
    /// A command, run as often as the count says.
    Repeated { line: &'static [&'static str] },
    /// Commands at the same time. The last one's output counts.
    Together {
        lines: &'static [&'static [&'static str]],
    },
}

/// A workload.
pub struct Work {
    pub name: &'static str,
    pub count: u64,
    pub inputs: &'static [Input],
    pub body: Body,
}

/// The workload of that name.
pub fn find(name: &str) -> Option<Work> {
    list().into_iter().find(|work| work.name == name)
}

const AWK: &str = "BEGIN { for (i = 1; i <= COUNT; i++) { x = x * 0.999 + i / 3.0; y += 1 / (x + i) } \
     printf \"%.6f %.6f\\n\", x, y }";
const SHELL_LOOP: &str =
    "i=0; s=0; while [ $i -lt COUNT ]; do s=$((s + i % 7)); i=$((i + 1)); done; echo $s";
const FORKS: &str =
    "i=0; while [ $i -lt COUNT ]; do /bin/busybox true || exit 1; i=$((i + 1)); done; echo $i";
const FORKS_DYNAMIC: &str =
    "i=0; while [ $i -lt COUNT ]; do /usr/bin/true || exit 1; i=$((i + 1)); done; echo $i";
const GREP: &str = "(zu|ma)[a-z]*(ri|to) .*[aeiou]{2}[a-z]$";

const NBODY: &str = include_str!("nbody.py");
const JSON: &str = include_str!("json_loop.py");
const REGEX: &str = include_str!("regex_loop.py");
const IMPORT: &[&str] = &["/usr/bin/python3", "-c", "import json, math, re"];

fn list() -> Vec<Work> {
    let mut all = files();
    all.extend(of_the_kernel());
    all.extend(own());
    all.extend(languages());
    all
}

const fn command(line: &'static [&'static str], warm: &'static [&'static str]) -> Body {
    Body::Command { line, warm }
}

fn files() -> Vec<Work> {
    let work = |name, count, inputs, body| Work {
        name,
        count,
        inputs,
        body,
    };
    vec![
        work(
            "sha256sum",
            1,
            &[Input::Text],
            command(
                &["/usr/bin/sha256sum", "/tmp/text"],
                &["/usr/bin/sha256sum", "/proc/version"],
            ),
        ),
        work(
            "gzip",
            1,
            &[Input::Text],
            command(
                &["/bin/gzip", "-1", "-n", "-c", "/tmp/text"],
                &["/bin/gzip", "-c", "/proc/version"],
            ),
        ),
        work(
            "awk",
            1_000_000,
            &[],
            command(
                &["/bin/busybox", "awk", AWK],
                &["/bin/busybox", "awk", "BEGIN { print 2 / 3 }"],
            ),
        ),
        work(
            "shell-loop",
            300_000,
            &[],
            command(
                &["/bin/busybox", "sh", "-c", SHELL_LOOP],
                &["/bin/busybox", "true"],
            ),
        ),
        work(
            "sort",
            1,
            &[Input::Text],
            command(
                &["/usr/bin/sort", "--parallel=1", "-S", "256M", "/tmp/text"],
                &["/usr/bin/sort", "/proc/version"],
            ),
        ),
        work(
            "grep",
            1,
            &[Input::Text],
            command(
                &["/bin/grep", "-c", "-E", GREP, "/tmp/text"],
                &["/bin/grep", "-c", "Linux", "/proc/version"],
            ),
        ),
        Work {
            name: "sha256sum-twice",
            count: 1,
            inputs: &[Input::Text],
            body: Body::Together {
                lines: &[
                    &["/usr/bin/sha256sum", "/tmp/text"],
                    &["/usr/bin/sha256sum", "/tmp/text"],
                ],
            },
        },
    ]
}

fn of_the_kernel() -> Vec<Work> {
    vec![
        Work {
            name: "fork-exec",
            count: 300,
            inputs: &[],
            body: command(
                &["/bin/busybox", "sh", "-c", FORKS],
                &["/bin/busybox", "true"],
            ),
        },
        Work {
            name: "fork-exec-dynamic",
            count: 300,
            inputs: &[],
            body: command(
                &["/bin/busybox", "sh", "-c", FORKS_DYNAMIC],
                &["/usr/bin/true"],
            ),
        },
        Work {
            name: "syscalls",
            count: 400_000,
            inputs: &[],
            body: command(
                &[
                    "/bin/busybox",
                    "dd",
                    "if=/dev/zero",
                    "of=/dev/null",
                    "bs=1",
                    "count=COUNT",
                ],
                &["/bin/busybox", "true"],
            ),
        },
        Work {
            name: "ping-pong",
            count: 10_000,
            inputs: &[],
            body: Body::Calls(system::ping_pong),
        },
    ]
}

fn own() -> Vec<Work> {
    let work = |name, count, function| Work {
        name,
        count,
        inputs: &[],
        body: Body::Calls(function),
    };
    vec![
        work("sse2", 1_600_000, kernels::sse2),
        work("avx2", 1_600_000, kernels::avx2),
        work("x87", 200_000, kernels::x87),
        work("memcpy", 300_000, kernels::memcpy),
        work("strlen", 1_000_000, kernels::strlen),
    ]
}

fn languages() -> Vec<Work> {
    let python = |name, count, script| Work {
        name,
        count,
        inputs: &[],
        body: Body::Command {
            line: script,
            warm: IMPORT,
        },
    };
    vec![
        Work {
            name: "python-start",
            count: 5,
            inputs: &[],
            body: Body::Repeated {
                line: &["/usr/bin/python3", "-c", "print(1)"],
            },
        },
        python(
            "python-nbody",
            50_000,
            &["/usr/bin/python3", "-c", NBODY, "COUNT"],
        ),
        python(
            "python-json",
            60,
            &["/usr/bin/python3", "-c", JSON, "COUNT"],
        ),
        python(
            "python-regex",
            15,
            &["/usr/bin/python3", "-c", REGEX, "COUNT"],
        ),
        Work {
            name: "gcc",
            count: 1,
            inputs: &[Input::Source],
            body: command(
                &[
                    "/usr/bin/gcc",
                    "-O1",
                    "-c",
                    "-o",
                    "/tmp/output",
                    "/tmp/source.c",
                ],
                &[
                    "/usr/bin/gcc",
                    "-O1",
                    "-c",
                    "-o",
                    "/tmp/small.o",
                    "/tmp/small.c",
                ],
            ),
        },
        Work {
            name: "tcc",
            count: 60,
            inputs: &[Input::Source],
            body: Body::Repeated {
                line: &["/usr/bin/tcc", "-c", "-o", "/tmp/output", "/tmp/source.c"],
            },
        },
    ]
}
