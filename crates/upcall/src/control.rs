//! Commands that ask a worker over its control socket: `show`, `events`, `metrics`, `chain`.

use std::fmt::Write as _;
use std::io::Read;
use std::path::{Path, PathBuf};

use upcall_control::resource::{
    Change, Changed, Disk, DiskChange, DiskState, Edit, Event, InFlight, Param,
};
use upcall_control::{Client, ClientError};

use crate::cli::{ChainCommand, ChangeArgs, EventsArgs, MetricsArgs, ShowArgs};
use crate::failure::Failure;
use crate::output::{print, size_text};
use crate::running;

/// `upcall show`.
pub fn show(args: ShowArgs) -> Result<(), Failure> {
    let client = connect(args.control.as_deref())?;
    let mut disks = client.disks().map_err(failure)?;
    if let Some(name) = &args.disk {
        let known: Vec<String> = disks.iter().map(|disk| disk.name.clone()).collect();
        disks.retain(|disk| disk.name == *name);
        if disks.is_empty() {
            return Err(Failure::new(format_args!(
                "there is no disk {name:?}; the disks are: {}",
                known.join(", ")
            )));
        }
    }
    let mut all = Vec::new();
    for disk in disks {
        let flights = match args.in_flight {
            true => Some(client.in_flight(&disk.name).map_err(failure)?),
            false => None,
        };
        all.push((disk, flights));
    }
    if !args.json {
        return print(
            &all.iter().map(|(disk, flights)| text(disk, flights.as_deref())).collect::<String>(),
        );
    }
    for (disk, flights) in all {
        let mut value = serde_json::to_value(&disk).map_err(Failure::new)?;
        if let Some(flights) = flights {
            value["in_flight_now"] = serde_json::to_value(flights).map_err(Failure::new)?;
        }
        print(&format!("{value}\n"))?;
    }
    Ok(())
}

/// A disk for people.
fn text(disk: &Disk, flights: Option<&[InFlight]>) -> String {
    let how = match disk.state {
        DiskState::Here => format!("generation {}", disk.generation),
        DiskState::Leaving => format!("generation {}, its guest is leaving", disk.generation),
        DiskState::Waiting => "waiting: its guest is not here".to_owned(),
    };
    let size = size_text(disk.capacity_bytes);
    let mut text = format!("disk {}: {}, {size}, {how}\n", disk.name, disk.store);
    // Writing to a String does not fail.
    for slot in &disk.chain {
        let _ = writeln!(
            text,
            "  {:<16} {} {} ({}, order {}), on-failure {}, deadline {} ms, {}",
            slot.name,
            slot.filter,
            slot.version,
            slot.class,
            slot.order,
            slot.on_failure,
            slot.deadline_ms,
            slot.file.display()
        );
        for param in &slot.params {
            let _ = writeln!(text, "      {}={}", param.name, param.value);
        }
    }
    for flight in flights.unwrap_or_default() {
        let place = match (flight.place.as_str(), &flight.slot) {
            ("filter", Some(slot)) => format!("with {slot}"),
            ("held", Some(slot)) => format!("held by {slot}"),
            ("awaits-filter", Some(slot)) => format!("waits for {slot}, which is gone"),
            ("awaits-room", _) => "waits for room for its data".to_owned(),
            _ => "with the store".to_owned(),
        };
        let _ = writeln!(
            text,
            "  queue {}: {} of {} bytes at {}{}: {place} for {} us, {} us old",
            flight.queue,
            flight.op,
            flight.length_bytes,
            flight.offset_bytes,
            if flight.is_issued { ", issued by a filter" } else { "" },
            flight.there_us,
            flight.age_us
        );
    }
    if flights.is_some_and(<[InFlight]>::is_empty) {
        text += "  nothing is in flight\n";
    }
    text
}

/// `upcall events`.
pub fn events(args: EventsArgs) -> Result<(), Failure> {
    let client = connect(args.control.as_deref())?;
    for event in client.events(args.follow).map_err(failure)? {
        if args.json {
            print(&format!("{}\n", serde_json::to_string(&event).map_err(Failure::new)?))?;
        } else {
            let Event { at_ms, level, text, .. } = event;
            let (seconds, ms) = (at_ms / 1000, at_ms % 1000);
            let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
            let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            print(&format!("{hour:02}:{minute:02}:{second:02}.{ms:03}Z {level}: {text}\n"))?;
        }
    }
    Ok(())
}

/// `upcall metrics`.
pub fn metrics(args: MetricsArgs) -> Result<(), Failure> {
    print(&connect(args.control.as_deref())?.metrics().map_err(failure)?)
}

