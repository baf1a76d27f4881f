//! The NBD servers of a worker: one for each address, with the disks that name it as exports.

use std::sync::Arc;

use upcall_block::{Op, Store};
use upcall_chain::{Chain, Entry, Route};
use upcall_nbd::{
    Address as NbdPlace, ExportConfig, ExportInfo, Extents, Level, Limits, Listener, Log, Server,
    ServerBuilder, Tls,
};

use super::{StartingDisk, system};
use crate::config::{DiskConfig, LogLevel, LogSink, NbdAddress, NbdConfig, NbdTls};
use crate::engine::Command;
use crate::error::StartError;
use crate::worker::{RunningEngine, ServedDisk};

/// A server before it serves: it listens already, so that a bad address is known early.
pub(super) struct StartingServer {
    address: Address,
    tls_config: Option<NbdTls>,
    connections: usize,
    listener: Listener,
    tls: Option<(Tls, bool)>,
    /// Indices of its disks.
    disks: Vec<usize>,
}

/// What makes two disks' addresses the same.
#[derive(PartialEq)]
enum Address {
    Path(std::path::PathBuf),
    Tcp(String),
    Fd(i32),
}

/// Listens on all addresses that the disks name, and reads certificates.
pub(super) fn listen(disks: &mut [DiskConfig]) -> Result<Vec<StartingServer>, StartError> {
    let mut servers: Vec<StartingServer> = Vec::new();
    for (index, disk) in disks.iter_mut().enumerate() {
        let name = disk.name.clone();
        let writable_twice = disk.frontend.is_some() && !disk.read_only;
        let Some(nbd) = &mut disk.nbd else { continue };
        if writable_twice && !nbd.read_only {
            return Err(StartError::SecondWriter { disk: name });
        }
        let NbdConfig { tls, connections, .. } = &*nbd;
        let (tls, connections) = (tls.clone(), *connections);
        // What is left in its place is used no more.
        let source = std::mem::replace(&mut nbd.address, NbdAddress::Tcp(String::new()));
        let address = match &source {
            NbdAddress::Unix(path, _) => Address::Path(path.clone()),
            NbdAddress::Tcp(address) => Address::Tcp(address.clone()),
            NbdAddress::Fd(number, _) => Address::Fd(*number),
        };
        if let Some(server) = servers.iter_mut().find(|server| server.address == address) {
            if (&server.tls_config, server.connections) != (&tls, connections) {
                return Err(StartError::NbdShared { disk: name });
            }
            server.disks.push(index);
            continue;
        }
        let listener = bind(&name, source)?;
        let loaded = match &tls {
            None => None,
            Some(NbdTls { files, required }) => {
                let failed = |source| StartError::NbdTls { disk: name, source };
                Some((Tls::load(files).map_err(failed)?, *required))
            }
        };
        servers.push(StartingServer {
            address,
            tls_config: tls,
            connections,
            listener,
            tls: loaded,
            disks: vec![index],
        });
    }
    Ok(servers)
}

fn bind(disk: &str, address: NbdAddress) -> Result<Listener, StartError> {
    let failed = |source| StartError::NbdListen { disk: disk.to_owned(), source };
    match address {
        NbdAddress::Unix(path, mode) => upcall_vhost::Listener::bind(&path, mode)
            .map(|listener| Listener::unix(listener, &path))
            .map_err(|source| StartError::Listen { disk: disk.to_owned(), source }),
        NbdAddress::Tcp(address) => Listener::tcp(&address).map_err(failed),
        NbdAddress::Fd(_, fd) => Listener::adopt(fd).map_err(failed),
    }
}

