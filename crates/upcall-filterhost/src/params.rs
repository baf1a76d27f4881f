//! Parameters: what the operator gave, checked against what the filter declared.
//!
//! [`resolve`] does it all; underneath are two steps. [`check`] is pure: names, types and
//! ranges, with no file touched. [`Checked::open`] then opens files and connects to
//! addresses, because a filter opens nothing by itself; files that may be created come last,
//! so that a mistake elsewhere leaves nothing behind. A wrong value never reaches a filter.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::fs::OFlags;

use crate::description::Description;
use crate::text::clean;

/// Most bytes of a value.
pub const VALUE_MAX: usize = 4096;
/// How long each address of an ADDRESS is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Types of parameters, `UPCALL_PARAM_INT` and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamType {
    /// A number.
    Int,
    /// true, false, yes, no, on, off, 1, 0.
    Bool,
    /// Text.
    String,
    /// Bytes, with an optional K, M, G or T (of 1024).
    Size,
    /// Milliseconds, or with ms, s, m or h behind.
    Millis,
    /// One of some words.
    Choice,
    /// 0 to 1.
    Fraction,
    /// A file, opened here for reading.
    FileRead,
    /// A file, opened here for appending.
    FileAppend,
    /// `unix:PATH` or `HOST:PORT`, connected here.
    Address,
}

impl ParamType {
    /// The type of a number in `filter.h`.
    pub fn from_number(number: u32) -> Option<ParamType> {
        Some(match number {
            1 => ParamType::Int,
            2 => ParamType::Bool,
            3 => ParamType::String,
            4 => ParamType::Size,
            5 => ParamType::Millis,
            6 => ParamType::Choice,
            7 => ParamType::Fraction,
            8 => ParamType::FileRead,
            9 => ParamType::FileAppend,
            10 => ParamType::Address,
            _ => return None,
        })
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            ParamType::Int => "number",
            ParamType::Bool => "yes or no",
            ParamType::String => "text",
            ParamType::Size => "size",
            ParamType::Millis => "time",
            ParamType::Choice => "choice",
            ParamType::Fraction => "fraction",
            ParamType::FileRead => "file to read",
            ParamType::FileAppend => "file to append to",
            ParamType::Address => "address",
        }
    }

    /// Whether its value is a descriptor for the filter.
    pub fn is_descriptor(self) -> bool {
        matches!(self, ParamType::FileRead | ParamType::FileAppend | ParamType::Address)
    }
}

/// One declared parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// 1 to 31 bytes of `a-z`, `0-9`, `_`.
    pub name: String,
    /// Its type.
    pub kind: ParamType,
    /// One sentence for people.
    pub doc: String,
    /// As the operator would write it. Without one it must be given, except files and
    /// addresses, which are then absent.
    pub default: Option<String>,
    /// CHOICE: the words.
    pub choices: Vec<String>,
    /// INT, SIZE, MILLIS: least value; STRING: bytes.
    pub min: i64,
    /// Likewise, most. Both 0: the author gave no range.
    pub max: i64,
}

impl Param {
    /// Whether the operator must give it.
    pub fn is_required(&self) -> bool {
        self.default.is_none() && !self.kind.is_descriptor()
    }

    /// What a value may be, for people: `1 to 9`, `one of low, high`.
    pub fn expects(&self) -> String {
        match self.kind {
            ParamType::Int => match self.range(i64::MIN, i64::MAX) {
                (i64::MIN, i64::MAX) => "a whole number".into(),
                (min, max) => format!("a whole number from {min} to {max}"),
            },
            ParamType::Bool => "true, false, yes, no, on, off, 1 or 0".into(),
            ParamType::String => {
                let (min, max) = self.range(0, VALUE_MAX as i64);
                format!("{min} to {max} bytes of text")
            }
            ParamType::Size => match self.range(0, i64::MAX) {
                (0, i64::MAX) => "bytes, or with K, M, G or T behind".into(),
                (min, max) => format!(
                    "{} to {} (bytes, or with K, M, G or T behind)",
                    show_size(min),
                    show_size(max)
                ),
            },
            ParamType::Millis => match self.range(0, i64::MAX) {
                (0, i64::MAX) => "milliseconds, or with ms, s, m or h behind".into(),
                (min, max) => {
                    format!("{min} to {max} ms (a number alone, or with ms, s, m or h behind)")
                }
            },
            ParamType::Choice => format!("one of {}", self.choices.join(", ")),
            ParamType::Fraction => "a fraction from 0 to 1, as 0.25".into(),
            ParamType::FileRead | ParamType::FileAppend => "the path of a file".into(),
            ParamType::Address => "unix:PATH or HOST:PORT".into(),
        }
    }

