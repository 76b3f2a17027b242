//! Boots some machines at a time and stops them again: `fleet SKERRY COUNT`.

use std::time::Duration;

use skerry_engine::Paths;
use skerry_engine::driver::{Driver, MachineSpec, Manager, Vms};
use skerry_engine::vms::ReadyMark;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(program), Some(count)) = (args.next(), args.next()) else {
        return Err("usage: fleet SKERRY COUNT".into());
    };
    let count: usize = count.parse()?;
    let manager = Manager::new(Vms::new(Paths::of_user()?, program))
        .parallel(4)
        .stop_on_drop(Duration::from_secs(10));
    let specs = (0..count).map(|number| {
        let command = ["sh", "-c", "echo up; exec sleep 1000"];
        let mut spec = MachineSpec::new("demo", command).name(format!("fleet-{number}"));
        spec.run.ready = Some(ReadyMark::Text("up".to_owned()));
        spec
    });
    for booted in manager.boot_all(&specs.collect::<Vec<_>>()) {
        booted?;
    }
    for (id, error) in manager.wait_ready(Duration::from_secs(30)) {
        eprintln!("{id}: {error}");
    }
    for id in manager.machines() {
        println!("{id} {}", manager.driver().state(&id)?.name());
    }
    Ok(())
}
