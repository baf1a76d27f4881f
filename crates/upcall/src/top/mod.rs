//! `upcall top`: what passes each hop of a worker's disks, live.
//!
//! [`find`] finds the page of counters, [`rows`] turns snapshots into what is shown,
//! [`text`] and [`live`] show it.

mod find;
mod live;
mod rows;
mod text;

use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

use upcall_stats::{HopSnapshot, PageReader};

use crate::cli::TopArgs;
use crate::failure::Failure;
use crate::output::print;

pub use find::is_alive;

/// Shows counters once, or until the worker ends.
pub fn run(args: TopArgs) -> Result<(), Failure> {
    let path = match args.stats {
        Some(path) => path,
        None => find::only_live_page()?,
    };
    let page = open(&path)?;
    if args.once {
        if !is_alive(page.pid()) {
            eprintln!("upcall: warning: the worker (process {}) has ended", page.pid());
        }
        let view = View { rows: rows::of(&page.snapshot(), None), seconds: None, pid: page.pid() };
        return print(&view.show(args.json));
    }
    let mut watch = Watch::new(page);
    if std::io::stdout().is_terminal() && !args.json {
        live::run(&mut watch, args.interval)?;
    } else {
        while let Some(view) = watch.next_after(args.interval) {
            print(&view.show(args.json))?;
        }
    }
    if !is_alive(watch.page.pid()) && !args.json {
        print(&format!("the worker (process {}) has ended\n", watch.page.pid()))?;
    }
    Ok(())
}

fn open(path: &Path) -> Result<PageReader, Failure> {
    PageReader::open(path).map_err(|error| {
        Failure::new(format_args!(
            "{}: {error}; upcall serve says where its page is, under \"Live counters\"",
            path.display()
        ))
    })
}

/// What is to be shown at one moment.
struct View {
    rows: Vec<rows::Row>,
    /// What the rows cover; None: since the worker's start.
    seconds: Option<f64>,
    pid: u32,
}

impl View {
    fn show(&self, as_json: bool) -> String {
        if as_json { format!("{}\n", rows::json(self)) } else { text::table(self) }
    }
}

/// A page, looked at again and again.
struct Watch {
    page: PageReader,
    last: Vec<HopSnapshot>,
    when: Instant,
}

impl Watch {
    fn new(page: PageReader) -> Watch {
        let last = page.snapshot();
        Watch { page, last, when: Instant::now() }
    }

    /// What happened since the last look.
    fn look(&mut self) -> View {
        let now = self.page.snapshot();
        let elapsed = self.when.elapsed();
        let view = View {
            rows: rows::of(&now, Some((&self.last, elapsed))),
            seconds: Some(elapsed.as_secs_f64()),
            pid: self.page.pid(),
        };
        (self.last, self.when) = (now, Instant::now());
        view
    }

    /// Waits and looks; None once the worker has ended.
    fn next_after(&mut self, interval: Duration) -> Option<View> {
        std::thread::sleep(interval);
        is_alive(self.page.pid()).then(|| self.look())
    }
}