    /// The value in the form that the filter host takes (numbers decimal and in bytes or
    /// milliseconds, BOOL 0 or 1), or what it should have been.
    pub fn check(&self, given: &str) -> Result<String, String> {
        self.normal(given).ok_or_else(|| format!("expected {}", self.expects()))
    }

    fn normal(&self, given: &str) -> Option<String> {
        if given.len() > VALUE_MAX || given.contains('\0') {
            return None;
        }
        let text = given.trim();
        let within = |(min, max), value: i64| (min..=max).contains(&value).then_some(value);
        match self.kind {
            ParamType::Int => {
                within(self.range(i64::MIN, i64::MAX), text.parse().ok()?).map(|v| v.to_string())
            }
            ParamType::Bool => match text {
                "true" | "yes" | "on" | "1" => Some("1".into()),
                "false" | "no" | "off" | "0" => Some("0".into()),
                _ => None,
            },
            ParamType::String => {
                within(self.range(0, VALUE_MAX as i64), given.len() as i64)?;
                Some(given.into())
            }
            ParamType::Size => {
                within(self.range(0, i64::MAX), with_unit(text, SIZES)?).map(|v| v.to_string())
            }
            ParamType::Millis => {
                within(self.range(0, i64::MAX), with_unit(text, TIMES)?).map(|v| v.to_string())
            }
            ParamType::Choice => self.choices.iter().find(|choice| *choice == text).cloned(),
            ParamType::Fraction => is_fraction(text).then(|| text.into()),
            ParamType::FileRead | ParamType::FileAppend => {
                (!given.is_empty()).then(|| given.into())
            }
            ParamType::Address => Address::parse(text).map(|_| text.into()),
        }
    }

    /// The declared range, or this one if the author gave none.
    fn range(&self, min: i64, max: i64) -> (i64, i64) {
        if (self.min, self.max) == (0, 0) { (min, max) } else { (self.min, self.max) }
    }
}

/// Why a parameter is wrong. Names the filter and the parameter, and says what to write.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParamError {
    /// The filter has no such parameter.
    #[error("filter {filter}: it has no parameter {name:?}{hint}")]
    Unknown {
        /// Of the filter.
        filter: String,
        /// As given.
        name: String,
        /// The nearest name, and all names.
        hint: String,
    },
    /// Given more than once.
    #[error("filter {filter}: parameter {name} is given twice")]
    Duplicate {
        /// Of the filter.
        filter: String,
        /// Of the parameter.
        name: String,
    },
    /// Has no default and was not given.
    #[error("filter {filter}: parameter {name} must be given: {expects}")]
    Missing {
        /// Of the filter.
        filter: String,
        /// Of the parameter.
        name: String,
        /// What it may be.
        expects: String,
    },
    /// Of the wrong type or out of range.
    #[error("filter {filter}: parameter {name} cannot be {value:?}: {what}")]
    Value {
        /// Of the filter.
        filter: String,
        /// Of the parameter.
        name: String,
        /// As given.
        value: String,
        /// What it may be.
        what: String,
    },
    /// The file or address cannot be had.
    #[error("filter {filter}: parameter {name}: cannot {step} {value:?}: {source}")]
    Unavailable {
        /// Of the filter.
        filter: String,
        /// Of the parameter.
        name: String,
        /// What was tried.
        step: &'static str,
        /// Path or address.
        value: String,
        /// What the system said.
        source: io::Error,
    },
}

