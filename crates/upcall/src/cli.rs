//! The one definition of the command line: parser, help, manual pages and completions all
//! come from here. Parsing checks form and never acts.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use upcall_worker::{ImageFormat, Layer};

use crate::serve::{DiskSpec, FilterOnDisk, Mode, Size};

/// Data services in the IO path of a virtual machine's disks
#[derive(Debug, Parser)]
#[command(name = "upcall", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Serve(ServeArgs),
    Top(TopArgs),
    Bench(BenchArgs),
    Show(ShowArgs),
    Events(EventsArgs),
    Metrics(MetricsArgs),
    /// Change the chain of a disk while it is used
    #[command(subcommand)]
    Chain(ChainCommand),
    Sidecar(SidecarArgs),
    Gaps(GapsArgs),
    /// Look at filters, check them, begin one of your own
    #[command(subcommand)]
    Filter(FilterCommand),
    /// Make, look at, convert and check images, with qemu-img
    #[command(subcommand)]
    Image(ImageCommand),
    /// Print the completions for a shell
    Completions {
        shell: clap_complete::Shell,
    },
    /// Write these commands' manual pages into a folder
    Man {
        folder: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub enum ChainCommand {
    Attach(AttachArgs),
    Detach(DetachArgs),
    Replace(ReplaceArgs),
    Set(SetArgs),
    Apply(ApplyArgs),
}

#[derive(Debug, Subcommand)]
pub enum FilterCommand {
    Info(InfoArgs),
    New(NewArgs),
    Check(CheckArgs),
}

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    Create(ImageCreateArgs),
    Info(ImageInfoArgs),
    Convert(ImageConvertArgs),
    Check(ImageCheckArgs),
}

/// Make an empty image
#[derive(Debug, Args)]
pub struct ImageCreateArgs {
    /// Its format: raw, qcow2, vmdk, vhdx, vdi or vpc
    #[arg(long, value_parser = crate::image::format)]
    pub format: ImageFormat,

    /// An image below it, which gives what is not written here: FORMAT:PATH
    #[arg(long, value_name = "FORMAT:PATH", value_parser = crate::serve::value::<Layer>)]
    pub backing: Option<Layer>,

    /// An option of the format, as for qemu-img's -o; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub option: Vec<String>,

    /// The image; must not be there yet
    pub file: PathBuf,

    /// Its size, in bytes or with K, M, G or T behind [default: that of the image below]
    #[arg(value_parser = crate::serve::value::<Size>)]
    pub size: Option<Size>,
}

/// Show what an image is
///
/// Only for images that you trust: what an image names may be looked at.
#[derive(Debug, Args)]
pub struct ImageInfoArgs {
    /// Its format; never probed
    #[arg(long, value_parser = crate::image::format)]
    pub format: ImageFormat,

    /// Print JSON
    #[arg(long)]
    pub json: bool,

    /// The image
    pub file: PathBuf,
}

/// Copy an image into another format
///
/// Only for images that you trust: what an image names becomes part of the copy.
#[derive(Debug, Args)]
pub struct ImageConvertArgs {
    /// The format it has; never probed
    #[arg(long, value_name = "FORMAT", value_parser = crate::image::format)]
    pub from: ImageFormat,

    /// The format of the copy
    #[arg(long, value_name = "FORMAT", value_parser = crate::image::format)]
    pub to: ImageFormat,

    /// An option of the copy's format, as for qemu-img's -o; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub option: Vec<String>,

    /// The image
    pub file: PathBuf,

    /// The copy; must not be there yet
    pub to_file: PathBuf,
}

/// Check that an image is sound; not while it is in use
///
/// Exit code 0 if it is. What is wrong is said by qemu-img, and what to do by us.
#[derive(Debug, Args)]
pub struct ImageCheckArgs {
    /// Its format; never probed
    #[arg(long, value_parser = crate::image::format)]
    pub format: ImageFormat,

