//! How the software processor runs code, as a user asks for it.

use serde::{Deserialize, Serialize};
use skerry_hypervisor_soft::Tuning;

use crate::error::EngineError;
use crate::hypervisor::Backend;

/// The most bytes of code and tables that a processor may be given: what branches in it can span.
const MOST_CODE_MEMORY: u64 = 1 << 30;

/// What the software processor does with code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum SoftMode {
    /// It interprets all of it.
    Interpreter,
    /// It compiles what runs often.
    #[default]
    Jit,
    /// It compiles everything the first time, into as little memory as will do: for tests.
    JitStress,
}

/// How the software processor runs code. A guest sees no difference, and no snapshot has it: each
/// machine is told anew. Asking for any of it where another backend runs the machine is an error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct SoftOptions {
    /// What is done with code; `None` is the default.
    pub mode: Option<SoftMode>,
    /// Bytes that each processor may take for decoded and compiled code and the tables of both; `None`
    /// is what is usual for the mode.
    pub code_memory: Option<u64>,
    /// Compiled code holds speculation back where a guest could lead it to memory that isn't its own.
    pub hardened: bool,
    /// Compiled code is told to Linux `perf`, in `/tmp/perf-PID.map`.
    pub perf_map: bool,
}

impl SoftOptions {
    /// The options that were asked for, as the command line has them.
    fn asked(&self) -> impl Iterator<Item = &'static str> {
        let asked = [
            ("--soft-mode", self.mode.is_some()),
            ("--soft-code-memory", self.code_memory.is_some()),
            ("--soft-hardened", self.hardened),
            ("--soft-perf-map", self.perf_map),
        ];
        asked
            .into_iter()
            .filter(|asked| asked.1)
            .map(|asked| asked.0)
    }

    /// Refuses what can't be had together, or not with `backend`.
    pub(crate) fn check(&self, backend: Backend) -> Result<(), EngineError> {
        if backend != Backend::Soft
            && let Some(option) = self.asked().next()
        {
            return Err(EngineError::SoftOption { option, backend });
        }
        if self.mode == Some(SoftMode::Interpreter) {
            for (option, wanted) in [
                ("--soft-hardened", self.hardened),
                ("--soft-perf-map", self.perf_map),
            ] {
                if wanted {
                    return Err(EngineError::NothingCompiled { option });
                }
            }
        }
        let least = Tuning::LEAST_CODE_BYTES as u64;
        match self.code_memory {
            Some(bytes) if !(least..=MOST_CODE_MEMORY).contains(&bytes) => {
                Err(EngineError::CodeMemory { bytes })
            }
            _ => Ok(()),
        }
    }

    /// The same, for the processor.
    pub(crate) fn tuning(&self) -> Tuning {
        let base = match self.mode.unwrap_or_default() {
            SoftMode::Interpreter => Tuning::INTERPRETER,
            SoftMode::Jit => Tuning::JIT,
            SoftMode::JitStress => Tuning::STRESS,
        };
        let wanted = self.code_memory.map(usize::try_from);
        Tuning {
            code_bytes: wanted.and_then(Result::ok).unwrap_or(base.code_bytes),
            hardened: self.hardened,
            perf_map: self.perf_map,
            ..base
        }
    }

    /// The same, with what is usual in place of what was not asked for.
    pub(crate) fn in_full(&self) -> Self {
        Self {
            mode: Some(self.mode.unwrap_or_default()),
            code_memory: Some(self.tuning().code_bytes as u64),
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_the_processors() {
        assert_eq!(SoftOptions::default().tuning(), Tuning::default());
        let mode = |mode| SoftOptions {
            mode: Some(mode),
            ..SoftOptions::default()
        };
        assert_eq!(mode(SoftMode::Interpreter).tuning(), Tuning::INTERPRETER);
        assert_eq!(mode(SoftMode::Jit).tuning(), Tuning::JIT);
        let stress = mode(SoftMode::JitStress);
        assert_eq!(stress.tuning(), Tuning::STRESS);
        assert_eq!(stress.in_full().code_memory, Some(1 << 20));
        let all = SoftOptions {
            code_memory: Some(8 << 20),
            hardened: true,
            perf_map: true,
            ..stress
        };
        let tuning = all.tuning();
        assert_eq!((tuning.threshold, tuning.code_bytes), (1, 8 << 20));
        assert!(tuning.hardened && tuning.perf_map && tuning.compile);
        assert_eq!(all.in_full(), all);
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        let none = SoftOptions::default();
        none.check(Backend::Kvm).expect("nothing was asked for");
        let refused = |options: &SoftOptions, backend| {
            let refused = options.check(backend);
            refused.expect_err("it can't be had").to_string()
        };
        let each = [
            SoftOptions {
                mode: Some(SoftMode::Jit),
                ..none.clone()
            },
            SoftOptions {
                code_memory: Some(64 << 20),
                ..none.clone()
            },
            SoftOptions {
                hardened: true,
                ..none.clone()
            },
            SoftOptions {
                perf_map: true,
                ..none.clone()
            },
        ];
        let names = ["mode", "code-memory", "hardened", "perf-map"];
        for (options, name) in each.iter().zip(names) {
            options.check(Backend::Soft).expect("it can be had");
            let text = refused(options, Backend::Kvm);
            let name = format!("--soft-{name} ");
            assert!(text.contains(&name) && text.contains("kvm"), "{text}");
        }
        for options in &each[2..] {
            let options = SoftOptions {
                mode: Some(SoftMode::Interpreter),
                ..options.clone()
            };
            let text = refused(&options, Backend::Soft);
            assert!(text.contains("interpreter"), "{text}");
        }
        for bytes in [0, (1 << 20) - 1, (1 << 30) + 1, u64::MAX] {
            let options = SoftOptions {
                code_memory: Some(bytes),
                ..none.clone()
            };
            let text = refused(&options, Backend::Soft);
            assert!(text.contains(&bytes.to_string()), "{text}");
        }
    }

    #[test]
    fn options_survive_the_wire() {
        let options = SoftOptions {
            mode: Some(SoftMode::JitStress),
            ..SoftOptions::default()
        };
        let text = serde_json::to_string(&options).expect("JSON");
        assert!(text.contains("\"jit-stress\""), "{text}");
        let back: SoftOptions = serde_json::from_str(&text).expect("options");
        assert_eq!(back, options);
    }
}
