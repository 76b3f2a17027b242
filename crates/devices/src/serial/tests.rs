//! Tests of the 16550A as a driver sees it.

use super::*;
use crate::irq::testing::LineProbe;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Rig {
    uart: Arc<Uart>,
    probe: Arc<LineProbe>,
    sink: Sink,
}

fn rig() -> Rig {
    let (probe, irq) = LineProbe::new();
    let sink = Sink::default();
    let uart = Uart::new(irq, Some(Box::new(sink.clone()))).unwrap();
    uart.write(MCR, &[MCR_OUT2]);
    Rig { uart, probe, sink }
}

impl Rig {
    fn read(&self, register: u16) -> u8 {
        let mut data = [0];
        self.uart.read(register, &mut data);
        data[0]
    }
    fn write(&self, register: u16, value: u8) {
        self.uart.write(register, &[value]);
    }
}

#[test]
fn output_reaches_the_sink_in_order() {
    let r = rig();
    for byte in b"hello, world" {
        assert_ne!(r.read(LSR) & LSR_THR_EMPTY, 0);
        r.write(DATA, *byte);
    }
    r.uart.flush();
    assert_eq!(*r.sink.0.lock(), b"hello, world");
}

#[test]
fn thr_interrupt_follows_the_drivers_probe() {
    let r = rig();
    // Enabling with an empty THR interrupts; reading the IIR clears it; enabling anew raises it again.
    // Linux's 8250 driver tests exactly this at start-up.
    r.write(IER, IER_THR_EMPTY);
    assert!(r.probe.level());
    assert_eq!(r.read(IIR_FCR), IIR_THR_EMPTY);
    assert!(!r.probe.level());
    assert_eq!(r.read(IIR_FCR), IIR_NONE);
    r.write(IER, 0);
    r.write(IER, IER_THR_EMPTY);
    assert_eq!(r.read(IIR_FCR), IIR_THR_EMPTY);
    // A byte that leaves at once makes the THR empty again: one interrupt for each.
    let edges = r.probe.edges();
    r.write(DATA, b'x');
    assert_eq!(r.probe.edges(), edges + 1);
    assert_eq!(r.read(IIR_FCR), IIR_THR_EMPTY);
}

#[test]
fn receiver_reports_trigger_and_timeout() {
    let r = rig();
    r.write(IIR_FCR, FCR_ENABLE | 0x40);
    r.write(IER, IER_RECEIVED);
    let input = r.uart.input();
    assert_eq!(input.push(b"ab"), 2);
    assert!(r.probe.level());
    assert_eq!(r.read(IIR_FCR), IIR_TIMEOUT | IIR_FIFOS_ON);
    assert_eq!(input.push(b"cd"), 2);
    assert_eq!(r.read(IIR_FCR), IIR_RECEIVED | IIR_FIFOS_ON);
    for expected in b"abcd" {
        assert_ne!(r.read(LSR) & LSR_DATA_READY, 0);
        assert_eq!(r.read(DATA), *expected);
    }
    assert!(!r.probe.level());
    assert_eq!(r.read(LSR) & LSR_DATA_READY, 0);
}

#[test]
fn input_waits_for_room() {
    let r = rig();
    r.write(IIR_FCR, FCR_ENABLE);
    r.write(IER, IER_RECEIVED);
    let input = r.uart.input();
    let text: Vec<u8> = (0..100).collect();
    assert_eq!(input.push(&text), 16);
    assert_eq!(input.push(b"z"), 0);
    assert_eq!(input.push_all(b"z", Duration::from_millis(1)), 0);
    std::thread::scope(|scope| {
        let rest = &text[16..];
        let writer = scope.spawn(move || input.push_all(rest, Duration::from_secs(30)));
        let mut got = Vec::new();
        while got.len() < text.len() {
            if r.read(LSR) & LSR_DATA_READY != 0 {
                got.push(r.read(DATA));
            } else {
                std::thread::yield_now();
            }
        }
        assert_eq!(got, text);
        assert_eq!(writer.join().unwrap(), 84);
    });
}

#[test]
fn loopback_tests_the_modem_lines_and_the_data_path() {
    let r = rig();
    assert_eq!(r.read(MSR) & 0xf0, MSR_CTS | MSR_DSR | MSR_DCD);
    r.write(MCR, MCR_LOOP | MCR_RTS | MCR_OUT2);
    // What Linux's autoconfiguration looks for: loop-back with RTS and OUT2 shows CTS and DCD.
    assert_eq!(r.read(MSR) & 0xf0, MSR_CTS | MSR_DCD);
    r.write(DATA, 0x5a);
    assert_eq!(r.read(DATA), 0x5a);
    assert_eq!(r.uart.input().push(b"x"), 0, "cut off from the line");
    r.write(DATA, 1);
    r.write(DATA, 2);
    assert_eq!(r.read(LSR) & LSR_OVERRUN, LSR_OVERRUN);
    assert_eq!(r.read(LSR) & LSR_OVERRUN, 0);
    assert_eq!(r.read(DATA), 2);
    r.uart.flush();
    assert!(r.sink.0.lock().is_empty());
}

