//! Imports an image and says how long it took: `import STORE IMAGE`.

use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [store, image] = &args[..] else {
        return Err("usage: import STORE IMAGE".into());
    };
    let start = Instant::now();
    let store = skerry_oci::Store::open(store)?;
    let image = store.import(&image.parse()?, &mut |p| {
        eprintln!("{:?} {p:?}", start.elapsed())
    })?;
    println!(
        "{:?} {} {} {}",
        start.elapsed(),
        image.digest,
        image.size,
        image.rootfs.display()
    );
    println!("{:?}", image.config);
    Ok(())
}
