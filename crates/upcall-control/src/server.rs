//! The worker's side: one thread with a small runtime of its own.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use axum::extract::connect_info::Connected;
use axum::extract::rejection::JsonRejection;
use axum::extract::{ConnectInfo, Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use axum::{Json, Router, body::Body, http::StatusCode};
use serde::Deserialize;
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::BroadcastStream;
use upcall_worker::{Chains, ChainsNow, DiskSummary};
use utoipa::OpenApi;

use crate::events::Events;
use crate::problem::Problem;
use crate::resource::*;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// Another worker, or something else, is there.
    #[error("{path}: a control socket is in use there: name another place with --control")]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// Something that is no socket is there, and is not replaced.
    #[error(
        "{path}: exists and is no socket, so it is not replaced: name another place with --control"
    )]
    NotASocket {
        /// Where.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("{path}: no control socket can be made: {source}")]
    System {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A control socket that is served. Dropping it ends that; a change that is on its way is waited
/// for by whoever ends the worker.
pub struct Server {
    path: PathBuf,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What is served, and its chains: asked anew for each call, as both may come and go.
pub struct Shown {
    #[allow(missing_docs)]
    pub disks: Box<dyn Fn() -> Vec<DiskSummary> + Send + Sync>,
    /// Those of `disks`, in their order.
    pub chains: Box<dyn Fn() -> ChainsNow + Send + Sync>,
}

/// What the calls work on.
struct Served {
    shown: Shown,
    events: Events,
    owner: u32,
}

impl Server {
    /// Serves at `path`, with the permissions `mode`, what is `shown`.
    pub fn start(
        path: &FilePath,
        mode: u32,
        shown: Shown,
        events: Events,
    ) -> Result<Server, ServerError> {
        let failed = |source| ServerError::System { path: path.to_owned(), source };
        let listener = bind(path, mode)?;
        let owner = std::fs::metadata("/proc/self").map_or(0, |own| {
            use std::os::unix::fs::MetadataExt;
            own.uid()
        });
        let served = Served { shown, events, owner };
        let (end, ended) = oneshot::channel();
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let thread = std::thread::Builder::new().name("upcall-control".into()).spawn(move || {
            runtime.block_on(serve(listener, Arc::new(served), ended));
            // Nobody waits for calls that are still on their way.
            runtime.shutdown_background();
        });
        let thread = thread.map_err(failed)?;
        Ok(Server { path: path.to_owned(), end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.end.take());
        let _ = self.thread.take().map(JoinHandle::join);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Listens at a path. A socket that a dead worker has left there is replaced.
fn bind(path: &FilePath, mode: u32) -> Result<std::os::unix::net::UnixListener, ServerError> {
    let failed = |source| ServerError::System { path: path.to_owned(), source };
    if let Ok(found) = path.symlink_metadata() {
        if !found.file_type().is_socket() {
            return Err(ServerError::NotASocket { path: path.to_owned() });
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(ServerError::InUse { path: path.to_owned() });
        }
    }
    // Nobody finds it before it has its permissions.
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".{}", std::process::id()));
    let unfinished = PathBuf::from(unfinished);
    let _ = std::fs::remove_file(&unfinished);
    let listener = std::os::unix::net::UnixListener::bind(&unfinished).map_err(failed)?;
    let made = std::fs::set_permissions(&unfinished, std::fs::Permissions::from_mode(mode))
        .and_then(|()| std::fs::rename(&unfinished, path))
        .and_then(|()| listener.set_nonblocking(true));
    if let Err(error) = made {
        let _ = std::fs::remove_file(&unfinished);
        return Err(failed(error));
    }
    Ok(listener)
}

async fn serve(
    listener: std::os::unix::net::UnixListener,
    served: Arc<Served>,
    ended: oneshot::Receiver<()>,
) {
    let listener = match UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!("no control socket: {error}"),
    };
    let app = router(served).into_make_service_with_connect_info::<Peer>();
    tokio::select! {
        result = axum::serve(listener, app) => {
            if let Err(error) = result {
                tracing::error!("the control socket ends: {error}");
            }
        }
        _ = ended => {}
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
struct Peer {
    /// None: the system does not say.
    user: Option<u32>,
    process: Option<i32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Peer {
        let credentials = stream.io().peer_cred().ok();
        Peer {
            user: credentials.map(|who| who.uid()),
            process: credentials.and_then(|who| who.pid()),
        }
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Upcall worker",
        description = "The control socket of a worker: HTTP over a Unix socket."
    ),
    paths(worker, disks, disk, in_flight, change, events, metrics),
    components(schemas(Problem))
)]
struct Api;

/// The description of the socket's calls, as JSON.
pub fn openapi() -> String {
    let mut text = Api::openapi().to_pretty_json().unwrap_or_default();
    text.push('\n');
    text
}

fn router(served: Arc<Served>) -> Router {
    Router::new()
        .route("/v1/worker", get(worker))
        .route("/v1/disks", get(disks))
        .route("/v1/disks/{disk}", get(disk))
        .route("/v1/disks/{disk}/in-flight", get(in_flight))
        .route("/v1/changes", post(change))
        .route("/v1/events", get(events))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(|| async { openapi() }))
        .fallback(|| async { Problem::new("not-found", StatusCode::NOT_FOUND, "no such call") })
        .with_state(served)
}

fn all_disks(served: &Served) -> Vec<Disk> {
    let disks = (served.shown.disks)();
    let (state, chains) = match (served.shown.chains)() {
        ChainsNow::Here(chains) => (DiskState::Here, chains),
        ChainsNow::Leaving(chains) => (DiskState::Leaving, chains),
        ChainsNow::Waiting => return disks.iter().map(Disk::waiting).collect(),
    };
    let (views, hops) = (chains.chains(), chains.hops());
    disks.iter().zip(&views).map(|(disk, chain)| Disk::new(disk, state, chain, &hops)).collect()
}

/// The chains, if they may be changed now; else which problem there is, and what to do.
fn changeable(served: &Served) -> Result<Chains, (&'static str, &'static str)> {
    match (served.shown.chains)() {
        ChainsNow::Here(chains) => Ok(chains),
        ChainsNow::Leaving(_) => Err((
            "leaving",
            "the guest is being migrated, and where it goes its disks are awaited with the chains \
             that they have now: change them when the migration has ended, where the guest is then",
        )),
        ChainsNow::Waiting => Err((
            "waiting",
            "the guest is not on this host: change the chains where it is, or, if it is nowhere, \
             start this worker with other filters",
        )),
    }
}

fn no_disk(name: &str) -> Problem {
    let detail = format!("there is no disk {name:?}");
    Problem {
        disk: Some(name.to_owned()),
        ..Problem::new("not-found", StatusCode::NOT_FOUND, detail)
    }
}

/// Who answers
#[utoipa::path(get, path = "/v1/worker", responses((status = 200, body = Worker)))]
async fn worker() -> Json<Worker> {
    Json(Worker { process: std::process::id(), version: env!("CARGO_PKG_VERSION").to_owned() })
}

/// All disks, with their chains and counters
#[utoipa::path(get, path = "/v1/disks", responses((status = 200, body = Vec<Disk>)))]
async fn disks(State(served): State<Arc<Served>>) -> Json<Vec<Disk>> {
    Json(all_disks(&served))
}

/// One disk
#[utoipa::path(get, path = "/v1/disks/{disk}", params(("disk" = String, Path)),
    responses((status = 200, body = Disk), (status = 404, body = Problem)))]
async fn disk(
    State(served): State<Arc<Served>>,
    Path(name): Path<String>,
) -> Result<Json<Disk>, Problem> {
    let found = all_disks(&served).into_iter().find(|disk| disk.name == name);
    found.map(Json).ok_or_else(|| no_disk(&name))
}

/// What is in flight on a disk now: where each request waits, and since when
#[utoipa::path(get, path = "/v1/disks/{disk}/in-flight", params(("disk" = String, Path)),
    responses((status = 200, body = Vec<InFlight>), (status = 404, body = Problem)))]