/// What a disk's clients are told.
fn export(disk: &StartingDisk, nbd: &NbdConfig) -> Result<ExportConfig, StartError> {
    let mut info = disk.chain.info().clone();
    info.read_only |= nbd.read_only;
    let native = disk.chain.route(Op::WriteZeroes, Entry::Top) == Route::Native;
    // A store that can discard makes holes, which cost nothing.
    let fast_zero = native && disk.store.info().ops.contains(Op::Discard);
    let description = format!("disk {} of Upcall", disk.name);
    let info = ExportInfo::new(nbd.export.clone(), description, info, fast_zero)
        .map_err(|source| StartError::NbdExport { disk: disk.name.to_string(), source })?;
    Ok(ExportConfig {
        info,
        extents: extents(&disk.chain, &disk.store),
        write_through: !nbd.write_cache,
        queues: nbd.queues.into(),
    })
}

/// The store's holes are the disk's where no filter makes something else of the data, or
/// keeps it.
fn extents(chain: &Chain, store: &Arc<dyn Store>) -> Option<Extents> {
    let is_as_stored =
        chain.slots().all(|(_, slot)| slot.changes.is_empty() && slot.answers.is_empty());
    let store = store.clone();
    is_as_stored
        .then(|| Extents::new(move |offset, length, max| store.extents(offset, length, max)))
}

/// The exports of all servers, checked.
pub(super) fn exports(
    servers: &[StartingServer],
    disks: &[StartingDisk],
) -> Result<Vec<Vec<ExportConfig>>, StartError> {
    let of_server = |server: &StartingServer| {
        let mut exports: Vec<ExportConfig> = Vec::new();
        for &index in &server.disks {
            let disk = &disks[index];
            let Some(nbd) = &disk.config.nbd else { continue };
            let made = export(disk, nbd)?;
            if exports.iter().any(|other| other.info.name() == made.info.name()) {
                let (disk, export) = (disk.name.to_string(), nbd.export.clone());
                return Err(StartError::NbdTwice { disk, export });
            }
            exports.push(made);
        }
        Ok(exports)
    };
    servers.iter().map(of_server).collect()
}

/// Gives their queues to the queue threads, and serves.
pub(super) fn serve(
    servers: Vec<StartingServer>,
    exports: Vec<Vec<ExportConfig>>,
    disks: &mut [ServedDisk],
    log: &LogSink,
) -> Result<Vec<Server>, StartError> {
    let mut running = Vec::new();
    for (server, exports) in servers.into_iter().zip(exports) {
        let StartingServer { connections, listener, tls, disks: indices, .. } = server;
        let name = disks[indices[0]].name.clone();
        let failed = |source| system(&name, "start its NBD server", source);
        let names: Vec<String> = exports.iter().map(|export| export.info.name().into()).collect();
        let (builder, queues) = ServerBuilder::new(exports).map_err(failed)?;
        let is_tls = tls.is_some();
        let is_public = matches!(listener.address(), NbdPlace::Tcp(at) if !at.ip().is_loopback());
        if is_public && !is_tls {
            let text = "NBD without TLS: whoever reaches the address can read the disk, and write \
                        it unless it is read-only; give it nbd-tls-cert, nbd-tls-key and nbd-tls-ca";
            log(LogLevel::Warn, &format!("disk {name}: {text}"));
        }
        let limits = Limits { connections, ..Limits::default() };
        let server = builder.start(listener, tls, limits, messages(log)).map_err(failed)?;
        for ((index, queues), name) in indices.into_iter().zip(queues).zip(names) {
            let disk = &mut disks[index];
            disk.nbd = Some(server.address().uri(&name, is_tls).unwrap_or_default());
            // The last of its threads; those before are the other frontend's.
            let first = disk.engines.len() - queues.len();
            let engines = disk.engines[first..].iter();
            for (RunningEngine { handle, .. }, queue) in engines.zip(queues) {
                handle.send(Command::Start(Box::new(queue)));
            }
        }
        running.push(server);
    }
    Ok(running)
}

fn messages(log: &LogSink) -> Log {
    let log = log.clone();
    Log::new(move |level, text| {
        let level = match level {
            Level::Error => LogLevel::Error,
            Level::Warn => LogLevel::Warn,
            Level::Info => LogLevel::Info,
            Level::Debug => LogLevel::Debug,
        };
        log(level, &format!("NBD: {text}"));
    })
}
