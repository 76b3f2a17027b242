//! What skerry itself says, on stderr.

use std::io::{IsTerminal, Write};

/// Whether stderr takes colours: a terminal, and the user has not asked for none (`NO_COLOR`).
pub fn colours() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::io::stderr().is_terminal()
}

fn line(text: &str) {
    // Where stderr is closed there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "skerry: {text}");
}

/// An error and its causes, each once.
pub fn error(error: &anyhow::Error) {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    line(&text);
}

/// Something the user should know, once.
pub fn note(text: &str) {
    line(text);
}
