//! `docker run` and `docker create`: what a client describes, as a machine.
//!
//! A description has a hundred fields, most of them empty. Those that mean something here are taken out
//! of it; what is left has to be empty, or the client is told what it asked for in vain.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use skerry_engine::command::CommandSpec;
use skerry_engine::images::{self, PullPolicy};
use skerry_engine::mounts::{MountKind, MountSpec};
use skerry_engine::network::{Mapping, NetworkMode, NetworkSpec, Protocol};
use skerry_engine::run::RunSpec;
use skerry_engine::vm::VmSpec;
use skerry_engine::vms::{self, Begin, Detached, Launch, RestartPolicy};
use skerry_engine::{MachineOptions, WinSize};

use super::exec::{SIZE, Size, variables};
use super::query::bytes;
use super::reaper::{self, LABEL};
use crate::error::ApiError;
use crate::work::{Shared, work};

/// An object of which fields are taken, one after the other.
pub(super) struct Fields {
    path: &'static str,
    rest: Map<String, Value>,
}

impl Fields {
    pub(super) fn of(path: &'static str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(rest) => Ok(Self { path, rest }),
            Value::Null => Ok(Self {
                path,
                rest: Map::new(),
            }),
            _ => Err(ApiError::invalid(format!("{path} is no object"))),
        }
    }

    /// A field, or its type's default where it is missing or null.
    pub(super) fn take<T: DeserializeOwned + Default>(
        &mut self,
        name: &str,
    ) -> Result<T, ApiError> {
        match self.rest.remove(name) {
            None | Some(Value::Null) => Ok(T::default()),
            Some(value) => serde_json::from_value(value).map_err(|error| {
                ApiError::invalid(format!(
                    "{}{name} is not what it should be: {error}",
                    self.path
                ))
            }),
        }
    }

    /// Takes a field that makes no difference to a machine.
    pub(super) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.rest.remove(*name);
        }
    }

    /// Refuses what is left, unless it asks for nothing.
    pub(super) fn end(self) -> Result<(), ApiError> {
        match self.rest.iter().find(|(_, value)| !is_nothing(value)) {
            None => Ok(()),
            Some((name, value)) => Err(ApiError::invalid(format!(
                "{}{name} ({value}) can't be had with a virtual machine here: leave it out",
                self.path
            ))),
        }
    }
}