async fn in_flight(
    State(served): State<Arc<Served>>,
    Path(name): Path<String>,
) -> Result<Json<Vec<InFlight>>, Problem> {
    let place = (served.shown.disks)().iter().position(|disk| disk.name == name);
    let place = place.ok_or_else(|| no_disk(&name))?;
    let (ChainsNow::Here(chains) | ChainsNow::Leaving(chains)) = (served.shown.chains)() else {
        return Ok(Json(Vec::new()));
    };
    let asked = tokio::task::spawn_blocking(move || chains.in_flight(place));
    let all = asked.await.unwrap_or_default();
    Ok(Json(all.iter().map(InFlight::new).collect()))
}

/// Change chains, and wait until that has ended
///
/// Only for root and the user that the worker runs as.
#[utoipa::path(post, path = "/v1/changes", request_body = Change,
    responses((status = 200, body = Changed), (status = "4XX", body = Problem)))]
async fn change(
    State(served): State<Arc<Served>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    body: Result<Json<Change>, JsonRejection>,
) -> Result<Json<Changed>, Problem> {
    let Peer { user, process } = peer;
    let who = match (user, process) {
        (Some(user), Some(process)) => format!("user {user}, process {process}"),
        (Some(user), None) => format!("user {user}"),
        _ => "somebody".to_owned(),
    };
    if !user.is_some_and(|user| user == 0 || user == served.owner) {
        tracing::warn!(user, process, "{who} asked for a chain change, and may not");
        return Err(Problem::new(
            "forbidden",
            StatusCode::FORBIDDEN,
            format!("{who} may look, but not change: ask as root or as user {}", served.owner),
        ));
    }
    let nonsense = |why: String| Problem::new("bad-request", StatusCode::BAD_REQUEST, why);
    let Json(asked) = body.map_err(|error| nonsense(error.body_text()))?;
    let wanted = asked.to_worker().map_err(nonsense)?;
    let what = summary(&asked);
    let chains = changeable(&served).map_err(|(kind, why)| {
        tracing::warn!(
            user,
            process,
            change = what,
            why,
            "{who} asked for a chain change ({what}), and is refused: {why}"
        );
        Problem::new(kind, StatusCode::CONFLICT, why)
    })?;
    if !asked.dry_run {
        tracing::info!(user, process, change = what, "{who} asks for a chain change: {what}");
    }
    let done = tokio::task::spawn_blocking(move || {
        let done = chains.change(&wanted);
        match &done {
            _ if wanted.is_dry_run => {}
            Ok(changed) => {
                let pause_us = changed.pause_us;
                tracing::info!(
                    user,
                    process,
                    change = what,
                    pause_us,
                    "the chain change of {who} is made ({what}); pause {pause_us} us"
                );
            }
            Err(error) => tracing::warn!(
                user,
                process,
                change = what,
                why = %error,
                "the chain change of {who} is not made ({what}): {error}"
            ),
        }
        done
    });
    match done.await {
        Ok(Ok(changed)) => Ok(Json(Changed::new(&changed))),
        Ok(Err(error)) => Err(Problem::of_change(&error)),
        Err(_) => Err(Problem::new(
            "ending",
            StatusCode::SERVICE_UNAVAILABLE,
            "the change ended by a bug of ours; see the worker's log",
        )),
    }
}

