//! Tests of the transport and the devices from a driver's point of view.

mod block;
mod console;
mod endless;
mod queue;
mod transport;
