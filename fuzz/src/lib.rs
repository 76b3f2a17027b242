//! What the targets share.

use std::path::PathBuf;

/// Puts an input into the corpus to begin with, where random bytes would hardly ever get past the first checks.
pub fn begin_with(seed: &[u8]) {
    // libFuzzer's first argument that is no option is the corpus; it reads it after this.
    let corpus = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let Some(corpus) = corpus.map(PathBuf::from).filter(|path| path.is_dir()) else {
        return;
    };
    if let Err(error) = std::fs::write(corpus.join("seed"), seed) {
        eprintln!("no seed in {}: {error}", corpus.display());
    }
}
