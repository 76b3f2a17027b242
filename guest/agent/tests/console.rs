//! The exec service over a multiplexed stream, as in a guest without vsock.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use skerry_agent::exec::{Accept, ExecServer};
use skerry_protocol::EXEC_PORT;
use skerry_protocol::host::ExecSession;
use skerry_protocol::message::{ExecRequest, ExitStatus};
use skerry_protocol::mux::{Mux, Side};

struct Port(Mux);

impl Accept for Port {
    fn accept(&self) -> io::Result<UnixStream> {
        self.0.accept(EXEC_PORT)
    }
}

#[test]
fn short_commands_over_one_stream_all_get_their_output_and_status() {
    let (host, guest) = UnixStream::pair().unwrap();
    let guest = Mux::start(guest, Side::Guest).unwrap();
    let host = Mux::start(host, Side::Host).unwrap();
    let server = ExecServer::new(Vec::new(), None);
    server.start(&Arc::new(Port(guest))).unwrap();
    let threads: Vec<_> = (0..12u8)
        .map(|number| {
            let host = host.clone();
            std::thread::spawn(move || {
                for _ in 0..20 {
                    let id = rustix::process::getuid().as_raw();
                    let script = format!("echo {number}; exit {number}");
                    let request = ExecRequest {
                        user: format!("{id}:{}", rustix::process::getgid().as_raw()),
                        ..ExecRequest::new(["sh", "-c", &script])
                    };
                    let stream = host.connect(EXEC_PORT).unwrap();
                    let session = ExecSession::start(stream, request).unwrap();
                    let mut output = Vec::new();
                    let status = session.wait(&mut output, &mut io::sink()).unwrap();
                    assert_eq!(status, ExitStatus::Code(number));
                    assert_eq!(output, format!("{number}\n").as_bytes());
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}