    /// Mend what can be mended
    #[arg(long)]
    pub repair: bool,

    /// The image
    pub file: PathBuf,
}

/// Serve the disks of one virtual machine, in the foreground
///
/// Each disk is a vhost-user-blk device on a socket of its own; its requests pass the filters
/// given for it. Prints what each disk offers, its chain, and the arguments for QEMU and
/// libvirt, then a line `ready`. SIGTERM and Ctrl-C end it in order: frontends, requests in
/// flight, filters, a last flush. A second signal ends it at once.
/// SIGHUP: a raw file or device that has become larger is looked at again; its disk grows, if it
/// has no filters, and its guest sees it.
#[derive(Debug, Args)]
#[command(after_long_help = SERVE_EXAMPLES)]
pub struct ServeArgs {
    /// A disk: name=NAME, its data, and any of the words below
    ///
    /// Commas in values are doubled. Words:
    ///
    /// name=NAME: in messages and for --filter; letters, digits, -, _ and .
    /// file=PATH: an image file or block device.
    /// memory=SIZE: memory, lost at the end. null=SIZE: reads zeroes, forgets writes.
    /// remote=unix:PATH|HOST:PORT: a disk that an NBD server has, through a confined
    /// qemu-storage-daemon; remote-export=NAME: which of its exports (default: its default).
    /// One of these four it must have.
    /// format=raw|qcow2|vmdk|vhdx|vdi|vpc: what the image is (default: raw); never probed.
    /// What is not raw is read by a confined qemu-storage-daemon, which opens nothing but
    /// the files named here, whatever the image names.
    /// backing=FORMAT:PATH: the image below (qcow2, vmdk); may be repeated, nearest first.
    /// data-file=PATH: where a qcow2 image's data is, if not in itself.
    /// extents=FOLDER: where the files are that a vmdk image consists of.
    /// secret=PATH: the passphrase of an encrypted qcow2 image, exactly this file's bytes;
    /// /dev/fd/N for an inherited descriptor.
    /// socket=PATH: where QEMU connects (default: ./NAME.sock).
    /// fd=N: an inherited listening socket instead. Sockets that systemd hands over are
    /// taken by their FileDescriptorName=, which is the disk's name, or in order.
    /// mode=0660: permissions of the socket.
    /// queues=4: queues, each with a thread; 1 to 64.
    /// queue-size=256: largest ring; a power of two, 2 to 1024.
    /// direct=on|off: O_DIRECT, past the host's page cache (default: on).
    /// readonly=on|off: refuse writes (default: off).
    /// engine=auto|io_uring|threads: how a file is read and written (default: auto).
    /// serial=TEXT: the disk's serial number, at most 20 bytes (default: its name).
    /// write-cache=on|off: off makes each write durable before it completes (default: on).
    /// state=DIR: where its filters keep their state (default: PATH.upcall beside a file; in
    /// memory for memory and null; remote: nowhere).
    ///
    /// nbd=unix:PATH|HOST:PORT|fd:N|systemd:NAME: serve it to NBD clients there. Without socket=
    /// and fd=, only to them. Disks with the same address are exports of one server.
    /// systemd:NAME is a socket that systemd hands over by this FileDescriptorName=.
    /// nbd-export=NAME: the export's name (default: the disk's name).
    /// nbd-readonly=on|off: NBD clients cannot write (default: off). Needed beside socket= or
    /// fd=, unless readonly=on.
    /// nbd-connections=256: most NBD connections at a time; each may take 9 MiB of memory.
    /// nbd-tls-cert=FILE, nbd-tls-key=FILE: TLS for NBD: the certificate and its key, in PEM.
    /// nbd-tls-ca=FILE: clients need a certificate that one of these has signed.
    /// nbd-tls=required|optional: whether clients without TLS are refused (default: required).
    ///
    /// A disk without socket=, fd= and nbd= that a filter is granted is there for that filter alone.
    #[arg(long, value_name = "WORDS", required_unless_present = "config",
          value_parser = DiskSpec::from_words, verbatim_doc_comment)]
    pub disk: Vec<DiskSpec>,

    /// A filter on a disk: disk=NAME, file=PATH, and any of the words below
    ///
    /// disk=NAME: which disk. file=PATH: the filter's shared object.
    /// name=NAME: what it is called on this disk, in commands and for its state (default: its
    /// own name, and a number: xor-0).
    /// order=0: its place among filters of its class; smaller is nearer to the guest.
    /// placement=isolated|inline: in a process of its own (default), or, for a filter that is
    /// trusted as this program is, in the worker.
    /// deadline-ms=N: how long it may have a request before it counts as hung, is killed and
    /// started again; 0: no limit (default: 30000 for qos and replication, else 5000).
    /// on-failure=hold|bypass|fail|detach: what becomes of requests while it is gone: they
    /// wait; they go past it, and what it misses is recorded beside the disk; they fail; or it
    /// leaves the chain for good. A filter that changes data or answers requests holds (the
    /// default for it) or fails; the default for those that only look, limit or copy is bypass.
    /// memory=256M: how much private memory its process may have; a filter that wants more is
    /// told that there is none. Disks with the same filter share it, and the most counts.
    /// grant=DISK: a disk that it may issue requests to; may be repeated.
    /// param.NAME=VALUE: a parameter; `upcall filter info` lists them.
    #[arg(long, value_name = "WORDS", value_parser = FilterOnDisk::from_words,
          verbatim_doc_comment)]
    pub filter: Vec<FilterOnDisk>,

    /// Disks and filters from a TOML file: the same words, as `[[disk]]` and `[[disk.filter]]`
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Where the page of live counters goes, for `upcall top` [default: beside the first socket]
    #[arg(long, value_name = "PATH")]
    pub stats: Option<PathBuf>,

    /// Where the control socket goes, for `upcall show`, `events`, `metrics` and `chain` [default:
    /// beside the page of counters]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Permissions of the control socket. Who may connect may look; only root and the user that
    /// serves may change something
    #[arg(long, value_name = "MODE", default_value = "0600", value_parser = crate::serve::value::<Mode>)]
    pub control_mode: Mode,

    /// How long requests that a filter holds may take to end when a disk stops, before they
    /// are cancelled
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 2000)]
    pub drain_ms: u64,

    /// Start the worker anew whenever it dies
    ///
    /// The disks are then served by a process of its own, the worker, which this one watches. When
    /// it dies (a crash, kill -9, out of memory), it is started again with the same sockets and the
    /// same configuration, and QEMU reconnects to it. A worker that does not start the first time,
    /// or that ends by itself in order, ends this program with its exit code. When this program
    /// dies, the worker ends in order.
    #[arg(long)]
    pub restart: bool,

    /// The guest may move to another host, or come from one, that serves the same images
    ///
    /// The images, with their locks and their filters, are held only while the guest is here: they
    /// are given up when it has moved away, or nobody is connected any more, and taken up when a
    /// guest starts. If another process uses them now, this one waits until then. Filters are told,
    /// and what they save goes with the guest, in the folder for their state (state=). Both hosts
    /// are given the same disks and filters; for images, raw or of another format, and devices
    /// that both can reach. Chains can be changed where the guest is, and not while it is being migrated; the other host
    /// has to be given the new filters, too.
    #[arg(long)]
    pub movable: bool,

    /// With --restart: the longest pause before a worker that dies again and again is started
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 10_000)]
    pub restart_pause_ms: u64,

    /// This is the worker of a --restart, which is on its standard input.
    #[arg(long, hide = true)]
    pub supervised: bool,

    /// The least important messages to show
    #[arg(long, value_enum, default_value_t = Level::Info)]
    pub log_level: Level,

    /// Messages as lines for people, or as JSON, one object a line: when, by which process, how
    /// much it matters, the text, and fields, such as who asked for a chain change
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

