//! Further commands in a machine: made, started over a connection of its own, asked how they ended.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::mpsc;

use axum::Json;
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use skerry_engine::command::CommandSpec;
use skerry_engine::run::{Event, RunIo, RunOutcome};
use skerry_engine::{EngineError, WinSize, vms};

use crate::error::{ApiError, chain};
use crate::streams::{self, Kind, Wire};
use crate::work::{Shared, work};

/// Commands that the server remembers; the oldest that have ended go first.
const MOST: usize = 4096;

/// A command that a client has made.
#[derive(Debug)]
struct Exec {
    vm: String,
    spec: CommandSpec,
    state: ExecState,
}

#[derive(Debug)]
enum ExecState {
    Made,
    Runs(mpsc::Sender<Event>),
    Ended(u8),
}

/// All that clients have made.
#[derive(Debug, Default)]
pub(crate) struct Execs {
    by_id: HashMap<String, Exec>,
    order: VecDeque<String>,
}

impl Execs {
    fn add(&mut self, id: String, exec: Exec) -> Result<(), ApiError> {
        if self.by_id.len() >= MOST {
            let ended = |id: &String| {
                let exec = self.by_id.get(id);
                exec.is_none_or(|exec| !matches!(exec.state, ExecState::Runs(_)))
            };
            match self.order.iter().position(ended) {
                Some(at) => {
                    if let Some(oldest) = self.order.remove(at) {
                        self.by_id.remove(&oldest);
                    }
                }
                None => {
                    return Err(ApiError::new(
                        StatusCode::CONFLICT,
                        format!("{MOST} commands run: wait for one to end"),
                    ));
                }
            }
        }
        self.order.push_back(id.clone());
        self.by_id.insert(id, exec);
        Ok(())
    }
}

fn unknown(id: &str) -> ApiError {
    ApiError::missing(format!("There is no command {id} of this server's"))
}

/// What docker's clients say of a command.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct NewExec {
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    user: String,
    working_dir: String,
    tty: bool,
    attach_stdin: bool,
    privileged: bool,
    console_size: Option<[u16; 2]>,
}

/// A terminal's size where the client doesn't say; it tells the right one next.
pub(super) const SIZE: WinSize = WinSize {
    rows: 24,
    cols: 80,
    x_pixels: 0,
    y_pixels: 0,
};

/// Variables as `NAME=VALUE`.
pub(super) fn variables(env: Vec<String>) -> Vec<(String, String)> {
    let pair = |text: &str| {
        text.split_once('=')
            .map(|(n, v)| (n.to_owned(), v.to_owned()))
    };
    env.iter().filter_map(|text| pair(text)).collect()
}

pub(super) async fn create(
    State(app): State<Shared>,
    Path(vm): Path<String>,
    Json(new): Json<NewExec>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let command = new.cmd.unwrap_or_default();
    if command.is_empty() {
        return Err(ApiError::invalid("There is no command: give one"));
    }
    if new.privileged {
        return Err(ApiError::invalid(
            "Commands in a machine have no privileges but their user's: leave --privileged out",
        ));
    }
    let size = new
        .console_size
        .map_or(SIZE, |[rows, cols]| WinSize { rows, cols, ..SIZE });
    let some = |text: String| (!text.is_empty()).then_some(text);
    let spec = CommandSpec {
        command,
        entrypoint: None,
        env: variables(new.env.unwrap_or_default()),
        working_dir: some(new.working_dir),
        user: some(new.user),
        tty: new.tty.then_some(size),
        stdin: new.attach_stdin,
    };
    work(&app, move |app| {
        let info = app.registry()?.find(&vm)?;
        if !info.state.status.is_alive() {
            let name = info.config.name;
            return Err(EngineError::VmStopped { name }.into());
        }
        let id = vms::new_id()?;
        let exec = Exec {
            vm: info.config.id,
            spec,
            state: ExecState::Made,
        };
        app.execs.lock().add(id.clone(), exec)?;
        Ok((StatusCode::CREATED, Json(json!({ "Id": id }))))
    })
    .await
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct StartExec {
    detach: bool,
}

/// The most bytes of a start's body.
const LONGEST: usize = 64 << 10;

pub(super) async fn start(
    State(app): State<Shared>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let bytes = axum::body::to_bytes(body, LONGEST)
        .await
        .map_err(|error| ApiError::invalid(error.to_string()))?;
    let StartExec { detach } = match bytes.is_empty() {
        true => StartExec::default(),
        false => serde_json::from_slice(&bytes)
            .map_err(|error| ApiError::invalid(format!("The request is no JSON: {error}")))?,
    };
    let hijack = !detach && streams::asks_upgrade(&parts.headers);
    let (events, receiver) = mpsc::channel();
    let (vm, spec) = {
        let mut execs = app.execs.lock();
        let exec = execs.by_id.get_mut(&id).ok_or_else(|| unknown(&id))?;
        if !matches!(exec.state, ExecState::Made) {
            return Err(ApiError::new(
                StatusCode::CONFLICT,
                format!("The command {id} was started before: make another one"),
            ));
        }
        exec.state = ExecState::Runs(events);
        (exec.vm.clone(), exec.spec.clone())
    };
    let run = Run {
        app,
        id,
        vm,
        tty: spec.tty.is_some(),
        spec,
        events: receiver,
    };
    let tty = run.tty;
    if detach {
        tokio::task::spawn_blocking(move || run.run(None, io::sink()));
        return Ok(StatusCode::OK.into_response());
    }
    if hijack {
        let upgrade = streams::take(Request::from_parts(parts, axum::body::Body::empty()));
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || run.over(streams::ends(&runtime, upgrade)));
        return Ok(streams::switching(tty));
    }
    let (out, body) = streams::body();
    tokio::task::spawn_blocking(move || run.run(None, out));
    let kind = [(header::CONTENT_TYPE, streams::content_type(tty))];
    Ok((kind, body).into_response())
}

