//! Waiting for a file to change, without looking at it all the time.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify;

/// Looks at files; where the host gives no means to, time has to do.
#[derive(Debug)]
pub(crate) struct Watch(Option<OwnedFd>);

impl Watch {
    pub(crate) fn new() -> Self {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        Self(inotify::init(flags).ok())
    }

    /// A further file to look at.
    pub(crate) fn add(&mut self, path: &Path) {
        let flags = inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::MOVE_SELF
            | inotify::WatchFlags::DELETE_SELF;
        self.look_at(path, flags);
    }

    /// A folder to look at for files that are new in it.
    pub(crate) fn add_folder(&mut self, path: &Path) {
        self.look_at(path, inotify::WatchFlags::CREATE);
    }

    fn look_at(&mut self, path: &Path, flags: inotify::WatchFlags) {
        let added = self
            .0
            .as_ref()
            .map(|watch| inotify::add_watch(watch, path, flags));
        if let Some(Err(_)) = added {
            self.0 = None;
        }
    }

    /// Waits until a file changes, for so long at most.
    pub(crate) fn wait(&self, limit: Duration) {
        /// So that a host without inotify isn't kept busy, and its user not waiting.
        const LOOK: Duration = Duration::from_millis(20);
        let Some(watch) = &self.0 else {
            return std::thread::sleep(limit.min(LOOK));
        };
        let Ok(limit) = Timespec::try_from(limit) else {
            return;
        };
        let mut waiting = [PollFd::new(watch, PollFlags::IN)];
        if rustix::event::poll(&mut waiting, Some(&limit)).is_ok_and(|ready| ready > 0) {
            // What changed is found by looking.
            let mut events = [0; 4096];
            while rustix::io::read(watch, &mut events).is_ok_and(|length| length > 0) {}
        }
    }
}
