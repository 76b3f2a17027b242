//! The body of the fuzz target, kept here so that plain tests run it too.

use std::ffi::CString;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use skerry_storage::{IoBuf, IoBufMut};

use crate::wire::Opcode;
use crate::{Answer, REPLY_HEADER, REQUEST_HEADER, RequestHeader, Share, ShareOptions};

/// A folder with a secret beside it.
struct Place {
    outer: tempfile::TempDir,
}

const SECRET: &[u8] = b"what no guest may read";

impl Place {
    fn inner(&self) -> std::path::PathBuf {
        self.outer.path().join("shared")
    }

    fn new() -> Self {
        let outer = tempfile::tempdir().expect("folder");
        let place = Self { outer };
        std::fs::create_dir(place.inner()).expect("folder");
        std::fs::write(place.outer.path().join("secret"), SECRET).expect("secret");
        std::os::unix::fs::symlink("../secret", place.inner().join("link")).expect("link");
        std::fs::write(place.inner().join("file"), "content").expect("file");
        std::fs::create_dir(place.inner().join("folder")).expect("folder");
        place
    }
}

fn place() -> &'static Place {
    static PLACE: OnceLock<Place> = OnceLock::new();
    PLACE.get_or_init(Place::new)
}

/// A folder for a device to share, with a secret beside it.
pub fn share() -> Arc<Share> {
    Share::open(&place().inner(), ShareOptions::default()).expect("share")
}

/// Fails if what is outside the folder was changed.
pub fn nothing_left_the_folder() {
    let outer = place().outer.path();
    let secret = std::fs::read(outer.join("secret")).expect("secret");
    assert_eq!(secret, SECRET, "the secret was changed");
    assert_eq!(entries(outer), 2, "something was made outside");
}

/// Any bytes as a session: each request is a length, then so many bytes of it behind a made-up header.
/// What is outside the folder must be neither read nor changed.
pub fn share_session(bytes: &[u8]) {
    let share = share();
    let mut reply = Vec::new();
    let mut rest = bytes;
    while let Some((&[opcode, node, len], after)) = rest.split_first_chunk() {
        let (args, after) = after.split_at(after.len().min(len.into()));
        rest = after;
        if Opcode::of(opcode.into()) == Some(Opcode::SyncFs) {
            // Right, and slow.
            continue;
        }
        let mut request = vec![0; REQUEST_HEADER];
        request[4..8].copy_from_slice(&u32::from(opcode).to_le_bytes());
        request[16..24].copy_from_slice(&u64::from(node).to_le_bytes());
        request.extend_from_slice(args);
        one(&share, &request, &mut reply);
        assert!(!contains(&reply, SECRET), "the secret was read");
        // A session that is put back has no more rights.
        if opcode == 0 {
            let _ = share.restore(share.save());
        }
    }
    nothing_left_the_folder();
}

fn one(share: &Share, request: &[u8], reply: &mut Vec<u8>) {
    let mut header = [0; REQUEST_HEADER];
    header.copy_from_slice(&request[..REQUEST_HEADER]);
    let header = RequestHeader::parse(&header);
    let (args, data) = request.split_at(header.args_end(request.len()));
    if header.is_write()
        && let Some(args) = args[REQUEST_HEADER..].first_chunk()
    {
        let _ = share.writes_quickly(args);
    }
    let mut buffer = [0; 256];
    let room = [IoBufMut::from(&mut buffer[..])];
    let room = if header.fills_buffers() {
        &room[..]
    } else {
        &[]
    };
    let answer = share.serve(args, &[IoBuf::from(data)], room, 4096, reply);
    match answer {
        Answer::Silent => assert!(header.is_silent()),
        Answer::Bytes | Answer::Filled(_) => {
            let len = u32::from_le_bytes([reply[0], reply[1], reply[2], reply[3]]) as usize;
            let filled = match answer {
                Answer::Filled(filled) => filled,
                _ => 0,
            };
            assert!(reply.len() >= REPLY_HEADER && len == reply.len() + filled);
        }
    }
    assert!(!contains(&buffer, SECRET), "the secret was read");
}

fn contains(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}

fn entries(folder: &Path) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}

/// Any bytes as the saved state of a session.
pub fn share_state(bytes: &[u8]) {
    let place = place();
    let Ok(state) = serde_json::from_slice::<crate::ShareState>(bytes) else {
        return;
    };
    let only = Some(CString::new("file").expect("name"));
    for only in [None, only] {
        let options = ShareOptions {
            read_only: true,
            only,
        };
        let share = Share::open(&place.inner(), options).expect("share");
        if share.restore(state.clone()).is_err() {
            continue;
        }
        let mut reply = Vec::new();
        for node in 1..64_u8 {
            for opcode in [1, 3, 5, 15] {
                let mut request = vec![0; REQUEST_HEADER];
                request[4..8].copy_from_slice(&u32::to_le_bytes(opcode));
                request[16] = node;
                request.extend_from_slice(&u64::from(node).to_le_bytes());
                request.extend_from_slice(&[0; 32]);
                one(&share, &request, &mut reply);
                assert!(!contains(&reply, SECRET), "the secret was read");
            }
        }
    }
}
