//! What a process that runs guests keeps of the host: the folders of its machine, the store, its
//! network.
//!
//! ```text
//!  vms::host ─┐
//!  pools ─────┼─ of_vm, of_pool, of_files ─► Plan ─► skerry_confine::confine ─► Report
//!  boot, warm ┘
//! ```

use std::path::PathBuf;

pub use skerry_confine::{Layer, LayerReport, Report, Strictness, probe};
use skerry_confine::{Plan, confine};

use crate::error::EngineError;
use crate::mounts::{MountKind, MountSpec};
use crate::network::NetworkSpec;
use crate::paths::Paths;
use crate::tap;
use crate::vm::VmSpec;
use crate::volumes::Volumes;

/// The first port that anybody may listen at.
const FIRST_FREE_PORT: u16 = 1024;

/// Confines this process to one that runs the machine of `spec`, for good; `own` are the folders of
/// its own. Its threads are to begin after this.
pub fn of_vm(paths: &Paths, spec: &VmSpec, own: &[PathBuf]) -> Result<(), EngineError> {
    hold_tap(&spec.network)?;
    let (scratch, snapshots, vms) = (paths.scratch(), paths.snapshots(), paths.vms());
    let events = paths.events();
    for folder in [&scratch, &snapshots, &events] {
        Paths::ensure(folder)?;
    }
    let mut write = vec![scratch, snapshots, events];
    write.extend_from_slice(own);
    write.extend(shared_networks(paths, &spec.network));
    if spec.options.soft.perf_map {
        write.push("/tmp".into());
    }
    let mut read = vec![paths.images()];
    read.extend(spec.kernel.clone());
    let shares = shared(paths, spec, &mut read, &mut write)?;
    let plan = Plan {
        strictness: spec.options.confine,
        passing: &["probe", "probe-end"],
        read,
        write,
        names: vec![vms.join("names"), vms],
        network: needs_sockets(&spec.network),
        low_ports: has_low_ports(&spec.network),
        shares,
    };
    put_on(&plan)
}

/// Opens the machine's device, which a confined process can't.
fn hold_tap(network: &NetworkSpec) -> Result<(), EngineError> {
    if let Some(spec) = &network.tap {
        tap::hold(spec)?;
    }
    Ok(())
}

/// Whether a network passes by the host's sockets; by a device that is open, it doesn't.
fn needs_sockets(network: &NetworkSpec) -> bool {
    network.card().is_some() && network.tap.is_none()
}

/// Whether ports are published that not anybody may listen at.
fn has_low_ports(network: &NetworkSpec) -> bool {
    let low = |port: u16| (1..FIRST_FREE_PORT).contains(&port);
    let mut published = network.publish.iter();
    published.any(|mapping| low(mapping.host.port()))
}

/// The folders of the networks that a machine shares.
fn shared_networks(paths: &Paths, network: &NetworkSpec) -> impl Iterator<Item = PathBuf> {
    let all = paths.networks();
    network.join.iter().map(move |name| all.join(name))
}

/// Adds the folders and volumes of a machine; tells whether there are folders. Volumes that aren't
/// there are made now, so that the process needs no others.
fn shared(
    paths: &Paths,
    spec: &VmSpec,
    read: &mut Vec<PathBuf>,
    write: &mut Vec<PathBuf>,
) -> Result<bool, EngineError> {
    for mount in &spec.mounts {
        match &mount.kind {
            MountKind::Bind { source } if mount.read_only => read.push(source.clone()),
            MountKind::Bind { source } => write.push(source.clone()),
            MountKind::Volume { name, .. } => {
                let volumes = Volumes::open(paths)?;
                if let Some(name) = name {
                    write.push(volumes.provide(name)?);
                }
            }
            MountKind::Tmpfs { .. } => {}
        }
    }
    Ok(spec.mounts.iter().any(MountSpec::is_bind))
}

/// Confines this process to one that boots a machine from these files, with disks that are open.
pub(crate) fn of_files(
    strictness: Strictness,
    read: Vec<PathBuf>,
    network: Option<(&Paths, &NetworkSpec)>,
) -> Result<(), EngineError> {
    let spec = network.map(|(_, spec)| spec);
    spec.map_or(Ok(()), hold_tap)?;
    let shared = network.map(|(paths, spec)| shared_networks(paths, spec).collect());
    put_on(&Plan {
        strictness,
        read,
        write: shared.unwrap_or_default(),
        network: spec.is_some_and(needs_sockets),
        low_ports: spec.is_some_and(has_low_ports),
        ..Plan::default()
    })
}

fn put_on(plan: &Plan) -> Result<(), EngineError> {
    // Of a process that can't be looked into, only its superuser may open this.
    skerry_machine::prepare_tracking();
    let report = confine(plan)?;
    for layer in &report.layers {
        tracing::debug!(
            layer = layer.layer.name(),
            holds = layer.holds,
            "{}",
            layer.detail
        );
    }
    Ok(())
}
