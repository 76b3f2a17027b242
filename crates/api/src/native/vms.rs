//! Virtual machines.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use skerry_engine::command::CommandSpec;
use skerry_engine::images::{self, PullPolicy};
use skerry_engine::network::NetworkReport;
use skerry_engine::run::{RunIo, RunSpec};
use skerry_engine::vms::{self, Begin, Detached, Launch, Line, LogReader, Registry, Usage, VmInfo};
use utoipa::{IntoParams, ToSchema};

use super::images::lines;
use crate::error::{ApiError, Problem, chain};
use crate::streams::{BodySender, Kind, Lines, body};
use crate::work::{App, Shared, work};

/// How often a log is looked at while it is followed.
const FOLLOW: Duration = Duration::from_millis(50);

/// Which machines.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Which {
    /// Those that have ended too.
    #[serde(default)]
    all: bool,
}

/// All machines, the newest first.
#[utoipa::path(get, path = "/vms", tag = "vms", params(Which), responses(
    (status = 200, body = Vec<VmInfo>), (status = "default", body = Problem)))]
pub(crate) async fn list(
    State(app): State<Shared>,
    Query(Which { all }): Query<Which>,
) -> Result<Json<Vec<VmInfo>>, ApiError> {
    work(&app, move |app| {
        let mut infos = app.registry()?.list()?;
        infos.retain(|info| all || info.state.status.is_alive());
        Ok(Json(infos))
    })
    .await
}

/// A machine to be.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NewVm {
    /// The image that it is made from, as for `skerry run`; or else `snapshot`.
    image: Option<String>,
    /// The snapshot that it goes on from.
    snapshot: Option<String>,
    /// Its name; one is made up for an empty one.
    name: String,
    /// It is forgotten when it ends.
    auto_remove: bool,
    /// It is only made, to be started later.
    created: bool,
    /// When the image is pulled.
    pull: Pull,
    /// The machine and its command.
    spec: RunSpec,
}

/// When an image is got from its registry.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pull {
    /// When the store doesn't have it.
    #[default]
    Missing,
    /// Each time.
    Always,
    /// Not at all.
    Never,
}

/// A machine that was made.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Made {
    /// Its identity.
    id: String,
    /// What its user should know.
    notes: Vec<String>,
}

/// Makes a machine and starts its command, as `skerry run -d` does.
#[utoipa::path(post, path = "/vms", tag = "vms", request_body = NewVm, responses(
    (status = 201, body = Made), (status = "default", body = Problem)))]
pub(crate) async fn create(
    State(app): State<Shared>,
    Json(new): Json<NewVm>,
) -> Result<(StatusCode, Json<Made>), ApiError> {
    work(&app, move |app| {
        Ok((StatusCode::CREATED, Json(make(app, new)?)))
    })
    .await
}

fn make(app: &App, new: NewVm) -> Result<Made, ApiError> {
    let begin = match (new.image, new.snapshot) {
        (Some(image), None) => Begin::Image(image),
        (None, Some(snapshot)) => Begin::Snapshot(snapshot),
        _ => {
            return Err(ApiError::invalid(
                "A machine is made from one image or one snapshot: name either",
            ));
        }
    };
    if let Begin::Image(image) = &begin {
        let policy = match new.pull {
            Pull::Missing => PullPolicy::Missing,
            Pull::Always => PullPolicy::Always,
            Pull::Never => PullPolicy::Never,
        };
        if let Some(name) = images::to_pull(app.paths(), image, policy)? {
            images::pull(app.paths(), &name, &mut |_| ())?;
        }
    }
    // Another process finds out for good; its error is but a text.
    let taken = app.registry()?.find(&new.name);
    if taken.is_ok_and(|info| info.config.name == new.name) {
        return Err(skerry_engine::EngineError::NameTaken { name: new.name }.into());
    }
    let launch = Launch {
        root: app.paths().root().to_owned(),
        begin,
        spec: new.spec,
        name: new.name,
        auto_remove: new.auto_remove,
    };
    let mut notes = Vec::new();
    let mut note = |text: &str| notes.push(text.to_owned());
    if new.created {
        let id = vms::create(&launch, &mut note)?;
        return Ok(Made { id, notes });
    }
    match vms::detach(&app.options.program, &launch, &mut note)? {
        Detached::Runs(id) => Ok(Made { id, notes }),
        Detached::NotStarted(failure) => Err(ApiError::invalid(failure.message)),
    }
}