/// Whether a value is what a client writes that was asked for nothing.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        // Docker's word for "as usual" in some fields.
        Value::Number(number) => number.as_f64() == Some(0.0) || number.as_i64() == Some(-1),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.iter().all(is_nothing),
        Value::Object(fields) => fields.values().all(is_nothing),
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct CreateQuery {
    name: Option<String>,
    platform: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Binding {
    host_ip: String,
    host_port: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Restart {
    name: String,
    maximum_retry_count: u32,
}

pub(super) async fn create(
    State(app): State<Shared>,
    Query(query): Query<CreateQuery>,
    Json(body): Json<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    if let Some(platform) = query.platform.filter(|platform| !platform.is_empty())
        && !["linux/amd64", "linux"].contains(&platform.as_str())
    {
        return Err(ApiError::invalid(format!(
            "Machines are linux/amd64, and not {platform}"
        )));
    }
    let described = described(body)?;
    let name = query.name.unwrap_or_default();
    work(&app, move |app| {
        let name = name.trim_start_matches('/').to_owned();
        // The client pulls what is missing, and asks again.
        if let Some(missing) = images::to_pull(app.paths(), &described.image, PullPolicy::Missing)?
        {
            return Err(ApiError::missing(format!("No such image: {missing}")));
        }
        let launch = Launch {
            root: app.paths().root().to_owned(),
            begin: Begin::Image(described.image),
            spec: described.spec,
            name,
            auto_remove: false,
        };
        let mut notes = Vec::new();
        let id = vms::create(&launch, &mut |text| notes.push(text.to_owned()))?;
        Ok((
            StatusCode::CREATED,
            Json(json!({ "Id": id, "Warnings": notes })),
        ))
    })
    .await
}

/// What a client wants.
#[derive(Debug)]
struct Described {
    image: String,
    spec: RunSpec,
}

fn described(body: Value) -> Result<Described, ApiError> {
    let mut config = Fields::of("", body)?;
    let mut host = Fields::of("HostConfig.", config.take("HostConfig")?)?;
    let image: String = config.take("Image")?;
    let tty: bool = config.take("Tty")?;
    let size: Option<[u16; 2]> = host.take("ConsoleSize")?;
    let command = command(&mut config, tty.then(|| window(size)))?;
    let mut labels: BTreeMap<String, String> = config.take("Labels")?;
    if host.take::<bool>("AutoRemove")? {
        labels.insert(LABEL.to_owned(), "true".to_owned());
    }
    let hostname: String = config.take("Hostname")?;
    let spec = RunSpec {
        command,
        labels,
        restart: restart(host.take("RestartPolicy")?)?,
        vm: VmSpec {
            options: options(&mut host)?,
            network: network(&mut host, config.take("NetworkingConfig")?)?,
            mounts: mounts(&mut config, &mut host)?,
            read_only: host.take("ReadonlyRootfs")?,
            pids_limit: pids_limit(&mut host)?,
            disk_size: disk_size(&mut host)?,
            hostname: (!hostname.is_empty()).then_some(hostname),
            ..VmSpec::default()
        },
        ..RunSpec::default()
    };
    // What is attached is said with the connection; which ports an image has is for people; logs are
    // kept as docker's usual driver keeps them; each machine has its own kernel and namespaces.
    config.ignore(&[
        "AttachStdin",
        "AttachStdout",
        "AttachStderr",
        "ExposedPorts",
    ]);
    config.ignore(&["StdinOnce", "NetworkDisabled", "MacAddress"]);
    let mut log = Fields::of("HostConfig.LogConfig.", host.take("LogConfig")?)?;
    let driver: String = log.take("Type")?;
    if !["", "json-file"].contains(&driver.as_str()) {
        return Err(ApiError::invalid(format!(
            "Logs are kept as json-file keeps them: {driver} can't be had"
        )));
    }
    log.end()?;
    host.ignore(&["ShmSize", "CgroupnsMode", "IpcMode", "UTSMode"]);
    host.end()?;
    config.end()?;
    Ok(Described { image, spec })
}

fn window(size: Option<[u16; 2]>) -> WinSize {
    match size {
        None | Some([0, _] | [_, 0]) => SIZE,
        Some([rows, cols]) => WinSize { rows, cols, ..SIZE },
    }
}

/// One word, or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Words {
    One(String),
    Several(Vec<String>),
}

fn command(config: &mut Fields, tty: Option<WinSize>) -> Result<CommandSpec, ApiError> {
    let words = |words: Option<Words>| match words {
        None => Vec::new(),
        Some(Words::One(word)) => vec![word],
        Some(Words::Several(words)) => words,
    };
    let mut command = words(config.take("Cmd")?);
    let mut entrypoint = words(config.take("Entrypoint")?);
    let entrypoint = match entrypoint.is_empty() {
        true => None,
        false => {
            let program = entrypoint.remove(0);
            command.splice(0..0, entrypoint);
            Some(program)
        }
    };
    let some = |text: String| (!text.is_empty()).then_some(text);
    Ok(CommandSpec {
        command,
        entrypoint,
        env: variables(config.take("Env")?),
        working_dir: some(config.take("WorkingDir")?),
        user: some(config.take("User")?),
        tty,
        stdin: config.take("OpenStdin")?,
    })
}

fn restart(policy: Restart) -> Result<RestartPolicy, ApiError> {
    let most = (policy.maximum_retry_count > 0).then_some(policy.maximum_retry_count);
    match policy.name.as_str() {
        "" | "no" => Ok(RestartPolicy::No),
        "always" => Ok(RestartPolicy::Always),
        "unless-stopped" => Ok(RestartPolicy::UnlessStopped),
        "on-failure" => Ok(RestartPolicy::OnFailure(most)),
        other => Err(ApiError::invalid(format!(
            "There is no restart policy {other}: use no, on-failure, always or unless-stopped"
        ))),
    }
}

fn options(host: &mut Fields) -> Result<MachineOptions, ApiError> {
    let (memory, cpus): (u64, u64) = (host.take("Memory")?, host.take("NanoCpus")?);
    // What docker's client sends by itself with --memory: as much swap again, or none.
    host.ignore(&["MemorySwap"]);
    let mut options = MachineOptions::default();
    if memory > 0 {
        options.memory = memory;
    }
    if cpus > 0 {
        options.set_nano_cpus(cpus)?;
    }
    let parent: String = host.take("CgroupParent")?;
    options.cgroup_parent = (!parent.is_empty()).then_some(parent);
    Ok(options)
}

/// The most processes; docker says with -1 and 0 that there is no such limit.
fn pids_limit(host: &mut Fields) -> Result<Option<u32>, ApiError> {
    match host.take::<Option<i64>>("PidsLimit")? {
        None | Some(-1 | 0) => Ok(None),
        Some(most) => u32::try_from(most)
            .map(Some)
            .map_err(|_| ApiError::invalid(format!("{most} is no number of processes"))),
    }
}

/// The size of the machine's disk.
fn disk_size(host: &mut Fields) -> Result<Option<u64>, ApiError> {
    let mut options = host.take::<BTreeMap<String, String>>("StorageOpt")?;
    let size = options.remove("size");
    if let Some(other) = options.keys().next() {
        return Err(ApiError::invalid(format!(
            "The only storage option is size: {other} can't be had"
        )));
    }
    size.map(|size| bytes(&size)).transpose()
}

/// Folders, volumes and memory file systems.
fn mounts(config: &mut Fields, host: &mut Fields) -> Result<Vec<MountSpec>, ApiError> {
    let mut all = Vec::new();
    for text in host.take::<Vec<String>>("Binds")? {
        all.push(bind(&text)?);
    }
    for mount in host.take::<Vec<Value>>("Mounts")? {
        let mut mount = Fields::of("HostConfig.Mounts.", mount)?;
        let (kind, source): (String, String) = (mount.take("Type")?, mount.take("Source")?);
        let kind = match kind.as_str() {
            "bind" => MountKind::Bind {
                source: source.into(),
            },
            "volume" | "" => MountKind::Volume {
                name: (!source.is_empty()).then_some(source),
                no_copy: false,
            },
            "tmpfs" => MEMORY,
            other => {
                return Err(ApiError::invalid(format!(
                    "Nothing of type {other} can be mounted: use bind, volume or tmpfs"
                )));
            }
        };
        all.push(MountSpec {
            kind,
            target: mount.take("Target")?,
            read_only: mount.take("ReadOnly")?,
        });
        mount.end()?;
    }
    let writable = |kind, target| MountSpec {
        kind,
        target,
        read_only: false,
    };
    for (target, options) in host.take::<BTreeMap<String, String>>("Tmpfs")? {
        if !options.is_empty() {
            return Err(ApiError::invalid(format!(
                "The memory file system {target} can't have options through this server: {options}"
            )));
        }
        all.push(writable(MEMORY, target));
    }
    // Those of `-v /folder` alone have a volume of their own.
    for (target, _) in config.take::<Map<String, Value>>("Volumes")? {
        let own = MountKind::Volume {
            name: None,
            no_copy: false,
        };
        all.push(writable(own, target));
    }
    Ok(all)
}

/// A memory file system as docker's client has it without more words.
const MEMORY: MountKind = MountKind::Tmpfs {
    size: None,
    mode: None,
};

/// `HOST:GUEST[:ro]`, where what doesn't begin with a slash is a volume.
fn bind(text: &str) -> Result<MountSpec, ApiError> {
    let wrong = || ApiError::invalid(format!("{text:?} can't be mounted: write HOST:GUEST[:ro]"));
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, read_only) = match parts[..] {
        [source, target] | [source, target, "rw"] => (source, target, false),
        [source, target, "ro"] => (source, target, true),
        _ => return Err(wrong()),
    };
    let kind = match source.starts_with('/') {
        true => MountKind::Bind {
            source: source.into(),
        },
        false => MountKind::Volume {
            name: Some(source.to_owned()),
            no_copy: false,
        },
    };
    Ok(MountSpec {
        kind,
        target: target.to_owned(),
        read_only,
    })
}

