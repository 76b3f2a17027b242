//! Spans and events of `tracing` in the guest, as the host's subscriber sees them.

#[expect(
    dead_code,
    reason = "of the helpers, only the one that builds guests is used"
)]
mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use skerry_sandbox::{Backend, CallError, DebugListener, Sandbox};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// What the other tests' helpers run on.
fn backend() -> Backend {
    Backend::Soft
}

/// The guest with spans. It needs the runtime library's feature `tracing`, and is built alone so that
/// the other guests don't get it.
fn guest() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let folder = BUILT.get_or_init(|| common::build(&["-p", "sandbox-tracedguest"]));
    folder.join("sandbox-tracedguest")
}

/// Writes down what happens: spans by their guest's name.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    lines: Vec<String>,
    /// Name and handles of each.
    spans: Vec<(String, usize)>,
    current: Vec<u64>,
}

#[derive(Default)]
struct Texts(Vec<(String, String)>);

impl Texts {
    fn get(&self, name: &str) -> String {
        let found = self.0.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| value.clone()).unwrap_or_default()
    }
}

impl Visit for Texts {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.push((field.name().into(), format!("{value:?}")));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.push((field.name().into(), value.into()));
    }
}

impl Seen {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.lock().unwrap())
    }

    /// What was seen since it was asked last.
    fn lines(&self) -> Vec<String> {
        self.with(|state| std::mem::take(&mut state.lines))
    }

    /// How many spans are open, and how many are current.
    fn left(&self) -> (usize, usize) {
        self.with(|state| {
            let open = state.spans.iter().filter(|(_, handles)| *handles != 0);
            (open.count(), state.current.len())
        })
    }
}

impl State {
    fn name(&self, id: &Id) -> String {
        self.spans[id.into_u64() as usize - 1].0.clone()
    }
}

impl Subscriber for Seen {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("skerry_guest") || metadata.target() == module_path!()
    }
    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let mut texts = Texts::default();
        attributes.record(&mut texts);
        self.with(|state| {
            let (name, fields) = (texts.get("guest_name"), texts.get("guest_fields"));
            let level = attributes.metadata().level();
            state.lines.push(format!("new {level} {name} {fields}"));
            state.spans.push((name, 1));
            Id::from_u64(state.spans.len() as u64)
        })
    }
    fn record(&self, span: &Id, values: &Record<'_>) {
        let mut texts = Texts::default();
        values.record(&mut texts);
        self.with(|state| {
            let line = format!(
                "record {} {}",
                state.name(span),
                texts.get("guest_recorded")
            );
            state.lines.push(line);
        });
    }
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut texts = Texts::default();
        event.record(&mut texts);
        self.with(|state| {
            let within = state
                .current
                .last()
                .map(|id| state.name(&Id::from_u64(*id)));
            let (level, text) = (event.metadata().level(), texts.get("message"));
            let within = within.unwrap_or_default();
            state.lines.push(format!("{level} in {within}: {text}"));
        });
    }
    fn enter(&self, span: &Id) {
        self.with(|state| {
            state.lines.push(format!("enter {}", state.name(span)));
            state.current.push(span.into_u64());
        });
    }
    fn exit(&self, span: &Id) {
        self.with(|state| {
            state.lines.push(format!("exit {}", state.name(span)));
            assert_eq!(state.current.pop(), Some(span.into_u64()));
        });
    }
    fn clone_span(&self, span: &Id) -> Id {
        self.with(|state| state.spans[span.into_u64() as usize - 1].1 += 1);
        span.clone()
    }
    fn try_close(&self, span: Id) -> bool {
        self.with(|state| {
            let entry = &mut state.spans[span.into_u64() as usize - 1];
            entry.1 -= 1;
            let closed = entry.1 == 0;
            if closed {
                let line = format!("close {}", entry.0);
                state.lines.push(line);
            }
            closed
        })
    }
}