const SERVE_EXAMPLES: &str = "\
Examples:
  upcall serve --disk name=root,file=disk.img
  upcall serve --disk name=root,file=disk.img,socket=/run/vm1/root.sock,queues=2 \\
      --filter disk=root,file=/usr/lib/upcall/libupcall_throttle.so,param.iops=500
  upcall serve --disk name=root,file=vm1.qcow2,format=qcow2,backing=qcow2:base.qcow2
  upcall serve --config vm1.toml

vm1.toml:
  [[disk]]
  name = \"root\"
  file = \"disk.img\"

  [[disk.filter]]
  file = \"/usr/lib/upcall/libupcall_throttle.so\"
  params = { iops = 500 }";

/// Show what passes each hop of the disks of a worker
///
/// For each disk and hop (the whole request, each filter, the store): requests and bytes,
/// errors, requests in flight, latencies, the share of the requests' time, rules broken, and
/// the filter's own counters. On a terminal a live view: q quits. Ends when the workers end.
///
/// The numbers are those of a worker's page of counters, a file that costs the worker nothing to be
/// watched. Where that file is out of reach (another mount namespace, another machine whose
/// socket is forwarded), the worker's control socket gives the same.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Workers' pages of counters [default: all workers that run and are found, by their pages or
    /// else by their control sockets]
    pub stats: Vec<PathBuf>,

    /// A worker's control socket, which is asked for the counters (repeatable)
    #[arg(long, value_name = "PATH")]
    pub control: Vec<PathBuf>,

    /// Print the sums since the worker's start, and end
    #[arg(long)]
    pub once: bool,

    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub interval: Duration,

    /// Print JSON, one object a line and worker
    #[arg(long)]
    pub json: bool,
}

