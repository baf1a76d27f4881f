//! `upcall top`: what passes each hop of the disks of workers, live.
//!
//! [`source`] is where a worker's counters come from, [`rows`] turns snapshots into what is shown,
//! [`text`] and [`live`] show it.

mod live;
mod rows;
mod source;
mod text;

use std::io::IsTerminal;
use std::time::Instant;

use upcall_stats::HopSnapshot;

use self::source::Source;
use crate::cli::TopArgs;
use crate::failure::Failure;
use crate::output::print;

/// Shows counters once, or until the workers end.
pub fn run(args: TopArgs) -> Result<(), Failure> {
    let sources = source::all(&args)?;
    if args.once {
        return sources.iter().try_for_each(|source| once(source, args.json));
    }
    let watched = sources.into_iter().map(Watch::new).collect::<Result<_, String>>();
    let mut watches = Watches { watched: watched.map_err(Failure::new)?, ended: Vec::new() };
    if std::io::stdout().is_terminal() && !args.json {
        live::run(&mut watches, args.interval)?;
        return watches.ended.iter().try_for_each(|text| print(text));
    }
    while !watches.watched.is_empty() {
        std::thread::sleep(args.interval);
        for view in watches.look() {
            print(&view.show(args.json))?;
        }
        for text in watches.ended.drain(..) {
            if !args.json {
                print(&text)?;
            }
        }
    }
    Ok(())
}

fn once(source: &Source, as_json: bool) -> Result<(), Failure> {
    let worker = source.worker();
    if source.has_ended() {
        eprintln!("upcall: warning: the worker (process {worker}) has ended");
    }
    let hops = source.snapshot().map_err(Failure::new)?;
    print(&View { rows: rows::of(&hops, None), seconds: None, pid: worker }.show(as_json))
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

/// A worker, looked at again and again.
struct Watch {
    source: Source,
    last: Vec<HopSnapshot>,
    when: Instant,
}

impl Watch {
    fn new(source: Source) -> Result<Watch, String> {
        Ok(Watch { last: source.snapshot()?, source, when: Instant::now() })
    }

    /// What happened since the last look; or how the worker went.
    fn look(&mut self) -> Result<View, String> {
        let pid = self.source.worker();
        if self.source.has_ended() {
            return Err(format!("the worker (process {pid}) has ended\n"));
        }
        let now = self.source.snapshot();
        let now = now.map_err(|why| format!("the worker (process {pid}) has ended: {why}\n"))?;
        let elapsed = self.when.elapsed();
        let view = View {
            rows: rows::of(&now, Some((&self.last, elapsed))),
            seconds: Some(elapsed.as_secs_f64()),
            pid,
        };
        (self.last, self.when) = (now, Instant::now());
        Ok(view)
    }
}

/// The workers that are still there, and what to say of those that are not.
struct Watches {
    watched: Vec<Watch>,
    ended: Vec<String>,
}

impl Watches {
    /// What happened at each since the last look. One that has ended is watched no longer.
    fn look(&mut self) -> Vec<View> {
        let mut views = Vec::new();
        self.watched.retain_mut(|watch| match watch.look() {
            Ok(view) => {
                views.push(view);
                true
            }
            Err(text) => {
                self.ended.push(text);
                false
            }
        });
        views
    }
}
