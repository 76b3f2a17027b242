//! Linux: layer by layer, in the order in which each leaves the next what it needs.

mod calls;
mod child;
mod files;
mod identity;
mod tree;
mod violation;

use std::sync::OnceLock;

use crate::{ConfineError, Layer, Plan, Report, Role, Strictness};

pub(crate) use child::probe;
pub(crate) use violation::last_words;

/// What was done to this process.
struct Active {
    report: Report,
    /// Threads have filters of their own.
    filtered: bool,
    /// Capabilities that the process kept and most threads don't need.
    kept: identity::Kept,
}

static ACTIVE: OnceLock<Active> = OnceLock::new();

pub(crate) fn active() -> Option<&'static Report> {
    ACTIVE.get().map(|active| &active.report)
}

pub(crate) fn confine(plan: &Plan) -> Result<&'static Report, ConfineError> {
    if let Some(active) = ACTIVE.get() {
        return Ok(&active.report);
    }
    let active = apply(plan)?;
    Ok(&ACTIVE.get_or_init(|| active).report)
}

/// Puts the layers on.
fn apply(plan: &Plan) -> Result<Active, ConfineError> {
    let mut report = Report::default();
    if plan.strictness == Strictness::Off {
        return Ok(Active {
            report,
            filtered: false,
            kept: identity::Kept::default(),
        });
    }
    let mut add = |layer, result: Result<String, String>| {
        report.add(layer, result);
        match report.missing() {
            Some(missing) if plan.strictness == Strictness::Strict => {
                Err(ConfineError::Missing(missing.clone()))
            }
            _ => Ok(()),
        }
    };
    // Others would keep their rights: most layers are a thread's.
    let alone = identity::alone(plan);
    // Namespaces take capabilities, which are given up afterwards.
    add(
        Layer::Namespaces,
        alone.clone().and_then(|()| identity::unshare(plan)),
    )?;
    add(Layer::NoNewPrivileges, identity::no_new_privileges())?;
    add(
        Layer::Landlock,
        alone.clone().and_then(|()| files::restrict(plan)),
    )?;
    let kept = identity::Kept::of(plan);
    add(
        Layer::Capabilities,
        alone.clone().and_then(|()| identity::drop_rights(kept)),
    )?;
    add(Layer::NotDumpable, identity::not_dumpable())?;
    let filtered = alone.and_then(|()| calls::filter_process());
    let is_filtered = filtered.is_ok();
    add(Layer::Seccomp, filtered)?;
    Ok(Active {
        report,
        filtered: is_filtered,
        kept,
    })
}

pub(crate) fn enter(role: Role) {
    let Some(active) = ACTIVE.get() else {
        return;
    };
    if role != Role::Share && !active.kept.is_empty() && identity::drop_capabilities().is_err() {
        violation::end_for("keeps capabilities", role);
    }
    if active.filtered && calls::filter_thread(role).is_err() {
        violation::end_for("gets no filter", role);
    }
}
