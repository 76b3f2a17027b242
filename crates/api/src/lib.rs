//! `skerry serve`: what the command line does, over HTTP on a Unix socket.
//!
//! ```text
//!  socket ─► router ─┬─ /api/v1/…   Skerry's own: JSON as the command prints it     (native)
//!                    │              described by an OpenAPI document made from the handlers
//!                    └─ /…, /v1.N/… as much of the Docker Engine API as its client needs  (docker)
//!                            │
//!                            └─► engine, on threads that may wait  (work)
//! ```
//! The server keeps nothing: machines are found in the registry, as every other process finds them, and
//! go on when the server ends. Who may open the socket may do everything its user may do with machines;
//! it is the user's own, and nobody else's.
//!
//! Called by `cli`; an embedder calls [`serve`] with a listener of its own.

#![forbid(unsafe_code)]

mod docker;
mod error;
mod follow;
mod native;
mod server;
mod streams;
mod unread;
mod work;

pub use native::document;
pub use server::{Options, ServeError, listen, serve};