/// Show the disks of a worker and their chains
///
/// For each disk: its store, its generation (which counts chain changes), and its filters from the
/// guest to the store, with the names by which `upcall chain` knows them.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Only this disk
    pub disk: Option<String>,

    /// Also what is in flight now: where each request waits, and since when
    #[arg(long)]
    pub in_flight: bool,

    /// Print JSON, one object a line: also counters and latencies
    #[arg(long)]
    pub json: bool,

    /// The worker's control socket [default: that of the only worker that runs]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

/// Show what happened in a worker lately
///
/// Filters that failed and came back, chain changes and who asked for them, guests that came and
/// went: what the worker says in its log.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on with what happens from now on, until the worker ends
    #[arg(long)]
    pub follow: bool,

    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,

    /// The worker's control socket [default: that of the only worker that runs]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

/// Print a worker's metrics for Prometheus
#[derive(Debug, Args)]
pub struct MetricsArgs {
    /// The worker's control socket [default: that of the only worker that runs]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

/// Put another filter into the chain of a disk
///
/// Its class and its order decide its place. If it does not open, or fails while it is on trial,
/// the chain is as it was, and the guest has noticed nothing.
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// The disk
    pub disk: String,

    /// The filter's shared object
    pub file: PathBuf,

    /// What it is called on this disk [default: its own name, and a number]
    #[arg(long)]
    pub name: Option<String>,

    /// Its place among filters of its class; smaller is nearer to the guest
    #[arg(long, allow_negative_numbers = true)]
    pub order: Option<i32>,

    /// In the worker instead of a process of its own: for a filter that is trusted as the worker is
    #[arg(long)]
    pub inline: bool,

    /// How long it may have a request; 0: no limit
    #[arg(long, value_name = "MILLISECONDS")]
    pub deadline_ms: Option<u64>,

    /// What becomes of requests while it is gone: hold, bypass, fail or detach
    #[arg(long, value_name = "POLICY")]
    pub on_failure: Option<String>,

    /// How much private memory its process may have
    #[arg(long, value_name = "SIZE", value_parser = crate::serve::value::<Size>)]
    pub memory: Option<Size>,

    /// A parameter; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = crate::words::pair)]
    pub param: Vec<(String, String)>,