/// On one line, for the log.
fn summary(change: &Change) -> String {
    let edit = |edit: &Edit| match edit {
        Edit::Attach { file, .. } => format!("attach {}", file.display()),
        Edit::Detach { slot } => format!("detach {slot}"),
        Edit::Replace { slot, file: Some(file), .. } => {
            format!("replace {slot} with {}", file.display())
        }
        Edit::Replace { slot, file: None, .. } => format!("other parameters for {slot}"),
        Edit::Set { slot, .. } => format!("other terms for {slot}"),
    };
    let disk = |disk: &DiskChange| {
        let edits: Vec<String> = disk.edits.iter().map(edit).collect();
        format!("disk {}: {}", disk.disk, edits.join(", "))
    };
    change.disks.iter().map(disk).collect::<Vec<_>>().join("; ")
}

#[derive(Debug, Default, Deserialize)]
struct Follow {
    #[serde(default)]
    follow: bool,
}

/// What happened lately, the oldest first; with `follow=true` also what happens from now on
///
/// One JSON object a line.
#[utoipa::path(get, path = "/v1/events", params(("follow" = Option<bool>, Query)),
    responses((status = 200, body = Event, content_type = "application/x-ndjson")))]
async fn events(State(served): State<Arc<Served>>, Query(asked): Query<Follow>) -> Response {
    let (kept, news) = served.events.all();
    let line = |event: &Event| {
        let mut line = serde_json::to_string(event).unwrap_or_default();
        line.push('\n');
        Ok::<_, std::convert::Infallible>(line)
    };
    let kept = tokio_stream::iter(kept.iter().map(line).collect::<Vec<_>>());
    let headers = [("content-type", "application/x-ndjson")];
    if !asked.follow {
        return (headers, Body::from_stream(kept)).into_response();
    }
    // Who reads too slowly misses some: the numbers show it.
    let news = BroadcastStream::new(news).filter_map(move |event| Some(line(&event.ok()?)));
    (headers, Body::from_stream(kept.chain(news))).into_response()
}

/// Metrics for Prometheus, in the OpenMetrics format
#[utoipa::path(get, path = "/metrics",
    responses((status = 200, body = String, content_type = "application/openmetrics-text")))]
async fn metrics(State(served): State<Arc<Served>>) -> impl IntoResponse {
    let headers = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    (headers, crate::metrics::text(all_disks(&served)))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_description_in_the_tree_is_that_of_the_code() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/control.openapi.json");
        if std::env::var_os("UPCALL_WRITE_OPENAPI").is_some() {
            std::fs::write(path, super::openapi()).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            kept == super::openapi(),
            "{path} is out of date: run this test with UPCALL_WRITE_OPENAPI=1"
        );
    }
}