/// All that is known of a machine.
#[utoipa::path(get, path = "/vms/{vm}", tag = "vms",
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits")),
    responses((status = 200, body = vms::Inspected), (status = "default", body = Problem)))]
pub(crate) async fn inspect(
    State(app): State<Shared>,
    Path(vm): Path<String>,
) -> Result<Json<vms::Inspected>, ApiError> {
    work(&app, move |app| {
        Ok(Json(vms::inspect(&app.registry()?, &vm, Duration::ZERO)?))
    })
    .await
}

/// How a machine is removed.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Removal {
    /// It is ended first.
    #[serde(default)]
    force: bool,
}

/// Forgets a machine that has ended.
#[utoipa::path(delete, path = "/vms/{vm}", tag = "vms",
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits"), Removal),
    responses((status = 204), (status = "default", body = Problem)))]
pub(crate) async fn remove(
    State(app): State<Shared>,
    Path(vm): Path<String>,
    Query(Removal { force }): Query<Removal>,
) -> Result<StatusCode, ApiError> {
    simply(&app, move |app| vms::remove(&app.registry()?, &vm, force)).await
}

/// Does what has no answer but that it is done.
async fn simply(
    app: &Shared,
    act: impl FnOnce(&App) -> Result<(), skerry_engine::EngineError> + Send + 'static,
) -> Result<StatusCode, ApiError> {
    work(app, move |app| {
        act(app)?;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// Starts a machine that was made, or has ended, with the files that it has.
#[utoipa::path(post, path = "/vms/{vm}/start", tag = "vms",
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits")),
    responses((status = 200, body = Made), (status = "default", body = Problem)))]
pub(crate) async fn start(
    State(app): State<Shared>,
    Path(vm): Path<String>,
) -> Result<Json<Made>, ApiError> {
    work(&app, move |app| {
        let mut notes = Vec::new();
        let mut note = |text: &str| notes.push(text.to_owned());
        let started = vms::start(app.paths(), &app.options.program, &vm, &mut note)?;
        runs(started, notes)
    })
    .await
}

/// Stops a machine and starts it again.
#[utoipa::path(post, path = "/vms/{vm}/restart", tag = "vms",
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits"), Grace),
    responses((status = 200, body = Made), (status = "default", body = Problem)))]
pub(crate) async fn restart(
    State(app): State<Shared>,
    Path(vm): Path<String>,
    Query(Grace { grace }): Query<Grace>,
) -> Result<Json<Made>, ApiError> {
    work(&app, move |app| {
        let mut notes = Vec::new();
        let mut note = |text: &str| notes.push(text.to_owned());
        let grace = Duration::from_secs(grace.into());
        let program = &app.options.program;
        let started = vms::restart(app.paths(), program, &vm, grace, &mut note)?;
        runs(started, notes)
    })
    .await
}

fn runs(started: Detached, notes: Vec<String>) -> Result<Json<Made>, ApiError> {
    match started {
        Detached::Runs(id) => Ok(Json(Made { id, notes })),
        Detached::NotStarted(failure) => Err(ApiError::invalid(failure.message)),
    }
}

/// How long a command is given.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Grace {
    /// Seconds until the machine is ended.
    #[serde(default = "ten")]
    grace: u32,
}

fn ten() -> u32 {
    10
}

/// The end of a machine's command.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Ended {
    /// Its exit status, as a shell has it.
    exit_code: u8,
}

/// Asks a machine's command to end, and ends the machine after a while.
#[utoipa::path(post, path = "/vms/{vm}/stop", tag = "vms",
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits"), Grace),
    responses((status = 200, body = Ended), (status = "default", body = Problem)))]
pub(crate) async fn stop(
    State(app): State<Shared>,
    Path(vm): Path<String>,
    Query(Grace { grace }): Query<Grace>,
) -> Result<Json<Ended>, ApiError> {
    work(&app, move |app| {
        let grace = Duration::from_secs(grace.into());
        let exit_code = vms::stop(&app.registry()?, &vm, grace)?;
        Ok(Json(Ended { exit_code }))
    })
    .await
}

/// Which signal.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Signal {
    /// Its number; 9 ends the machine.
    #[serde(default = "nine")]
    #[param(minimum = 1, maximum = 64)]
    signal: u8,
}

