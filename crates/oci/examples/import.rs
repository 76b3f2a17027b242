//! Imports an image and says how long it took: `import STORE IMAGE`.

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

fn import(store: &str, image: &str) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let store = skerry_oci::Store::open(store)?;
    let image = store.import(&image.parse()?, &mut |p| {
        eprintln!("{:?} {p:?}", start.elapsed())
    })?;
    println!(
        "{:?} {} {} bytes",
        start.elapsed(),
        image.digest,
        image.size
    );
    println!("{}", image.rootfs.display());
    println!("{:?}", image.config);
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = match &args[..] {
        [store, image] => import(store, image),
        _ => Err("usage: import STORE IMAGE".into()),
    };
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    eprint!("{error}");
    let mut source = error.source();
    while let Some(error) = source {
        eprint!(": {error}");
        source = error.source();
    }
    eprintln!();
    ExitCode::from(125)
}