/// Exit status of a command that was not run at all.
const FAILED: u8 = 125;

/// A command that starts.
struct Run {
    app: Shared,
    id: String,
    vm: String,
    spec: CommandSpec,
    tty: bool,
    events: mpsc::Receiver<Event>,
}

impl Run {
    /// Runs it over a connection.
    fn over(self, ends: io::Result<(streams::Input, streams::Output)>) {
        match ends {
            Ok((input, output)) => {
                let stdin = self.spec.stdin.then(|| Box::new(input) as _);
                self.run(stdin, output);
            }
            Err(error) => {
                tracing::debug!(%error, "A client has gone before its command began");
                self.ended(FAILED);
            }
        }
    }

    /// Runs it with its outputs, and what is to be said of it, in `out`.
    fn run(
        mut self,
        stdin: Option<Box<dyn io::Read + Send>>,
        out: impl io::Write + Send + 'static,
    ) {
        let out = Arc::new(Mutex::new(out));
        let wire = |kind| Wire {
            out: out.clone(),
            kind: (!self.tty).then_some(kind),
        };
        let (_, none) = mpsc::channel();
        let io = RunIo {
            stdin,
            stdout: Box::new(wire(Kind::Stdout)),
            stderr: Box::new(wire(Kind::Stderr)),
            events: Some(std::mem::replace(&mut self.events, none)),
        };
        let registry = self.app.registry();
        let outcome = registry.and_then(|registry| vms::exec(&registry, &self.vm, &self.spec, io));
        let said = match &outcome {
            Ok(RunOutcome::NotStarted(failure)) => Some(failure.message.clone()),
            Ok(_) => None,
            Err(error) => Some(chain(error)),
        };
        if let Some(said) = said {
            // A client that has gone isn't told.
            let _ = io::Write::write_all(&mut wire(Kind::Stderr), format!("{said}\n").as_bytes());
        }
        // Before the end of the connection, at which the client asks.
        self.ended(outcome.as_ref().map_or(FAILED, RunOutcome::code));
    }

    fn ended(&self, code: u8) {
        if let Some(exec) = self.app.execs.lock().by_id.get_mut(&self.id) {
            exec.state = ExecState::Ended(code);
        }
    }
}

pub(super) async fn inspect(
    State(app): State<Shared>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let execs = app.execs.lock();
    let exec = execs.by_id.get(&id).ok_or_else(|| unknown(&id))?;
    let (running, code) = match exec.state {
        ExecState::Made => (false, None),
        ExecState::Runs(_) => (true, None),
        ExecState::Ended(code) => (false, Some(code)),
    };
    let (entrypoint, arguments) = match exec.spec.command.split_first() {
        Some((entrypoint, arguments)) => (entrypoint.as_str(), arguments),
        None => ("", &[][..]),
    };
    Ok(Json(json!({
        "ID": id,
        "Running": running,
        "ExitCode": code,
        "ProcessConfig": {
            "tty": exec.spec.tty.is_some(),
            "entrypoint": entrypoint,
            "arguments": arguments,
            "privileged": false,
        },
        "OpenStdin": exec.spec.stdin,
        "OpenStdout": true,
        "OpenStderr": true,
        "CanRemove": code.is_some(),
        "ContainerID": exec.vm,
        "DetachKeys": "",
        "Pid": 0,
    })))
}

#[derive(Debug, Deserialize)]
pub(super) struct Size {
    pub(super) h: u16,
    pub(super) w: u16,
}

pub(super) async fn resize(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(Size { h, w }): Query<Size>,
) -> Result<StatusCode, ApiError> {
    let execs = app.execs.lock();
    let exec = execs.by_id.get(&id).ok_or_else(|| unknown(&id))?;
    if let ExecState::Runs(events) = &exec.state {
        let size = WinSize {
            rows: h,
            cols: w,
            ..SIZE
        };
        // One that has just ended has no terminal any more.
        let _ = events.send(Event::Resize(size));
    }
    Ok(StatusCode::OK)
}