    #[command(flatten)]
    pub change: ChangeArgs,
}

/// Take filters out of the chain of a disk
#[derive(Debug, Args)]
pub struct DetachArgs {
    /// The disk
    pub disk: String,

    /// Their slots, as `upcall show` names them; or a filter's name, if the disk has it once
    #[arg(required = true)]
    pub slots: Vec<String>,

    #[command(flatten)]
    pub change: ChangeArgs,
}

/// Put another version of a filter, or the same with other parameters, in its place
///
/// If both can, the one before hands its state to the next one. Also for a filter that is dead or
/// quarantined: requests that wait for it go on with the next one.
#[derive(Debug, Args)]
pub struct ReplaceArgs {
    /// The disk
    pub disk: String,

    /// The filter's slot, as `upcall show` names it; or its name, if the disk has it once
    pub slot: String,

    /// Another shared object [default: the same, as it was opened]
    #[arg(long)]
    pub file: Option<PathBuf>,

    /// A parameter that changes; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = crate::words::pair)]
    pub param: Vec<(String, String)>,

    #[command(flatten)]
    pub change: ChangeArgs,
}

/// Change a filter's place in its class, its deadline or its failure policy
#[derive(Debug, Args)]
pub struct SetArgs {
    /// The disk
    pub disk: String,

    /// The filter's slot, as `upcall show` names it; or its name, if the disk has it once
    pub slot: String,

    /// Its place among filters of its class; smaller is nearer to the guest
    #[arg(long, allow_negative_numbers = true)]
    pub order: Option<i32>,

    /// How long it may have a request; 0: no limit
    #[arg(long, value_name = "MILLISECONDS")]
    pub deadline_ms: Option<u64>,

    /// What becomes of requests while it is gone: hold, bypass, fail or detach
    #[arg(long, value_name = "POLICY")]
    pub on_failure: Option<String>,

    #[command(flatten)]
    pub change: ChangeArgs,
}

/// Carry out a change that a JSON file describes, of one disk or of several at once
///
/// All disks that it names change, or none. It is the body of POST /v1/changes, as
/// docs/control.openapi.json has it:
/// {"disks": [{"disk": "root", "edits": [{"edit": "detach", "slot": "trace-0"}]}]}
#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// The file; - for standard input
    pub file: PathBuf,

    #[command(flatten)]
    pub change: ChangeArgs,
}

/// What all chain changes have in common.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    /// Check everything that can be checked, say what would be, and change nothing
    #[arg(long)]
    pub dry_run: bool,

    /// How long what is in flight may take to end before the change is given up [default: 2000]
    #[arg(long, value_name = "MILLISECONDS")]
    pub drain_ms: Option<u64>,

    /// How long a new filter is on trial; 0: there is none [default: 1000]
    #[arg(long, value_name = "MILLISECONDS")]
    pub trial_ms: Option<u64>,

    /// How many requests end its trial earlier [default: 1000]
    #[arg(long, value_name = "REQUESTS")]
    pub trial_requests: Option<u64>,

    /// Print JSON: what was changed, or the problem
    #[arg(long)]
    pub json: bool,

    /// The worker's control socket [default: that of the only worker that runs]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

/// Show what the filters of a disk keep for themselves
///
/// Each filter that wants one has a sidecar: a small durable state of its own that travels with
/// the disk, in a folder IMAGE.upcall beside it. Without a name, lists them; with one, writes
/// that state to standard output. Only while no worker serves the disk; changes nothing.
#[derive(Debug, Args)]
pub struct SidecarArgs {
    /// The disk's image
    pub image: PathBuf,

    /// Which state to write to standard output: a filter, or FILTER-N if it has several
    pub filter: Option<String>,

    /// The folder, for a disk that was served with state=DIR
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,

    /// Print JSON, one object a line
    #[arg(long, conflicts_with = "filter")]
    pub json: bool,
}