/// What a client says of one network.
fn endpoint(endpoint: Value, aliases: &mut Vec<String>) -> Result<(), ApiError> {
    let mut endpoint = Fields::of("NetworkingConfig.EndpointsConfig.", endpoint)?;
    aliases.extend(endpoint.take::<Vec<String>>("Aliases")?);
    endpoint.end()
}

fn network(host: &mut Fields, networking: Value) -> Result<NetworkSpec, ApiError> {
    let name: String = host.take("NetworkMode")?;
    let (mut mode, mut join, mut aliases) = (None, Vec::new(), Vec::new());
    let mut add = |name: &str| match name {
        "" | "default" | "bridge" => Ok(()),
        "none" => {
            mode = Some(NetworkMode::None);
            Ok(())
        }
        "host" => Err(ApiError::invalid(
            "A machine has a network of its own, and not the host's: use bridge, none or one's name",
        )),
        name => {
            if !join.iter().any(|known| known == name) {
                join.push(name.to_owned());
            }
            Ok(())
        }
    };
    add(&name)?;
    let mut networking = Fields::of("NetworkingConfig.", networking)?;
    for (name, of_it) in networking.take::<Map<String, Value>>("EndpointsConfig")? {
        add(&name)?;
        endpoint(of_it, &mut aliases)?;
    }
    networking.end()?;
    let bindings: BTreeMap<String, Option<Vec<Binding>>> = host.take("PortBindings")?;
    let mut publish = Vec::new();
    for (port, bindings) in bindings {
        for binding in bindings.unwrap_or_default() {
            publish.push(mapping(&port, &binding)?);
        }
    }
    let servers: Vec<String> = host.take("Dns")?;
    let server = |text: &String| match text.parse::<IpAddr>() {
        Ok(address) => Ok(SocketAddr::new(address, 53)),
        Err(_) => Err(ApiError::invalid(format!(
            "{text:?} is no name server's address"
        ))),
    };
    Ok(NetworkSpec {
        mode,
        publish,
        dns: servers.iter().map(server).collect::<Result<_, _>>()?,
        join,
        aliases,
        ..NetworkSpec::default()
    })
}

