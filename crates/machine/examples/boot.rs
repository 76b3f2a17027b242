//! Boots a kernel for bring-up: `boot --hypervisor kvm|soft [options] KERNEL [INITRD]`.
//!
//! Options: `--cmdline S`, `--memory MIB`, `--cpus N`, `--cpu-model M`, `--debug-exit PORT`, `--no-reboot`,
//! `--timeout SECONDS`, `--disk FILE`, `--virtio` (entropy, console, sockets). COM1 is standard output.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use skerry_hypervisor::Hypervisor;
use skerry_hypervisor::cpu_model::CpuModel;
use skerry_hypervisor_kvm::Kvm;
use skerry_hypervisor_soft::Soft;
use skerry_machine::{Attachments, DiskConfig, Machine, MachineConfig, MachineHandle, Outcome};

struct Options {
    hypervisor: String,
    config: MachineConfig,
    cpu_model: Option<String>,
    timeout: Option<Duration>,
    disks: Vec<String>,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let mut options = Options {
        hypervisor: "soft".into(),
        config: MachineConfig {
            command_line: None,
            ..MachineConfig::default()
        },
        cpu_model: None,
        timeout: None,
        disks: Vec::new(),
    };
    let config = &mut options.config;
    let mut files = Vec::new();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "--hypervisor" => options.hypervisor = value()?,
            "--cpu-model" => options.cpu_model = Some(value()?),
            "--cmdline" => config.command_line = Some(value()?),
            "--memory" => config.memory = value()?.parse::<u64>()? << 20,
            "--cpus" => config.cpus = value()?.parse()?,
            "--debug-exit" => {
                let port = value()?;
                config.debug_exit = Some(u16::from_str_radix(port.trim_start_matches("0x"), 16)?);
            }
            "--virtio" => {
                config.rng = true;
                config.console = true;
                config.vsock = Some(3);
            }
            "--no-reboot" => config.no_reboot = true,
            "--timeout" => options.timeout = Some(Duration::from_secs(value()?.parse()?)),
            "--disk" => options.disks.push(value()?),
            _ => files.push(arg),
        }
    }
    let mut files = files.into_iter();
    config.kernel = files.next().ok_or("give a kernel")?.into();
    config.initrd = files.next().map(Into::into);
    Ok(options)
}

fn start<H: Hypervisor>(options: Options) -> Result<MachineHandle, Box<dyn Error>> {
    let mut config = options.config;
    let mut attachments = Attachments::default();
    attachments.serial[0] = Some(Box::new(std::io::stdout()));
    for path in options.disks {
        let disk = skerry_storage::RawDisk::open(&path, skerry_storage::Access::ReadWrite)?;
        attachments.disks.push(Arc::new(disk));
        config.disks.push(DiskConfig {
            name: path,
            read_only: false,
            exchangeable: false,
        });
    }
    let cpus = config.cpus;
    let hypervisor = H::open()?;
    let found = H::probe()?;
    eprintln!(
        "boot: {} at {:.0} MIPS",
        found.description,
        found.measured_mips.unwrap_or_default()
    );
    let model = match &options.cpu_model {
        Some(name) => name.parse()?,
        None => CpuModel::best(&found),
    };
    let tables: Vec<_> = (0..cpus)
        .map(|id| model.cpuid(&found, cpus, id))
        .collect::<Result<_, _>>()?;
    let machine = Machine::new(&hypervisor, config, attachments, |id| {
        tables[id as usize].clone()
    })?;
    Ok(machine.start(options.timeout)?)
}

fn run() -> Result<ExitCode, Box<dyn Error>> {
    let options = options()?;
    let started = Instant::now();
    let handle = match options.hypervisor.as_str() {
        "kvm" => start::<Kvm>(options)?,
        "soft" => start::<Soft>(options)?,
        other => return Err(format!("no hypervisor {other}").into()),
    };
    let outcome = handle.wait();
    eprintln!("boot: {:.3} s", started.elapsed().as_secs_f64());
    Ok(match outcome {
        Outcome::GuestCrash { reason, registers } => {
            eprint!("boot: {reason}\n{registers}");
            ExitCode::from(3)
        }
        Outcome::DebugExit(status) => ExitCode::from(status as u8),
        Outcome::PoweredOff | Outcome::Reset => {
            eprintln!("boot: {outcome:?}");
            ExitCode::SUCCESS
        }
        Outcome::TimedOut => {
            eprintln!("boot: timed out (RUST_LOG=debug shows the registers)");
            ExitCode::from(124)
        }
        Outcome::Killed | Outcome::InternalError(_) => {
            eprintln!("boot: {outcome:?}");
            ExitCode::from(125)
        }
    })
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    run().unwrap_or_else(|error| {
        eprintln!("boot: {error}");
        let mut cause = error.source();
        while let Some(source) = cause {
            eprintln!("  {source}");
            cause = source.source();
        }
        ExitCode::from(125)
    })
}
