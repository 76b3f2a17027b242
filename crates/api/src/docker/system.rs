//! Who answers.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use skerry_engine::vms::Status;

use super::{API_VERSION, OLDEST};
use crate::error::ApiError;
use crate::work::{Shared, work};

pub(super) async fn ping() -> ([(&'static str, &'static str); 4], &'static str) {
    let headers = [
        ("api-version", API_VERSION),
        ("ostype", "linux"),
        ("docker-experimental", "false"),
        ("cache-control", "no-cache"),
    ];
    (headers, "OK")
}

pub(super) async fn version() -> Json<Value> {
    let version = env!("CARGO_PKG_VERSION");
    let details = json!({
        "ApiVersion": API_VERSION,
        "MinAPIVersion": OLDEST,
        "Os": "linux",
        "Arch": "amd64",
        "KernelVersion": kernel(),
    });
    Json(json!({
        "Platform": { "Name": "Skerry" },
        "Components": [{ "Name": "Engine", "Version": version, "Details": details }],
        "Version": version,
        "ApiVersion": API_VERSION,
        "MinAPIVersion": OLDEST,
        "Os": "linux",
        "Arch": "amd64",
        "KernelVersion": kernel(),
        "GitCommit": "",
        "GoVersion": "",
    }))
}

fn kernel() -> String {
    let release = rustix::system::uname();
    release.release().to_string_lossy().into_owned()
}

pub(super) async fn info(State(app): State<Shared>) -> Result<Json<Value>, ApiError> {
    work(&app, |app| {
        let infos = app.registry()?.list()?;
        let count = |wanted: fn(Status) -> bool| {
            let status = infos.iter().map(|info| info.state.status);
            status.filter(|&status| wanted(status)).count()
        };
        let images = crate::native::named_images(app)?.len();
        let memory = rustix::system::sysinfo();
        let memory = memory.totalram.saturating_mul(u64::from(memory.mem_unit));
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Json(json!({
            "ID": "skerry",
            "Name": rustix::system::uname().nodename().to_string_lossy(),
            "Containers": infos.len(),
            "ContainersRunning": count(|s| s.is_alive() && s != Status::Paused),
            "ContainersPaused": count(|s| s == Status::Paused),
            "ContainersStopped": count(|s| !s.is_alive()),
            "Images": images,
            "Driver": "erofs",
            "ServerVersion": env!("CARGO_PKG_VERSION"),
            "OperatingSystem": "Skerry virtual machines",
            "OSType": "linux",
            "Architecture": "x86_64",
            "KernelVersion": kernel(),
            "NCPU": cpus,
            "MemTotal": memory,
            "DockerRootDir": app.paths().root(),
            "Plugins": { "Volume": [], "Network": [], "Authorization": null, "Log": ["json-file"] },
        })))
    })
    .await
}
