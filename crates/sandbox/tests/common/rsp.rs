//! A debugger of one test's size: gdb's remote serial protocol (its manual, appendix E).

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A connection to a stub.
pub struct Client {
    stream: TcpStream,
    input: Vec<u8>,
    acknowledged: bool,
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("the stub listens");
        stream.set_nodelay(true).unwrap();
        let limit = Some(Duration::from_secs(60));
        stream.set_read_timeout(limit).unwrap();
        Self {
            stream,
            input: Vec::new(),
            acknowledged: true,
        }
    }

    /// Connects, and shakes hands as gdb does.
    pub fn attach(address: SocketAddr) -> Self {
        let mut client = Self::connect(address);
        let features = client.ask("qSupported:multiprocess-;swbreak+;hwbreak+;vContSupported+");
        assert!(features.contains("QStartNoAckMode+"), "{features}");
        assert_eq!(client.ask("QStartNoAckMode"), "OK");
        client.acknowledged = false;
        assert!(client.ask("?").starts_with("T05"));
        client
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        // The stub may have gone already, which the reader finds out.
        let _ = self.stream.write_all(bytes);
    }

    pub fn send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0_u8, u8::wrapping_add);
        self.raw(format!("${packet}#{sum:02x}").as_bytes());
    }

    fn byte(&mut self) -> Option<u8> {
        if self.input.is_empty() {
            let mut chunk = [0; 4096];
            let len = self.stream.read(&mut chunk).ok()?;
            self.input.extend_from_slice(&chunk[..len]);
        }
        (!self.input.is_empty()).then(|| self.input.remove(0))
    }

    /// The next packet; `None` at the end.
    pub fn receive(&mut self) -> Option<String> {
        while self.byte()? != b'$' {}
        let mut packet = String::new();
        loop {
            match self.byte()? {
                b'#' => break,
                // Run-length encoding: the last character so many times more.
                b'*' => {
                    let times = self.byte()?.checked_sub(29)?;
                    let last = packet.chars().last()?;
                    packet.extend(std::iter::repeat_n(last, times.into()));
                }
                byte => packet.push(byte.into()),
            }
        }
        self.byte()?;
        self.byte()?;
        if self.acknowledged {
            self.raw(b"+");
        }
        Some(packet)
    }

    pub fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.receive().expect("the stub answers")
    }

    pub fn registers(&mut self) -> Vec<u8> {
        bytes(&self.ask("g"))
    }

    /// A general register, in gdb's order: RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, R8 …, RIP 16.
    pub fn register(&mut self, n: usize) -> u64 {
        let all = self.registers();
        u64::from_le_bytes(all[n * 8..n * 8 + 8].try_into().unwrap())
    }

    pub fn rip(&mut self) -> u64 {
        self.register(16)
    }

    pub fn read(&mut self, at: u64, len: usize) -> Vec<u8> {
        bytes(&self.ask(&format!("m{at:x},{len:x}")))
    }

    pub fn write(&mut self, at: u64, data: &[u8]) -> String {
        self.ask(&format!("M{at:x},{:x}:{}", data.len(), hex(data)))
    }

    /// Goes on until the next stop.
    pub fn go(&mut self) -> String {
        self.ask("vCont;c")
    }

    pub fn step(&mut self) -> String {
        self.ask("vCont;s:1")
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks(2);
    digits
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap_or(0))
        .collect()
}