fn nine() -> u8 {
    9
}

/// Ends a machine at once, or sends its command a signal.
#[utoipa::path(post, path = "/vms/{vm}/kill", tag = "vms",
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits"), Signal),
    responses((status = 204), (status = "default", body = Problem)))]
pub(crate) async fn kill(
    State(app): State<Shared>,
    Path(vm): Path<String>,
    Query(Signal { signal }): Query<Signal>,
) -> Result<StatusCode, ApiError> {
    if !(1..=64).contains(&signal) {
        return Err(ApiError::invalid(format!(
            "There is no signal {signal}: give one from 1 to 64"
        )));
    }
    simply(&app, move |app| vms::signal(&app.registry()?, &vm, signal)).await
}

/// Has a machine stand still.
#[utoipa::path(post, path = "/vms/{vm}/pause", tag = "vms",
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits")),
    responses((status = 204), (status = "default", body = Problem)))]
pub(crate) async fn pause(
    State(app): State<Shared>,
    Path(vm): Path<String>,
) -> Result<StatusCode, ApiError> {
    simply(&app, move |app| vms::pause(&app.registry()?, &vm)).await
}

/// Lets a machine go on.
#[utoipa::path(post, path = "/vms/{vm}/unpause", tag = "vms",
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits")),
    responses((status = 204), (status = "default", body = Problem)))]
pub(crate) async fn unpause(
    State(app): State<Shared>,
    Path(vm): Path<String>,
) -> Result<StatusCode, ApiError> {
    simply(&app, move |app| vms::unpause(&app.registry()?, &vm)).await
}

/// What is waited for.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Awaited {
    /// Until it is ready, not until its command ends.
    #[serde(default)]
    ready: bool,
    /// Seconds to wait for it to be ready at most.
    timeout: Option<u32>,
}

/// What came.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Came {
    /// The machine is ready.
    Ready,
    /// Its command ended with this exit status.
    Ended(u8),
}

/// Waits until a machine's command has ended, or until the machine is ready.
#[utoipa::path(post, path = "/vms/{vm}/wait", tag = "vms",
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits"), Awaited),
    responses((status = 200, body = Came), (status = "default", body = Problem)))]
pub(crate) async fn wait(
    State(app): State<Shared>,
    Path(vm): Path<String>,
    Query(Awaited { ready, timeout }): Query<Awaited>,
) -> Result<Json<Came>, ApiError> {
    work(&app, move |app| {
        let registry = app.registry()?;
        Ok(Json(match ready {
            true => {
                let limit = timeout.map(|seconds| Duration::from_secs(seconds.into()));
                vms::wait_ready(&registry, &vm, limit)?;
                Came::Ready
            }
            false => Came::Ended(vms::wait(&registry, &vm)?),
        }))
    })
    .await
}

/// Another name.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct NewName {
    /// It.
    name: String,
}

/// Gives a machine another name.
#[utoipa::path(post, path = "/vms/{vm}/rename", tag = "vms",
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits"), NewName),
    responses((status = 204), (status = "default", body = Problem)))]
pub(crate) async fn rename(
    State(app): State<Shared>,
    Path(vm): Path<String>,
    Query(NewName { name }): Query<NewName>,
) -> Result<StatusCode, ApiError> {
    simply(&app, move |app| vms::rename(&app.registry()?, &vm, &name)).await
}

/// What of a log.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct LogQuery {
    /// What is written from now on too.
    #[serde(default)]
    follow: bool,
    /// So many lines of what there is.
    tail: Option<usize>,
}

/// What the command of a machine in the background wrote.
#[utoipa::path(get, path = "/vms/{vm}/logs", tag = "vms",
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits"), LogQuery),
    responses((status = 200, body = Line, content_type = "application/x-ndjson"),
              (status = "default", body = Problem)))]
pub(crate) async fn logs(
    State(app): State<Shared>,
    Path(vm): Path<String>,
    Query(LogQuery { follow, tail }): Query<LogQuery>,
) -> Result<Response, ApiError> {
    let log = work(&app, move |app| Log::open(app, &vm, follow, tail)).await?;
    let (out, body) = body();
    tokio::task::spawn_blocking(move || {
        // A client that has gone wants no more.
        let _ = log.read(|line| out.send_line(line), || out.is_closed());
    });
    Ok(lines(body))
}

