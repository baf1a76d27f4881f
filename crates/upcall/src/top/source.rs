//! Where a worker's counters come from: its page, or its control socket.

use std::path::Path;

use upcall_control::{Client, ClientError};
use upcall_stats::{HopSnapshot, PageReader};

use crate::cli::TopArgs;
use crate::failure::Failure;
use crate::running::{self, is_alive};
use crate::serve::control_beside;

/// A worker that can be looked at.
pub enum Source {
    Page(PageReader),
    Socket { client: Client, worker: u32 },
}

/// The workers that were asked for, or else all that run and are found.
pub fn all(args: &TopArgs) -> Result<Vec<Source>, Failure> {
    if args.stats.is_empty() && args.control.is_empty() {
        return found();
    }
    let pages = args.stats.iter().map(|path| Source::page(path));
    let sockets = args.control.iter().map(|path| Source::socket(path).map_err(Failure::new));
    pages.chain(sockets).collect()
}

/// By the page if there is one; a worker whose page is elsewhere has a socket.
fn found() -> Result<Vec<Source>, Failure> {
    let folders = running::folders();
    let pages = running::pages(&folders);
    let beside: Vec<_> =
        pages.values().filter_map(|(path, _)| control_beside(path).canonicalize().ok()).collect();
    let mut closed = Vec::new();
    let mut sources = Vec::new();
    for (path, _) in running::sockets(&folders) {
        match Source::socket(&path) {
            Ok(source) if pages.contains_key(&source.worker()) => {}
            Ok(source) => sources.push(source),
            // Its worker is most likely the one whose page is beside it.
            Err(_) if beside.contains(&path) => {}
            Err(error) => closed.push(error.to_string()),
        }
    }
    sources.splice(..0, pages.into_values().map(|(_, page)| Source::Page(page)));
    if !sources.is_empty() {
        for why in closed {
            eprintln!("upcall: warning: not shown: {why}");
        }
        return Ok(sources);
    }
    closed.insert(0, format!(
        "no worker runs that has its page (*.stats) or its control socket (*.control) in {}; give the \
         path that upcall serve printed under \"Live counters\", or with --control that under \
         \"Control\"",
        running::list(&folders)
    ));
    Err(Failure::new(closed.join("; ")))
}

impl Source {
    fn page(path: &Path) -> Result<Source, Failure> {
        let page = PageReader::open(path).map_err(|error| {
            Failure::new(format_args!(
                "{}: {error}; upcall serve says where its page is, under \"Live counters\"",
                path.display()
            ))
        });
        page.map(Source::Page)
    }

    fn socket(path: &Path) -> Result<Source, ClientError> {
        let client = Client::new(path)?;
        let worker = client.worker()?.process;
        Ok(Source::Socket { client, worker })
    }

    /// Its process.
    pub fn worker(&self) -> u32 {
        match self {
            Source::Page(page) => page.pid(),
            Source::Socket { worker, .. } => *worker,
        }
    }

    /// What passed each hop so far. A page is there also when its worker has ended; what ended
    /// or does not answer is told with why.
    pub fn snapshot(&self) -> Result<Vec<HopSnapshot>, String> {
        match self {
            Source::Page(page) => Ok(page.snapshot()),
            Source::Socket { client, worker } => {
                let hops = client.hops().map_err(|error| error.to_string())?;
                // Afterwards: what another one counts is not shown as this one's.
                match client.worker() {
                    Ok(who) if who.process == *worker => Ok(hops),
                    _ => Err("another one answers at its control socket".into()),
                }
            }
        }
    }

    /// Whether it has ended; one that is asked says so by not answering.
    pub fn has_ended(&self) -> bool {
        matches!(self, Source::Page(page) if !is_alive(page.pid()))
    }
}