/// All parameters of an instance, in the order of their declaration, with nothing opened yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    filter: String,
    params: Vec<CheckedParam>,
}

#[derive(Clone, Debug, PartialEq)]
struct CheckedParam {
    name: String,
    kind: ParamType,
    value: String,
}

/// All parameters of an instance, in the form that OPEN carries. May be used for several
/// OPENs, as after a restart of the filter host; descriptors are then shared.
#[derive(Debug)]
pub struct ResolvedParams {
    params: Vec<ResolvedParam>,
}

#[derive(Debug)]
struct ResolvedParam {
    name: String,
    value: String,
    fd: Option<OwnedFd>,
}

/// Checks what was given and opens what it names: [`check`], then [`Checked::open`].
pub fn resolve(
    filter: &Description,
    given: &[(String, String)],
) -> Result<ResolvedParams, ParamError> {
    check(filter, given)?.open()
}

/// Checks names and values and adds defaults. Touches nothing.
pub fn check(filter: &Description, given: &[(String, String)]) -> Result<Checked, ParamError> {
    for (index, (name, _)) in given.iter().enumerate() {
        if !filter.params.iter().any(|param| param.name == *name) {
            return Err(ParamError::Unknown {
                filter: filter.name.clone(),
                name: clean(name.as_bytes(), 100),
                hint: hint(name, &filter.params),
            });
        }
        if given[..index].iter().any(|(other, _)| other == name) {
            return Err(ParamError::Duplicate { filter: filter.name.clone(), name: name.clone() });
        }
    }
    let mut params = Vec::new();
    for param in &filter.params {
        let value = given.iter().find(|(name, _)| *name == param.name).map(|(_, value)| value);
        let Some(value) = value.or(param.default.as_ref()) else {
            if param.is_required() {
                return Err(ParamError::Missing {
                    filter: filter.name.clone(),
                    name: param.name.clone(),
                    expects: param.expects(),
                });
            }
            continue;
        };
        let normal = param.check(value).map_err(|what| ParamError::Value {
            filter: filter.name.clone(),
            name: param.name.clone(),
            value: clean(value.as_bytes(), 100),
            what,
        })?;
        params.push(CheckedParam { name: param.name.clone(), kind: param.kind, value: normal });
    }
    Ok(Checked { filter: filter.name.clone(), params })
}

impl Checked {
    /// Opens files and connects to addresses.
    ///
    /// A file to append to is created with mode 0600 if it is missing. Symbolic links are
    /// followed, as a shell's `>>` does: the operator names the path, and the kernel's
    /// protected_symlinks guards shared folders. Directories are refused. Connections are
    /// blocking stream sockets. Everything is closed on exec.
    pub fn open(&self) -> Result<ResolvedParams, ParamError> {
        let mut fds: Vec<Option<OwnedFd>> = Vec::new();
        fds.resize_with(self.params.len(), || None);
        for creating in [false, true] {
            for (param, fd) in self.params.iter().zip(&mut fds) {
                if param.kind.is_descriptor() && (param.kind == ParamType::FileAppend) == creating {
                    *fd = Some(self.open_one(param)?);
                }
            }
        }
        let params = self.params.iter().zip(fds).map(|(param, fd)| ResolvedParam {
            name: param.name.clone(),
            value: param.value.clone(),
            fd,
        });
        Ok(ResolvedParams { params: params.collect() })
    }

    fn open_one(&self, param: &CheckedParam) -> Result<OwnedFd, ParamError> {
        let (step, opened) = match param.kind {
            ParamType::FileRead => {
                ("open for reading", open_file(&param.value, OpenOptions::new().read(true)))
            }
            ParamType::FileAppend => (
                "open for appending",
                open_file(&param.value, OpenOptions::new().append(true).create(true).mode(0o600)),
            ),
            _ => ("connect to", connect(&param.value)),
        };
        opened.map_err(|source| ParamError::Unavailable {
            filter: self.filter.clone(),
            name: param.name.clone(),
            step,
            value: clean(param.value.as_bytes(), 400),
            source,
        })
    }
}