/// A log that is read, and maybe followed.
pub(crate) struct Log {
    registry: Registry,
    id: String,
    reader: Option<LogReader>,
    follow: bool,
    tail: Option<usize>,
}

impl Log {
    pub(crate) fn open(
        app: &App,
        vm: &str,
        follow: bool,
        tail: Option<usize>,
    ) -> Result<Self, ApiError> {
        let registry = app.registry()?;
        let info = registry.find(vm)?;
        if !info.config.detached {
            let name = &info.config.name;
            return Err(ApiError::new(
                StatusCode::CONFLICT,
                format!(
                    "The virtual machine {name} keeps no log: its output went to where it was run"
                ),
            ));
        }
        let reader = match vms::log(&registry, &info) {
            Ok(reader) => Some(reader),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            registry,
            id: info.config.id,
            reader,
            follow,
            tail,
        })
    }

    /// Gives each line to `each`, until there are no more or the reader is `gone`.
    pub(crate) fn read(
        self,
        mut each: impl FnMut(&Line) -> io::Result<()>,
        gone: impl Fn() -> bool,
    ) -> io::Result<()> {
        let Self {
            registry,
            id,
            reader: Some(mut reader),
            follow,
            tail,
        } = self
        else {
            return Ok(());
        };
        if let Some(count) = tail {
            let mut last = VecDeque::new();
            while let Some(line) = reader.next_line()? {
                last.push_back(line);
                if last.len() > count {
                    last.pop_front();
                }
            }
            last.iter().try_for_each(&mut each)?;
        }
        loop {
            // Before the reading: what a command writes last is read when it is known to have ended.
            let found = registry.find(&id);
            let more = follow && found.is_ok_and(|info| info.state.status.is_alive());
            while let Some(line) = reader.next_line()? {
                each(&line)?;
            }
            if !more || gone() {
                return Ok(());
            }
            std::thread::sleep(FOLLOW);
        }
    }
}

/// A command to be run in a machine.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NewExec {
    /// The command.
    #[serde(flatten)]
    command: CommandSpec,
    /// Its whole input, in base64.
    input: Option<String>,
}

/// A line of a command's output, or its end: the last.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "it describes what is written piece by piece")]
pub(crate) enum ExecLine {
    /// Output.
    Output {
        /// `stdout` or `stderr`.
        stream: String,
        /// What was written.
        base64: String,
    },
    /// The end.
    Exit {
        /// Exit status.
        exit_code: u8,
    },
    /// The end, where the command could not be run.
    Failed {
        /// Why.
        error: String,
    },
}

/// Runs one more command in a machine, and tells its output as it comes.
#[utoipa::path(post, path = "/vms/{vm}/exec", tag = "vms", request_body = NewExec,
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits")),
    responses((status = 200, body = ExecLine, content_type = "application/x-ndjson"),
              (status = "default", body = Problem)))]
pub(crate) async fn exec(
    State(app): State<Shared>,
    Path(vm): Path<String>,
    Json(new): Json<NewExec>,
) -> Result<Response, ApiError> {
    let (spec, io, out, body) = prepared(new)?;
    // What can be known before the first byte is an error with a status of its own.
    work(&app, {
        let vm = vm.clone();
        move |app| Ok(app.registry()?.find(&vm).map(drop)?)
    })
    .await?;
    tokio::task::spawn_blocking(move || {
        let registry = app.registry();
        let outcome = registry.and_then(|registry| vms::exec(&registry, &vm, &spec, io));
        tell_end(&out, outcome);
    });
    Ok(lines(body).into_response())
}

/// The command of a request, with streams that end in the body of its answer.
pub(crate) fn prepared(
    new: NewExec,
) -> Result<(CommandSpec, RunIo, BodySender, axum::body::Body), ApiError> {
    let NewExec { mut command, input } = new;
    if command.command.is_empty() {
        return Err(ApiError::invalid("There is no command: give one"));
    }
    let input = input
        .map(|text| BASE64_STANDARD.decode(text))
        .transpose()
        .map_err(|_| ApiError::invalid("The input is no base64"))?;
    command.stdin = input.is_some();
    let (out, body) = body();
    let lines = |kind| {
        let out = out.clone();
        Box::new(Lines { out, kind })
    };
    let io = RunIo {
        stdin: input.map(|input| Box::new(io::Cursor::new(input)) as _),
        stdout: lines(Kind::Stdout),
        stderr: lines(Kind::Stderr),
        events: None,
    };
    Ok((command, io, out, body))
}

