//! A network as its owner sees it: made of options, plugged into a card, asked what it has done.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use ipnet::IpNet;
use parking_lot::Mutex;
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, epoll};
use rustix::process::{Resource, Rlimit};
use rustix::time::Timespec;
use skerry_devices::virtio::net::{Connection, NetBackend, NetPort};

use crate::counters::Counters;
use crate::policy::{Denial, NetworkMode};
use crate::publish::{Listener, Mapping, Published};
use crate::rules::Rule;
use crate::segment::{Attached, Segment};
use crate::stack::{Stack, WAKE};
use crate::tap::{Bridge, OnTap};

/// Events that are taken at a time.
const EVENTS: usize = 256;

/// What a network is made with.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// How far it reaches.
    pub mode: NetworkMode,
    /// Ports of the guest's that the host is to listen at.
    pub publish: Vec<Mapping>,
    /// Name servers in place of the host's.
    pub dns: Vec<SocketAddr>,
    /// What it may reach, if not everything that its mode lets it.
    pub allow: Vec<Rule>,
    /// What it may not reach, whatever else says so.
    pub deny: Vec<IpNet>,
    /// It is the host's network behind this device, and nothing else of these counts.
    pub tap: Option<OnTap>,
}

/// Why a network can't be made.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The host's port is taken, or not the user's to take.
    #[error("Can't listen at {host} for port {guest} of the guest: publish it at another port", host = .0.host, guest = .0.guest)]
    Listen(Mapping, #[source] io::Error),
    /// The host has no more descriptors or threads.
    #[error("Can't make a network for the guest: the host may be out of threads or open files")]
    Resource(#[source] io::Error),
}

/// Wakes the thread of a stack.
struct Waker {
    event: OwnedFd,
    pending: AtomicBool,
}

impl Waker {
    fn wake(&self) {
        if !self.pending.swap(true, Ordering::SeqCst) {
            // It fails only where the counter is at its end, and then the thread wakes anyway.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        }
    }

    fn clear(&self) {
        let mut count = [0; 8];
        // Nothing to read is as good.
        let _ = rustix::io::read(&self.event, &mut count);
        self.pending.store(false, Ordering::SeqCst);
    }
}

/// Who is at the other end of the card.
enum End {
    Stack(Box<Stack>),
    Bridge(Box<Bridge>),
}

impl End {
    fn turn(&mut self, events: &[(u64, epoll::EventFlags)]) -> Option<Timespec> {
        match self {
            Self::Stack(stack) => stack.turn(events),
            Self::Bridge(bridge) => bridge.turn(events),
        }
    }

    fn finish(&mut self) {
        match self {
            Self::Stack(stack) => stack.finish(),
            Self::Bridge(bridge) => bridge.finish(),
        }
    }

    fn counters(&self) -> Counters {
        match self {
            Self::Stack(stack) => stack.counters(),
            Self::Bridge(bridge) => bridge.counters(),
        }
    }

    /// The stack, where there is one.
    fn stack(&self) -> Option<&Stack> {
        match self {
            Self::Stack(stack) => Some(stack),
            Self::Bridge(_) => None,
        }
    }
}

struct Shared {
    epoll: Arc<OwnedFd>,
    waker: Waker,
    stop: AtomicBool,
    /// There is one once a card is plugged in.
    end: Mutex<Option<End>>,
}

/// The network of one machine. It ends when it is dropped, or its card is.
pub struct Network {
    shared: Arc<Shared>,
    options: Options,
    /// Until a card is plugged in.
    listeners: Mutex<Vec<Listener>>,
    published: Vec<Published>,
    /// Likewise until then.
    segments: Mutex<Vec<Segment>>,
    attached: Vec<Attached>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Lets the process have as many files open as it may: a connection takes one.
fn raise_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit {
            current: limit.maximum,
            ..limit
        };
        // There are fewer connections otherwise, which are refused when it comes to that.
        let _ = rustix::process::setrlimit(Resource::Nofile, raised);
    }
}

impl Network {
    /// Makes a network and listens at the ports that are published; it is part of the shared ones that
    /// `segments` are places on.
    pub fn new(options: &Options, segments: Vec<Segment>) -> Result<Arc<Self>, NetworkError> {
        raise_limit();
        let open = |mapping: &Mapping| {
            Listener::open(*mapping).map_err(|error| NetworkError::Listen(*mapping, error))
        };
        let listeners: Vec<_> = options.publish.iter().map(open).collect::<Result<_, _>>()?;
        let failed = |error: rustix::io::Errno| NetworkError::Resource(error.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = rustix::event::eventfd(0, flags).map_err(failed)?;
        let data = epoll::EventData::new_u64(WAKE);
        epoll::add(&epoll, &event, data, epoll::EventFlags::IN).map_err(failed)?;
        let mut role = skerry_confine::Role::Network;
        if let Some(tap) = &options.tap {
            tap.device.watch(&epoll).map_err(NetworkError::Resource)?;
            role = skerry_confine::Role::Tap;
        }
        let shared = Arc::new(Shared {
            epoll: Arc::new(epoll),
            waker: Waker {
                event,
                pending: AtomicBool::new(false),
            },
            stop: AtomicBool::new(false),
            end: Mutex::new(None),
        });
        let running = shared.clone();
        let thread = std::thread::Builder::new()
            .name("network".to_owned())
            .stack_size(512 << 10)
            .spawn(move || {
                skerry_confine::enter(role);
                run(&running);
            })
            .map_err(NetworkError::Resource)?;
        Ok(Arc::new(Self {
            shared,
            options: options.clone(),
            attached: segments.iter().map(Segment::attached).collect(),
            segments: Mutex::new(segments),
            published: listeners
                .iter()
                .map(|listener| listener.published)
                .collect(),
            listeners: Mutex::new(listeners),
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// How far it reaches.
    #[must_use]
    pub fn mode(&self) -> NetworkMode {
        self.options.mode
    }

    /// What it was made with.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Its places on shared networks.
    #[must_use]
    pub fn attached(&self) -> &[Attached] {
        &self.attached
    }

    /// What the guest was denied last.
    #[must_use]
    pub fn denials(&self) -> Vec<Denial> {
        let end = self.shared.end.lock();
        let stack = end.as_ref().and_then(End::stack);
        stack.map(Stack::denials).unwrap_or_default()
    }

    /// The ports that the host listens at.
    #[must_use]
    pub fn published(&self) -> &[Published] {
        &self.published
    }

    /// What it has done.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let end = self.shared.end.lock();
        end.as_ref().map(End::counters).unwrap_or_default()
    }

    fn end(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // Past what is pending: the thread looks for the stop first.
        self.shared.waker.pending.store(false, Ordering::SeqCst);
        self.shared.waker.wake();
        if let Some(thread) = self.thread.lock().take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl NetBackend for Network {
    fn attach(&self, port: NetPort) {
        let end = match &self.options.tap {
            Some(tap) => End::Bridge(Box::new(Bridge::new(port, tap.device.clone()))),
            None => End::Stack(Box::new(Stack::new(
                port,
                self.shared.epoll.clone(),
                &self.options,
                std::mem::take(&mut *self.listeners.lock()),
                std::mem::take(&mut *self.segments.lock()),
            ))),
        };
        *self.shared.end.lock() = Some(end);
        self.wake();
    }

    fn wake(&self) {
        self.shared.waker.wake();
    }

    fn connections(&self) -> Vec<Connection> {
        let end = self.shared.end.lock();
        let stack = end.as_ref().and_then(End::stack);
        stack.map(Stack::connections).unwrap_or_default()
    }

    fn replace(&self, connections: Vec<Connection>) {
        if let Some(End::Stack(stack)) = &mut *self.shared.end.lock() {
            stack.replace(connections);
        }
        self.wake();
    }

    fn close(&self) {
        self.end();
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network")
            .field("mode", &self.options.mode)
            .field("tap", &self.options.tap)
            .field("published", &self.published)
            .finish_non_exhaustive()
    }
}

/// The thread: waits for something to do, and does it.
fn run(shared: &Shared) {
    let mut events = Vec::with_capacity(EVENTS);
    let mut noted = Vec::with_capacity(EVENTS);
    let mut timeout: Option<Timespec> = None;
    loop {
        events.clear();
        let waited = epoll::wait(
            &*shared.epoll,
            spare_capacity(&mut events),
            timeout.as_ref(),
        );
        if let Err(error) = waited
            && error != rustix::io::Errno::INTR
        {
            tracing::warn!(%error, "The guest's network has stopped");
            return;
        }
        noted.clear();
        for event in &events {
            let (token, flags) = (event.data.u64(), event.flags);
            if token == WAKE {
                shared.waker.clear();
            } else {
                noted.push((token, flags));
            }
        }
        let stop = shared.stop.load(Ordering::SeqCst);
        let mut end = shared.end.lock();
        timeout = match &mut *end {
            Some(end) if stop => {
                end.finish();
                None
            }
            Some(end) => end.turn(&noted),
            None => None,
        };
        if stop {
            *end = None;
            return;
        }
    }
}