/// Show what the filters of a disk missed while they were bypassed
///
/// For each filter that may be bypassed: the ranges of the disk, as offset and length in bytes,
/// that were changed without it. Only while no worker serves the disk; changes nothing.
#[derive(Debug, Args)]
pub struct GapsArgs {
    /// The disk's image
    pub image: PathBuf,

    /// The folder, for a disk that was served with state=DIR
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,

    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
}

/// Show what a filter says about itself: operations, data access, parameters
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// The filter's shared object
    pub file: PathBuf,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Begin a filter: a project that builds and passes its check at once
#[derive(Debug, Args)]
pub struct NewArgs {
    /// The filter's name: a-z, 0-9 and -, at most 31 characters
    #[arg(value_parser = crate::new::check_name)]
    pub name: String,

    /// The language to write it in
    #[arg(long, value_enum)]
    pub lang: Language,

    /// The folder to make [default: ./NAME]
    #[arg(long, value_name = "PATH")]
    pub dir: Option<PathBuf>,

    /// For Rust: use the crate upcall-sdk at this path, instead of a copy in the project
    #[arg(long, value_name = "PATH")]
    pub sdk: Option<PathBuf>,
}

/// Languages of filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Language {
    C,
    Rust,
}

/// Check that a filter keeps the rules of the chain
///
/// Loads the filter into a filter host, as `upcall serve` does, puts it on a disk in memory and
/// drives it with random requests from several queues at once. Each line says what was checked;
/// what failed comes with the command that replays it. Exit code 1 if anything failed.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The filter's shared object
    pub file: PathBuf,

    /// A parameter of the filter; may be repeated
    #[arg(long = "param", value_name = "NAME=VALUE", value_parser = crate::words::pair)]
    pub params: Vec<crate::words::Word>,

    /// Where the random requests begin; the same seed gives the same requests
    /// [default: another each time]
    #[arg(long)]
    pub seed: Option<u64>,

    /// How many requests to run under load
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pub operations: u64,

    /// Run requests under load for this long instead
    #[arg(long, value_name = "SECONDS", conflicts_with = "operations", value_parser = seconds)]
    pub seconds: Option<Duration>,

    /// Where the filter runs: isolated or inline
    #[arg(long, value_enum, default_value_t = PlacementName::Isolated)]
    pub placement: PlacementName,

    /// How many further disks, in memory, to grant the filter
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub grants: u16,

    /// How long a request may take before it counts as never answered
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 10_000)]
    pub timeout_ms: u64,
}

/// Measure what filters cost on this machine
///
/// Sends reads and writes of 4 KiB through the filters to a disk that does nothing, one and 32 in
/// flight, in turn with the same without filters: latencies, requests a second, and the
/// processor time of worker and filter hosts for a request. Needs no guest and no image. Wants a
/// machine that does nothing else: only differences within one run mean something.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// The filters' shared objects, in the order of the chain
    #[arg(required = true, value_name = "FILTER")]
    pub filters: Vec<PathBuf>,

    /// A parameter, of each of them; may be repeated
    #[arg(long = "param", value_name = "NAME=VALUE", value_parser = crate::words::pair)]
    pub params: Vec<crate::words::Word>,

    /// Where the filters run: isolated or inline
    #[arg(long, value_enum, default_value_t = PlacementName::Isolated)]
    pub placement: PlacementName,

    /// How long to measure
    #[arg(long, value_name = "SECONDS", default_value = "6", value_parser = seconds)]
    pub seconds: Duration,

    /// Print JSON: every round's figures
    #[arg(long)]
    pub json: bool,
}

/// Where a filter's code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlacementName {
    Isolated,
    Inline,
}

impl From<PlacementName> for upcall_worker::Placement {
    fn from(name: PlacementName) -> Self {
        match name {
            PlacementName::Isolated => upcall_worker::Placement::Isolated,
            PlacementName::Inline => upcall_worker::Placement::Inline,
        }
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.05..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("give seconds, from 0.05 to 86400".into()),
    }
}

/// How messages are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Levels of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