impl ResolvedParams {
    /// Name, value and descriptor of each.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str, Option<BorrowedFd<'_>>)> {
        self.params.iter().map(|param| {
            (param.name.as_str(), param.value.as_str(), param.fd.as_ref().map(AsFd::as_fd))
        })
    }

    /// The value of one, as the filter will see it.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(known, ..)| *known == name).map(|(_, value, _)| value)
    }
}

fn open_file(path: &str, options: &mut OpenOptions) -> io::Result<OwnedFd> {
    // Non-blocking while opening only, so that a pipe without another end is no hang.
    let file: File = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    if file.metadata()?.is_dir() {
        return Err(io::Error::from(io::ErrorKind::IsADirectory));
    }
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)?;
    Ok(file.into())
}

enum Address<'a> {
    Unix(&'a str),
    Tcp { host: &'a str, port: u16 },
}

impl Address<'_> {
    fn parse(text: &str) -> Option<Address<'_>> {
        if let Some(path) = text.strip_prefix("unix:") {
            return (1..108).contains(&path.len()).then_some(Address::Unix(path));
        }
        let (host, port) = text.rsplit_once(':')?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        if bare.is_none() && host.contains(':') {
            return None;
        }
        let host = bare.unwrap_or(host);
        let port: u16 = port.parse().ok()?;
        (!host.is_empty() && port != 0).then_some(Address::Tcp { host, port })
    }
}

fn connect(address: &str) -> io::Result<OwnedFd> {
    match Address::parse(address) {
        Some(Address::Unix(path)) => Ok(UnixStream::connect(path)?.into()),
        Some(Address::Tcp { host, port }) => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            for address in (host, port).to_socket_addrs()? {
                match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                    Ok(stream) => return Ok(stream.into()),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
        None => Err(io::ErrorKind::InvalidInput.into()),
    }
}

const SIZES: &[(&str, i64)] = &[
    ("", 1),
    ("K", 1 << 10),
    ("k", 1 << 10),
    ("M", 1 << 20),
    ("m", 1 << 20),
    ("G", 1 << 30),
    ("g", 1 << 30),
    ("T", 1 << 40),
    ("t", 1 << 40),
];
const TIMES: &[(&str, i64)] = &[("", 1), ("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];

/// A number of units: `4K` with SIZES is 4096.
fn with_unit(text: &str, units: &[(&str, i64)]) -> Option<i64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    number.parse::<i64>().ok()?.checked_mul(*factor)
}

fn show_size(bytes: i64) -> String {
    for (unit, factor) in [("T", 1i64 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)] {
        if bytes != 0 && bytes % factor == 0 {
            return format!("{}{unit}", bytes / factor);
        }
    }
    bytes.to_string()
}

/// Digits with at most one point among them, and not more than 1.
fn is_fraction(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
        && text.parse::<f64>().is_ok_and(|value| (0.0..=1.0).contains(&value))
}

/// `; did you mean "rate"? It has: burst, rate`.
fn hint(name: &str, params: &[Param]) -> String {
    if params.is_empty() {
        return "; it has none".into();
    }
    let nearest = params
        .iter()
        .map(|param| (distance(name, &param.name), param))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, param)| *distance <= param.name.len().div_ceil(3))
        .map(|(_, param)| format!("; did you mean {:?}?", param.name));
    let names: Vec<&str> = params.iter().map(|param| param.name.as_str()).collect();
    format!("{} It has: {}", nearest.unwrap_or_else(|| ".".into()), names.join(", "))
}

/// How many letters to insert, drop or change to make `b` of `a`. Long names are cut.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (&a.as_bytes()[..a.len().min(64)], &b.as_bytes()[..b.len().min(64)]);
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, into) in b.iter().enumerate() {
            let change = diagonal + usize::from(from != into);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
