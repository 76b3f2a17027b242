//! The engine's settings. Compiler and engine must have the same ones: the host's library includes this
//! file.

use wasmtime::{Config, Result};

/// Settings for components that count fuel, or don't.
pub fn config(fuel: bool) -> Result<Config> {
    let mut config = Config::new();
    config.target("pulley64")?;
    // A guest has no virtual memory to arrange and no signals: memories are on its heap, and each access
    // is checked.
    config
        .memory_reservation(0)
        .memory_reservation_for_growth(0)
        .memory_guard_size(0)
        .memory_init_cow(false)
        .signals_based_traps(false)
        // One call at a time, from its beginning to its end.
        .concurrency_support(false)
        .consume_fuel(fuel);
    Ok(config)
}