/// `upcall chain ...`.
pub fn chain(command: ChainCommand) -> Result<(), Failure> {
    let whole = |file: PathBuf| {
        std::path::absolute(&file)
            .map_err(|error| Failure::new(format_args!("{}: {error}", file.display())))
    };
    let params = |pairs: Vec<(String, String)>| -> Vec<Param> {
        pairs.into_iter().map(|(name, value)| Param { name, value }).collect()
    };
    let (disk, edits, args) = match command {
        ChainCommand::Attach(args) => {
            let edit = Edit::Attach {
                file: whole(args.file)?,
                name: args.name,
                order: args.order,
                inline: args.inline,
                deadline_ms: args.deadline_ms,
                on_failure: args.on_failure,
                memory_bytes: args.memory.map(|size| size.0),
                params: params(args.param),
            };
            (args.disk, vec![edit], args.change)
        }
        ChainCommand::Detach(args) => {
            let edits = args.slots.into_iter().map(|slot| Edit::Detach { slot }).collect();
            (args.disk, edits, args.change)
        }
        ChainCommand::Replace(args) => {
            let file = args.file.map(whole).transpose()?;
            let edit = Edit::Replace { slot: args.slot, file, params: params(args.param) };
            (args.disk, vec![edit], args.change)
        }
        ChainCommand::Set(args) => {
            let edit = Edit::Set {
                slot: args.slot,
                order: args.order,
                deadline_ms: args.deadline_ms,
                on_failure: args.on_failure,
            };
            (args.disk, vec![edit], args.change)
        }
        ChainCommand::Apply(args) => {
            let text = read(&args.file)?;
            let change: Change = serde_json::from_str(&text)
                .map_err(|error| Failure::new(format_args!("{}: {error}", args.file.display())))?;
            return ask(bounded(change, &args.change), &args.change);
        }
    };
    let change = Change {
        disks: vec![DiskChange { disk, edits }],
        dry_run: false,
        drain_ms: None,
        trial_ms: None,
        trial_requests: None,
    };
    ask(bounded(change, &args), &args)
}

fn read(file: &Path) -> Result<String, Failure> {
    let failed = |error| Failure::new(format_args!("{}: {error}", file.display()));
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(failed)?;
        return Ok(text);
    }
    std::fs::read_to_string(file).map_err(failed)
}

/// A change with what the flags say.
fn bounded(change: Change, args: &ChangeArgs) -> Change {
    Change {
        dry_run: change.dry_run || args.dry_run,
        drain_ms: args.drain_ms.or(change.drain_ms),
        trial_ms: args.trial_ms.or(change.trial_ms),
        trial_requests: args.trial_requests.or(change.trial_requests),
        ..change
    }
}

fn ask(change: Change, args: &ChangeArgs) -> Result<(), Failure> {
    let client = connect(args.control.as_deref())?;
    let changed = match client.change(&change) {
        Err(ClientError::Problem(problem)) if args.json => {
            print(&format!("{}\n", serde_json::to_string(&problem).map_err(Failure::new)?))?;
            return Err(Failure::AlreadySaid(1));
        }
        answer => answer.map_err(failure)?,
    };
    if args.json {
        return print(&format!("{}\n", serde_json::to_string(&changed).map_err(Failure::new)?));
    }
    print(&changed_text(&changed))
}

fn changed_text(changed: &Changed) -> String {
    let chain = |slots: &[String]| {
        let ends = [&["guest".to_owned()][..], slots, &["store".to_owned()]].concat();
        ends.join(" -> ")
    };
    let mut text = String::new();
    for disk in &changed.disks {
        let _ = writeln!(text, "disk {}, generation {}", disk.disk, disk.generation);
        let _ = writeln!(text, "  before: {}", chain(&disk.before));
        let _ = writeln!(text, "  after:  {}", chain(&disk.after));
    }
    match changed.dry_run {
        true => text += "nothing was changed\n",
        false => {
            let _ = writeln!(text, "the guest waited for {} us", changed.pause_us);
        }
    }
    text
}

fn failure(error: ClientError) -> Failure {
    Failure::new(error)
}

fn connect(path: Option<&Path>) -> Result<Client, Failure> {
    let path = match path {
        Some(path) => path.to_owned(),
        None => only_socket()?,
    };
    Client::new(&path).map_err(failure)
}

/// The control socket of the only worker that runs, among the usual places.
fn only_socket() -> Result<PathBuf, Failure> {
    let folders = running::folders();
    let found = running::sockets(&folders);
    let (mut open, closed): (Vec<_>, Vec<_>) = found.into_iter().partition(|it| it.1.is_ok());
    match open.len() {
        1 => Ok(open.remove(0).0),
        0 => Err(Failure::new(format_args!(
            "no worker answers at a control socket (*.control) in {}; give the path that upcall \
             serve printed under \"Control\", with --control{}",
            running::list(&folders),
            closed.iter().fold(String::new(), |text, (path, why)| match why {
                Err(why) => format!("{text}; {}: {why}", path.display()),
                Ok(()) => text,
            })
        ))),
        _ => Err(Failure::new(format_args!(
            "several workers run; give one of {} with --control",
            running::list(open.iter().map(|it| &it.0))
        ))),
    }
}