#[test]
fn priorities_of_pending_interrupts() {
    let r = rig();
    r.write(IIR_FCR, FCR_ENABLE);
    r.write(IER, 0x0f);
    r.uart.input().send_break();
    r.write(MCR, MCR_OUT2 | MCR_LOOP);
    r.write(MCR, MCR_OUT2);
    assert_eq!(r.read(IIR_FCR) & 0x0f, IIR_LINE_STATUS);
    assert_eq!(r.read(LSR) & LSR_BREAK, LSR_BREAK);
    assert_eq!(r.read(IIR_FCR) & 0x0f, IIR_RECEIVED);
    assert_eq!(r.read(DATA), 0);
    assert_eq!(r.read(IIR_FCR) & 0x0f, IIR_THR_EMPTY);
    assert_eq!(r.read(IIR_FCR) & 0x0f, IIR_MODEM_STATUS);
    assert_ne!(r.read(MSR) & 0x0f, 0);
    assert_eq!(r.read(IIR_FCR) & 0x0f, IIR_NONE);
    assert!(!r.probe.level());
}

#[test]
fn divisor_scratch_and_detection() {
    let r = rig();
    r.write(LCR, LCR_DLAB | 3);
    r.write(DATA, 0x34);
    r.write(IER, 0x12);
    assert_eq!((r.read(DATA), r.read(IER)), (0x34, 0x12));
    r.write(LCR, 3);
    assert_eq!(r.read(IER), 0);
    r.write(SCR, 0xa5);
    assert_eq!(r.read(SCR), 0xa5);
    r.write(IIR_FCR, FCR_ENABLE);
    assert_eq!(
        r.read(IIR_FCR) & IIR_FIFOS_ON,
        IIR_FIFOS_ON,
        "a 16550A, not a 16550"
    );
    r.write(IIR_FCR, 0);
    assert_eq!(r.read(IIR_FCR), IIR_NONE);
}

#[test]
fn out2_gates_the_interrupt() {
    let r = rig();
    r.write(MCR, 0);
    r.write(IER, IER_THR_EMPTY);
    assert!(!r.probe.level());
    r.write(MCR, MCR_OUT2);
    assert!(r.probe.level());
}

#[test]
fn state_round_trip_and_refusal() {
    let r = rig();
    r.write(IIR_FCR, FCR_ENABLE | 0xc0);
    r.write(IER, IER_RECEIVED);
    r.uart.input().push(b"pending");
    let saved = r.uart.save();
    let other = rig();
    other.uart.restore(saved.clone()).unwrap();
    assert!(other.probe.level());
    assert_eq!(other.read(DATA), b'p');
    let mut bad = saved;
    bad.received.extend([0; 32]);
    assert!(other.uart.restore(bad).is_err());
}

#[test]
fn input_waits_until_the_guest_listens() {
    let r = rig();
    let input = r.uart.input();
    assert_eq!(input.push(b"x"), 0, "no driver yet");
    // Linux sets all the bits to see which model this is.
    r.write(MCR, 1);
    r.write(IER, 0xf);
    assert_eq!(input.push(b"x"), 0, "a probe");
    r.write(IER, 0);
    r.write(MCR, MCR_OUT2);
    r.write(IER, IER_RECEIVED);
    assert_eq!(input.push(b"x"), 1);
    assert_eq!(r.read(DATA), b'x');
    // Linux enables the interrupt before the FIFOs.
    assert_eq!(input.push(b"yz"), 1);
    r.write(IIR_FCR, FCR_ENABLE);
    r.write(IIR_FCR, FCR_ENABLE | 0x80);
    assert_eq!(input.push(b"z"), 1);
    assert_eq!((r.read(DATA), r.read(DATA)), (b'y', b'z'));
    // A driver that polls: many looks at the line status without sending.
    r.uart.reset();
    for _ in 0..63 {
        r.read(LSR);
    }
    r.write(DATA, b'>');
    r.read(LSR);
    assert_eq!(input.push(b"x"), 0, "it waited for the transmitter");
    for _ in 0..64 {
        r.read(LSR);
    }
    assert_eq!(input.push(b"x"), 1);
    assert_ne!(r.read(LSR) & LSR_DATA_READY, 0);
}

/// A sink that takes nothing until it is let.
struct Stuck(Arc<parking_lot::Mutex<()>>);

impl std::io::Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        drop(self.0.lock());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Linux's console polls the line status while its output has to wait: it doesn't take input yet.
#[test]
fn waiting_for_the_transmitter_is_not_listening() {
    let stuck = Arc::new(parking_lot::Mutex::new(()));
    let held = stuck.lock();
    let (_, irq) = LineProbe::new();
    let uart = Uart::new(irq, Some(Box::new(Stuck(stuck.clone())))).unwrap();
    let status = || {
        let mut data = [0];
        uart.read(LSR, &mut data);
        data[0]
    };
    let mut sent = 0;
    while status() & LSR_THR_EMPTY != 0 {
        uart.write(DATA, b"x");
        sent += 1;
        assert!(sent < 10_000_000, "the transmitter never fills");
    }
    for _ in 0..200 {
        status();
    }
    assert_eq!(uart.input().push(b"y"), 0);
    drop(held);
}
