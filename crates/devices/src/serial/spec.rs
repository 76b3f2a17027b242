//! Register bits of the 16550A (National Semiconductor PC16550D data sheet).

/// Receiver buffer (read), transmitter holding (write), divisor low when DLAB is set.
pub(super) const DATA: u16 = 0;
/// Interrupt enable, divisor high when DLAB is set.
pub(super) const IER: u16 = 1;
/// Interrupt identification (read), FIFO control (write).
pub(super) const IIR_FCR: u16 = 2;
/// Line control.
pub(super) const LCR: u16 = 3;
/// Modem control.
pub(super) const MCR: u16 = 4;
/// Line status.
pub(super) const LSR: u16 = 5;
/// Modem status.
pub(super) const MSR: u16 = 6;
/// Scratch.
pub(super) const SCR: u16 = 7;

pub(super) const IER_RECEIVED: u8 = 0x01;
pub(super) const IER_THR_EMPTY: u8 = 0x02;
pub(super) const IER_LINE_STATUS: u8 = 0x04;
pub(super) const IER_MODEM_STATUS: u8 = 0x08;

pub(super) const IIR_NONE: u8 = 0x01;
pub(super) const IIR_MODEM_STATUS: u8 = 0x00;
pub(super) const IIR_THR_EMPTY: u8 = 0x02;
pub(super) const IIR_RECEIVED: u8 = 0x04;
pub(super) const IIR_LINE_STATUS: u8 = 0x06;
pub(super) const IIR_TIMEOUT: u8 = 0x0c;
pub(super) const IIR_FIFOS_ON: u8 = 0xc0;

pub(super) const FCR_ENABLE: u8 = 0x01;
pub(super) const FCR_CLEAR_RECEIVER: u8 = 0x02;
pub(super) const FCR_CLEAR_TRANSMITTER: u8 = 0x04;

pub(super) const LCR_BREAK: u8 = 0x40;
pub(super) const LCR_DLAB: u8 = 0x80;

pub(super) const MCR_DTR: u8 = 0x01;
pub(super) const MCR_RTS: u8 = 0x02;
pub(super) const MCR_OUT1: u8 = 0x04;
pub(super) const MCR_OUT2: u8 = 0x08;
pub(super) const MCR_LOOP: u8 = 0x10;

pub(super) const LSR_DATA_READY: u8 = 0x01;
pub(super) const LSR_OVERRUN: u8 = 0x02;
pub(super) const LSR_BREAK: u8 = 0x10;
pub(super) const LSR_THR_EMPTY: u8 = 0x20;
pub(super) const LSR_TRANSMITTER_EMPTY: u8 = 0x40;
/// What reading the line status clears, and what its interrupt stands for.
pub(super) const LSR_ERRORS: u8 = 0x1e;

pub(super) const MSR_CTS: u8 = 0x10;
pub(super) const MSR_DSR: u8 = 0x20;
pub(super) const MSR_RI: u8 = 0x40;
pub(super) const MSR_DCD: u8 = 0x80;

/// Bytes in either FIFO.
pub(super) const FIFO_LEN: usize = 16;
