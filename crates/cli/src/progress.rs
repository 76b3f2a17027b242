//! How transfers get on, on a terminal.

use std::collections::HashMap;
use std::io::IsTerminal;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use skerry_engine::{Digest, Name, Progress};

use crate::output;

/// A bar for each part that travels; nothing where stderr is no terminal.
pub struct Bars {
    quiet: bool,
    on_terminal: Option<MultiProgress>,
    bars: HashMap<Digest, ProgressBar>,
    waiting: bool,
}

impl Bars {
    /// Nothing is shown where it is to be `quiet`.
    pub fn new(quiet: bool) -> Self {
        let shown = !quiet && std::io::stderr().is_terminal();
        Self {
            quiet,
            on_terminal: shown
                .then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr())),
            bars: HashMap::new(),
            waiting: false,
        }
    }

    /// Shows what there is to say about getting or sending `name`.
    pub fn show(&mut self, name: &Name, progress: Progress) {
        match progress {
            Progress::Transfer { digest, done, size } => self.transfer(digest, done, size),
            Progress::Waiting if !self.quiet && !self.waiting => {
                self.waiting = true;
                self.say(&format!(
                    "waiting for another process that gets parts of {name} too"
                ));
            }
            Progress::Writing => self.say(&format!("writing the file system of {name}")),
            _ => {}
        }
    }

    /// Among the bars, as a line that stays for this long.
    fn say(&self, text: &str) {
        match &self.on_terminal {
            Some(bars) => bars.suspend(|| output::note(text)),
            None if self.waiting => output::note(text),
            None => {}
        }
    }

    fn transfer(&mut self, digest: Digest, done: u64, size: Option<u64>) {
        let Some(on_terminal) = &self.on_terminal else {
            return;
        };
        let bar = self.bars.entry(digest).or_insert_with(|| {
            let bar = on_terminal.add(ProgressBar::new(size.unwrap_or(0)));
            let template = "{prefix} [{bar:30}] {bytes} of {total_bytes}  {bytes_per_sec}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(digest.hex().chars().take(12).collect::<String>());
            bar
        });
        bar.set_position(done);
        if size == Some(done) {
            bar.finish();
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        if let Some(bars) = &self.on_terminal {
            // What is left on the screen is the result.
            let _ = bars.clear();
        }
    }
}
