//! Tests of the transport and the devices from a driver's point of view.

mod block;
mod console;
mod queue;
mod transport;