/// Runs with a subscriber of its own and a sandbox of the guest with spans.
fn traced(work: impl FnOnce(&Seen, &mut Sandbox)) {
    let seen = Seen::default();
    let for_host = seen.clone();
    tracing::subscriber::with_default(seen.clone(), || {
        let mut sandbox = Sandbox::builder()
            .guest(guest())
            .backend(backend())
            .log_level(Some(Level::DEBUG))
            .host_fn("host_note", move |text: String| {
                // A host function runs in the guest's span.
                tracing::info!("note {text}");
                for_host.with(|state| assert!(!state.current.is_empty()));
            })
            .build()
            .expect("the guest starts");
        seen.lines();
        work(&seen, &mut sandbox);
    });
}

#[test]
fn spans_and_events_arrive_in_order() {
    traced(|seen, sandbox| {
        assert_eq!(sandbox.call::<u32>("nested", (4_u32,)).unwrap(), 5);
        let expected = [
            "new INFO outer depth=4 name=\"first\"",
            "enter outer",
            "INFO in outer: in the outer one depth=4",
            "record outer later=7",
            "new DEBUG inner ",
            "enter inner",
            "ERROR in inner: in the inner one code=-1 text=\"two words\"",
            "INFO in inner: note within",
            "exit inner",
            "close inner",
            "exit outer",
            "close outer",
        ];
        assert_eq!(seen.lines(), expected);
        assert_eq!(seen.left(), (0, 0));
        assert_eq!(sandbox.metrics().log_damaged, 0);
    });
}

#[test]
fn a_span_is_closed_with_its_last_handle() {
    traced(|seen, sandbox| {
        sandbox.call::<()>("again", ()).unwrap();
        let expected = [
            "new INFO again ",
            "enter again",
            "INFO in again: once",
            "exit again",
            "enter again",
            "INFO in again: twice",
            "exit again",
            "close again",
        ];
        assert_eq!(seen.lines(), expected);
    });
}

#[test]
fn a_call_that_is_stopped_leaves_no_span() {
    traced(|seen, sandbox| {
        let snapshot = sandbox.snapshot().unwrap();
        sandbox
            .set_call_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let stopped = sandbox.call::<()>("stuck", ()).unwrap_err();
        assert!(matches!(stopped, CallError::TimedOut(_)), "{stopped}");
        let expected = [
            "new INFO stuck ",
            "enter stuck",
            "INFO in stuck: note stuck",
            "exit stuck",
            "close stuck",
        ];
        assert_eq!(seen.lines(), expected);
        assert_eq!(seen.left(), (0, 0));
        sandbox.restore(&snapshot).unwrap();
        sandbox.call::<()>("again", ()).unwrap();
        assert_eq!(seen.left(), (0, 0));
    });
}

#[test]
fn a_span_that_is_kept_is_closed_by_a_restore() {
    traced(|seen, sandbox| {
        let snapshot = sandbox.snapshot().unwrap();
        sandbox.call::<()>("forgotten", ()).unwrap();
        let expected = ["new INFO forgotten ", "enter forgotten", "exit forgotten"];
        assert_eq!(seen.lines(), expected);
        assert_eq!(seen.left(), (1, 0));
        sandbox.restore(&snapshot).unwrap();
        assert_eq!(seen.lines(), ["close forgotten"]);
        assert_eq!(seen.left(), (0, 0));
    });
}

#[test]
fn a_call_with_a_debugger_ends_its_spans_too() {
    traced(|seen, sandbox| {
        let listener = DebugListener::tcp("127.0.0.1:0").unwrap();
        let at = listener.local_address().unwrap();
        sandbox.debug(listener);
        let debugger = std::thread::spawn(move || {
            let mut stream = TcpStream::connect(at).unwrap();
            // It detaches, and the call goes on as one that had a debugger.
            stream.write_all(b"$D#44").unwrap();
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
        });
        sandbox.call::<()>("forgotten", ()).unwrap();
        debugger.join().unwrap();
        let expected = ["new INFO forgotten ", "enter forgotten", "exit forgotten"];
        assert_eq!(seen.lines(), expected);
        assert_eq!(seen.left(), (1, 0));
    });
}

#[test]
fn a_guest_with_more_spans_than_the_host_keeps_is_counted() {
    traced(|seen, sandbox| {
        sandbox.call::<()>("many", (2000_u32,)).unwrap();
        assert_eq!(seen.left(), (0, 0));
        // What was refused, and its entering, leaving and closing.
        assert_eq!(sandbox.metrics().log_damaged, 976 * 4);
    });
}
