//! From the making of a machine to its removal.

use clap::Args;
use skerry_engine::vms::RestartPolicy;

/// What a machine is known by, and when it is started again.
#[derive(Clone, Debug, Default, Args)]
pub struct LifecycleArgs {
    /// Note something about the machine; KEY alone has an empty value
    #[arg(short = 'l', long = "label", value_name = "KEY[=VALUE]")]
    pub labels: Vec<String>,

    /// When to start the machine again after its command has ended: no, on-failure, on-failure:N, always
    /// or unless-stopped
    #[arg(long, value_name = "POLICY", default_value_t, conflicts_with = "rm")]
    pub restart: RestartPolicy,
}

/// `skerry start`.
#[derive(Debug, Args)]
pub struct StartArgs {
    /// Names of virtual machines, their IDs or the IDs' first digits
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<String>,
}
