//! Bytes from a hostile peer through the frame decoder and every message type of the agent's protocol.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skerry_protocol::frame::{self, FrameDecoder};
use skerry_protocol::message::{ExecCommand, ExecEvent, FromAgent, ToAgent};

fuzz_target!(|pieces: Vec<Vec<u8>>| {
    let mut decoder = FrameDecoder::new();
    for piece in &pieces {
        decoder.push(piece);
        loop {
            let payload = match decoder.next_frame() {
                Ok(Some(payload)) => payload,
                Ok(None) => break,
                Err(_) => return,
            };
            // What decodes has to survive the way back.
            if let Ok(command) = frame::decode::<ExecCommand<'_>>(payload) {
                let mut wire = Vec::new();
                if frame::encode_into(&command, &mut wire).is_ok() {
                    assert_eq!(frame::decode::<ExecCommand<'_>>(&wire[4..]).ok(), Some(command));
                }
            }
            let _ = frame::decode::<ExecEvent<'_>>(payload);
            let _ = frame::decode::<FromAgent>(payload);
            let _ = frame::decode::<ToAgent>(payload);
        }
    }
});