/// Sends how a command ended, as its answer's last line.
pub(crate) fn tell_end(
    out: &BodySender,
    outcome: Result<skerry_engine::run::RunOutcome, skerry_engine::EngineError>,
) {
    use skerry_engine::run::RunOutcome;
    let last = match outcome {
        Ok(RunOutcome::NotStarted(failure)) => serde_json::json!({
            "error": failure.message,
            "exit_code": failure.kind.shell_code(),
        }),
        Ok(outcome) => serde_json::json!({ "exit_code": outcome.code() }),
        Err(error) => serde_json::json!({ "error": chain(&error) }),
    };
    let _ = out.send_line(&last);
}

/// A snapshot to be.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NewSnapshot {
    /// Its name, if it is to have one.
    name: Option<String>,
    /// Only what differs from the snapshot that the machine goes on from.
    difference: bool,
    /// With the image.
    with_image: bool,
}

/// Writes a snapshot of a machine to the store; it goes on meanwhile.
#[utoipa::path(post, path = "/vms/{vm}/snapshot", tag = "vms", request_body = NewSnapshot,
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits")),
    responses((status = 201, body = vms::Snapshotted), (status = "default", body = Problem)))]
pub(crate) async fn snapshot(
    State(app): State<Shared>,
    Path(vm): Path<String>,
    Json(new): Json<NewSnapshot>,
) -> Result<(StatusCode, Json<vms::Snapshotted>), ApiError> {
    work(&app, move |app| {
        let (registry, name) = (app.registry()?, new.name.as_deref());
        let taken = vms::snapshot(&registry, &vm, name, new.difference, new.with_image)?;
        Ok((StatusCode::CREATED, Json(taken)))
    })
    .await
}

/// Machines to be made from a running one.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewForks {
    /// Their names, an empty one for any; as many machines as names.
    names: Vec<String>,
    /// They are forgotten when they end.
    #[serde(default)]
    auto_remove: bool,
}

/// Makes more machines that go on from where one is.
#[utoipa::path(post, path = "/vms/{vm}/fork", tag = "vms", request_body = NewForks,
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits")),
    responses((status = 201, body = vms::Forked), (status = "default", body = Problem)))]
pub(crate) async fn fork(
    State(app): State<Shared>,
    Path(vm): Path<String>,
    Json(NewForks { names, auto_remove }): Json<NewForks>,
) -> Result<(StatusCode, Json<vms::Forked>), ApiError> {
    work(&app, move |app| {
        let forked = vms::fork(
            &app.registry()?,
            &app.options.program,
            &vm,
            &names,
            auto_remove,
        )?;
        Ok((StatusCode::CREATED, Json(forked)))
    })
    .await
}

/// The network of a running machine: how far it reaches, its ports, what it has done.
#[utoipa::path(get, path = "/vms/{vm}/network", tag = "vms",
    params(("vm" = String, Path, description = "Name, ID or the ID's first digits")),
    responses((status = 200, body = NetworkReport), (status = "default", body = Problem)))]
pub(crate) async fn network(
    State(app): State<Shared>,
    Path(vm): Path<String>,
) -> Result<Json<NetworkReport>, ApiError> {
    work(&app, move |app| {
        Ok(Json(vms::network(&app.registry()?, &vm)?))
    })
    .await
}

/// For how long it is looked.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Span {
    /// Milliseconds, 10 000 at most.
    #[serde(default = "second")]
    span: u32,
}

fn second() -> u32 {
    1000
}

/// What running machines take of the host.
#[utoipa::path(get, path = "/stats", tag = "vms", params(Span), responses(
    (status = 200, body = Vec<Usage>), (status = "default", body = Problem)))]
pub(crate) async fn stats(
    State(app): State<Shared>,
    Query(Span { span }): Query<Span>,
) -> Result<Json<Vec<Usage>>, ApiError> {
    const LONGEST: u32 = 10_000;
    work(&app, move |app| {
        let registry = app.registry()?;
        let infos = registry.list()?;
        let span = Duration::from_millis(span.min(LONGEST).into());
        Ok(Json(vms::usage(&registry, &infos, span)))
    })
    .await
}