/// A port as `80/tcp`, and where the host is to listen for it.
fn mapping(port: &str, binding: &Binding) -> Result<Mapping, ApiError> {
    let wrong = || ApiError::invalid(format!("{port} can't be published as {binding:?}"));
    let (guest, protocol) = match port.split_once('/') {
        None => (port, Protocol::Tcp),
        Some((guest, "tcp")) => (guest, Protocol::Tcp),
        Some((guest, "udp")) => (guest, Protocol::Udp),
        Some(_) => return Err(wrong()),
    };
    let address = match binding.host_ip.as_str() {
        "" => Ipv4Addr::UNSPECIFIED.into(),
        text => text.parse().map_err(|_| wrong())?,
    };
    let number = match binding.host_port.as_str() {
        "" => 0,
        text => text.parse().map_err(|_| wrong())?,
    };
    Ok(Mapping {
        host: SocketAddr::new(address, number),
        guest: guest.parse().map_err(|_| wrong())?,
        protocol,
    })
}

pub(super) async fn start(
    State(app): State<Shared>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let watched = app.clone();
    work(&app, move |app| {
        let info = app.registry()?.find(&id)?;
        if info.state.status.is_alive() {
            return Ok(StatusCode::NOT_MODIFIED);
        }
        let mut note = |text: &str| tracing::info!("{text}");
        match vms::start(
            app.paths(),
            &app.options.program,
            &info.config.id,
            &mut note,
        )? {
            Detached::Runs(id) => {
                if info.config.labels.contains_key(LABEL) {
                    reaper::watch(&watched, &id);
                }
                Ok(StatusCode::NO_CONTENT)
            }
            // What docker's client makes 126 and 127 of, by the words.
            Detached::NotStarted(failure) => {
                const NOT_FOUND: u8 = 127;
                let words = match failure.kind.shell_code() {
                    NOT_FOUND => "executable file not found",
                    _ => "permission denied",
                };
                let message = failure.message;
                if info.config.labels.contains_key(LABEL) {
                    let _ = vms::remove(&app.registry()?, &info.config.id, true);
                }
                Err(ApiError::invalid(format!("{message} ({words})")))
            }
        }
    })
    .await
}

#[derive(Debug, Deserialize)]
pub(super) struct RestartQuery {
    t: Option<u32>,
}

