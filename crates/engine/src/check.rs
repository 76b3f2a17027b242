//! Whether what Skerry keeps on this host is whole: images, snapshots, machines.
//!
//! ```text
//!  images ──── every file system read against its digest ─┐
//!  snapshots ─ every blob read against its digest ────────┼─► Findings ─► repair
//!  machines ── every description read, every name ────────┘
//! ```
//! What a killed process leaves is no damage: the next one to come by sweeps it, and so does this.

use std::fs;
use std::path::Path;

use serde::Serialize;
use skerry_hypervisor::probe::chain;
use skerry_snapshot::{SnapshotStore, Trust};

use crate::error::EngineError;
use crate::paths::Paths;
use crate::vms::Registry;
use crate::{images, snapshots};

/// A thing that isn't whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// `image`, `snapshot` or `vm`.
    pub kind: &'static str,
    /// Its name or identity.
    pub name: String,
    /// What is wrong with it.
    pub problem: String,
    /// It was removed.
    pub repaired: bool,
}

/// What was looked at and found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// Images that were read.
    pub images: usize,
    /// Snapshots that were read, kept starts among them.
    pub snapshots: usize,
    /// Machines that there are.
    pub vms: usize,
    /// What isn't whole.
    pub damaged: Vec<Finding>,
}

impl Findings {
    /// Whether nothing is damaged any more.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.damaged.iter().all(|finding| finding.repaired)
    }
}

/// Reads everything; with `repair`, removes what isn't whole. A machine that runs keeps what it has open.
pub fn check(paths: &Paths, repair: bool) -> Result<Findings, EngineError> {
    let mut findings = Findings::default();
    check_images(paths, repair, &mut findings)?;
    check_snapshots(paths, repair, &mut findings)?;
    check_vms(paths, repair, &mut findings)?;
    Ok(findings)
}

fn check_images(paths: &Paths, repair: bool, findings: &mut Findings) -> Result<(), EngineError> {
    // Opening it sweeps up.
    let store = images::open(paths)?;
    for digest in store.digests()? {
        findings.images += 1;
        let whole = match store.load(&digest) {
            // Removed meanwhile.
            Ok(None) => continue,
            Ok(Some(image)) => store
                .verify(&image)
                .and_then(|()| store.verify_source(&image)),
            Err(error) => Err(error),
        };
        if let Err(error) = whole {
            let repaired = repair && images::discard(paths, &digest.to_string()).is_ok();
            findings.damaged.push(Finding {
                kind: "image",
                name: digest.to_string(),
                problem: chain(&error),
                repaired,
            });
        }
    }
    for name in store.dangling()? {
        let repaired = repair && store.forget_name(&name).is_ok();
        findings.damaged.push(Finding {
            kind: "image",
            name,
            problem: "it names an image that isn't there".to_owned(),
            repaired,
        });
    }
    Ok(())
}

fn check_snapshots(
    paths: &Paths,
    repair: bool,
    findings: &mut Findings,
) -> Result<(), EngineError> {
    let folder = paths.snapshots();
    Paths::ensure(&folder)?;
    let store = SnapshotStore::open(folder)?;
    store.sweep()?;
    for id in store.ids()? {
        findings.snapshots += 1;
        let whole = store.open_chain(&id, Trust::Nothing);
        match whole {
            Ok(_) | Err(skerry_snapshot::Error::NoSuchSnapshot { .. }) => {}
            Err(error) => {
                let repaired = repair && snapshots::remove(paths, &id.hex()).is_ok();
                findings.damaged.push(Finding {
                    kind: "snapshot",
                    name: id.to_string(),
                    problem: chain(&error),
                    repaired,
                });
            }
        }
    }
    Ok(())
}

fn check_vms(paths: &Paths, repair: bool, findings: &mut Findings) -> Result<(), EngineError> {
    let registry = Registry::open(paths)?;
    findings.vms = registry.list()?.len();
    for (name, problem) in registry.unreadable()? {
        let repaired = repair && remove_folder(&paths.vms().join(&name));
        findings.damaged.push(Finding {
            kind: "vm",
            name,
            problem,
            repaired,
        });
    }
    Ok(())
}

fn remove_folder(folder: &Path) -> bool {
    fs::remove_dir_all(folder).is_ok()
}