pub(super) async fn start_anew(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(RestartQuery { t }): Query<RestartQuery>,
) -> Result<StatusCode, ApiError> {
    const TEN_SECONDS: u32 = 10;
    let again = id.clone();
    work(&app, move |app| {
        let grace = std::time::Duration::from_secs(t.unwrap_or(TEN_SECONDS).into());
        Ok(vms::stop(&app.registry()?, &id, grace).map(drop)?)
    })
    .await?;
    start(State(app), Path(again)).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn resize(
    State(app): State<Shared>,
    Path(id): Path<String>,
    Query(Size { h, w }): Query<Size>,
) -> Result<StatusCode, ApiError> {
    let size = WinSize {
        rows: h,
        cols: w,
        ..SIZE
    };
    work(&app, move |app| {
        vms::resize(&app.registry()?, &id, size)?;
        Ok(StatusCode::OK)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `docker run -d --name web -p 8080:80 -e A=1 -m 256m --cpus 2 --rm demo sh -c x` sends.
    fn body() -> Value {
        json!({
            "Hostname": "", "Domainname": "", "User": "", "AttachStdin": false, "AttachStdout": false,
            "AttachStderr": false, "ExposedPorts": { "80/tcp": {} }, "Tty": false, "OpenStdin": false,
            "StdinOnce": false, "Env": ["A=1"], "Cmd": ["sh", "-c", "x"], "Image": "demo",
            "Volumes": {}, "WorkingDir": "", "Entrypoint": null, "OnBuild": null, "Labels": {},
            "HostConfig": {
                "Binds": null, "ContainerIDFile": "", "LogConfig": { "Type": "", "Config": {} },
                "NetworkMode": "default",
                "PortBindings": { "80/tcp": [{ "HostIp": "", "HostPort": "8080" }] },
                "RestartPolicy": { "Name": "no", "MaximumRetryCount": 0 }, "AutoRemove": true,
                "VolumeDriver": "", "VolumesFrom": null, "ConsoleSize": [0, 0], "CapAdd": null,
                "Privileged": false, "Memory": 268_435_456, "NanoCpus": 2_000_000_000,
                "MemorySwap": 0, "MemorySwappiness": -1, "OomKillDisable": false, "PidsLimit": 0,
                "BlkioWeightDevice": [], "Dns": [], "ShmSize": 0,
            },
            "NetworkingConfig": { "EndpointsConfig": { "default": { "Links": null } } },
        })
    }

    #[test]
    fn what_the_client_says_is_taken() {
        let Described { image, spec } = described(body()).expect("it can be had");
        assert_eq!(image, "demo");
        assert_eq!(spec.command.command, ["sh", "-c", "x"]);
        assert_eq!(spec.command.env, [("A".to_owned(), "1".to_owned())]);
        assert_eq!(
            (spec.vm.options.memory, spec.vm.options.cpus),
            (256 << 20, 2)
        );
        assert!(spec.labels.contains_key(LABEL));
        let port = spec.vm.network.publish.first().expect("a port");
        assert_eq!((port.guest, port.host.port()), (80, 8080));
    }

    #[test]
    fn bounds_are_taken() {
        let mut body = body();
        body["HostConfig"]["NanoCpus"] = json!(1_500_000_000);
        body["HostConfig"]["PidsLimit"] = json!(100);
        body["HostConfig"]["StorageOpt"] = json!({ "size": "10GB" });
        body["HostConfig"]["CgroupParent"] = json!("/some");
        let vm = described(body).expect("it can be had").spec.vm;
        assert_eq!(
            (vm.options.cpus, vm.options.nano_cpus),
            (2, Some(1_500_000_000))
        );
        assert_eq!((vm.pids_limit, vm.disk_size), (Some(100), Some(10 << 30)));
        assert_eq!(vm.options.cgroup_parent.as_deref(), Some("/some"));
    }

    #[test]
    fn folders_and_networks_are_taken() {
        let mut body = body();
        body["HostConfig"]["Binds"] = json!(["/srv:/data:ro", "disk:/var"]);
        body["HostConfig"]["NetworkMode"] = json!("inner");
        let inner = json!({ "inner": { "Aliases": ["db"] } });
        body["NetworkingConfig"]["EndpointsConfig"] = inner;
        let Described { spec, .. } = described(body).expect("it can be had");
        let [folder, volume] = &spec.vm.mounts[..] else {
            panic!("{:?}", spec.vm.mounts);
        };
        let is_srv = |kind: &MountKind| matches!(kind, MountKind::Bind { source } if source.as_os_str() == "/srv");
        assert!(folder.read_only && is_srv(&folder.kind));
        let is_disk = |kind: &MountKind| matches!(kind, MountKind::Volume { name: Some(name), .. } if name == "disk");
        assert!(!volume.read_only && is_disk(&volume.kind));
        assert_eq!(spec.vm.network.join, ["inner"]);
        assert_eq!(spec.vm.network.aliases, ["db"]);
    }

    #[test]
    fn what_can_not_be_had_is_named() {
        let refused = |path: &str, value: Value| {
            let mut body = body();
            let (parent, field) = path.rsplit_once('/').expect("a path");
            body.pointer_mut(parent).expect("an object")[field] = value;
            described(body).expect_err("it can't be had").into_message()
        };
        assert!(refused("/HostConfig/Privileged", json!(true)).contains("HostConfig.Privileged"));
        assert!(refused("/HostConfig/CapAdd", json!(["ALL"])).contains("HostConfig.CapAdd"));
        assert!(refused("/Domainname", json!("x")).contains("Domainname"));
        assert!(refused("/HostConfig/NanoCpus", json!(1)).contains("0.01"));
        assert!(refused("/HostConfig/StorageOpt", json!({ "dm.x": "1" })).contains("dm.x"));
        assert!(refused("/HostConfig/StorageOpt", json!({ "size": "1X" })).contains("1X"));
        assert!(refused("/HostConfig/NetworkMode", json!("host")).contains("host"));
        assert!(refused("/HostConfig/Binds", json!(["/a:/b:z"])).contains("/a:/b:z"));
        assert!(refused("/HostConfig/LogConfig/Type", json!("syslog")).contains("syslog"));
    }
}
