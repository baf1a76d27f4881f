//! NBD: programs of others as clients, and a client that can say anything at all.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// How long a program or a read may take.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Runs a program to its end, which must come in time.
pub fn run(program: &str, args: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["-k", "1", &TIMEOUT.as_secs().to_string(), program]).args(args);
    command.stdin(Stdio::null());
    command.output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// What a program prints; it must succeed.
#[track_caller]
pub fn succeed(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {}\n{text}\n{errors}", output.status);
    text
}

/// What a program complains of; it must fail.
#[track_caller]
pub fn fail(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{program} {args:?} succeeds:\n{text}");
    text + &errors
}

/// Runs lines of Python in nbdsh: `h` is a handle, not connected yet; `uri` names the export.
#[track_caller]
pub fn nbdsh(uri: &str, script: &str) -> String {
    let script = format!("uri = {uri:?}\nimport errno\n{HELPERS}\n{script}");
    // Not by `nbdsh`: another Python than the system's may come first in PATH.
    succeed("/usr/bin/python3", &["-mnbd", "-c", &script])
}

const HELPERS: &str = "
def fails(number, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except nbd.Error as error:
        assert error.errnum == number, (error.errnum, str(error))
        return str(error)
    raise AssertionError('it succeeds')
";

/// A stream that is one or the other.
#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// A client that says whatever it is told to.
#[derive(Debug)]
pub struct RawNbd(Stream);

/// A chunk of an extended reply: flags, kind, cookie, offset, payload.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Chunk {
    pub flags: u16,
    pub kind: u16,
    pub cookie: u64,
    pub offset: u64,
    pub payload: Vec<u8>,
}

/// The header of a command.
fn header(flags: u16, kind: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

impl RawNbd {
    /// Connects, and says nothing.
    pub fn unix(path: &Path) -> RawNbd {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        RawNbd(Stream::Unix(stream))
    }

    /// The same, by TCP.
    pub fn tcp(address: &str) -> RawNbd {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        RawNbd(Stream::Tcp(stream))
    }

    /// Connects and does the handshake with `export`; `options` are sent before it and must
    /// be granted.
    pub fn ready(path: &Path, export: &str, options: &[u32]) -> RawNbd {
        let mut client = RawNbd::unix(path);
        client.begin();
        for option in options {
            client.option(*option, &[]);
            assert_eq!(client.reply().0, 1, "option {option}");
        }
        client.go(export);
        client
    }

    /// Reads the greeting and says the usual flags.
    pub fn begin(&mut self) {
        assert_eq!(self.read(18), *b"NBDMAGICIHAVEOPT\0\x03");
        self.write(&3u32.to_be_bytes());
    }

    /// Sends an option.
    pub fn option(&mut self, option: u32, data: &[u8]) {
        self.write(b"IHAVEOPT");
        self.write(&option.to_be_bytes());
        self.write(&(data.len() as u32).to_be_bytes());
        self.write(data);
    }

    /// The next reply to an option: its kind and its body.
    pub fn reply(&mut self) -> (u32, Vec<u8>) {
        let header = self.read(20);
        assert_eq!(header[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        (number(12), self.read(number(16) as usize))
    }

    /// Chooses an export.
    pub fn go(&mut self, export: &str) {
        let mut data = (export.len() as u32).to_be_bytes().to_vec();
        data.extend(export.as_bytes());
        data.extend([0, 0]);
        self.option(7, &data);
        while self.reply().0 != 1 {}
    }

    /// Sends the header of a command.
    pub fn command(&mut self, flags: u16, kind: u16, cookie: u64, offset: u64, length: u32) {
        self.write(&header(flags, kind, cookie, offset, length));
    }

    /// Asks for the same `length` bytes so many times, in one breath: a socket has room for
    /// few small pieces. Cookies count from 0.
    pub fn read_often(&mut self, count: u64, length: u32) {
        let all: Vec<u8> = (0..count).flat_map(|cookie| header(0, 0, cookie, 0, length)).collect();
        self.try_write(&all).unwrap();
    }

    /// The same with an extended header.
    pub fn extended(&mut self, flags: u16, kind: u16, cookie: u64, offset: u64, length: u64) {
        let mut bytes = 0x21e4_1c71u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        self.write(&bytes);
    }

    /// The error and the cookie of a simple reply.
    pub fn simple(&mut self) -> (u32, u64) {
        let header = self.read(16);
        assert_eq!(header[..4], 0x6744_6698u32.to_be_bytes());
        let error = u32::from_be_bytes(header[4..8].try_into().unwrap());
        (error, u64::from_be_bytes(header[8..].try_into().unwrap()))
    }

    /// A chunk of an extended reply.
    pub fn chunk(&mut self) -> Chunk {
        let header = self.read(32);
        assert_eq!(header[..4], 0x6e8a_278cu32.to_be_bytes());
        let long = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().unwrap());
        Chunk {
            flags: u16::from_be_bytes([header[4], header[5]]),
            kind: u16::from_be_bytes([header[6], header[7]]),
            cookie: long(8),
            offset: long(16),
            payload: self.read(long(24) as usize),
        }
    }

    /// Sends bytes. What the other side no longer takes is nobody's loss.
    pub fn write(&mut self, bytes: &[u8]) {
        let _ = self.try_write(bytes);
    }

    /// Sends bytes.
    pub fn try_write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match &mut self.0 {
            Stream::Unix(stream) => stream.write_all(bytes),
            Stream::Tcp(stream) => stream.write_all(bytes),
        }
    }

    /// Reads so many bytes.
    #[track_caller]
    pub fn read(&mut self, count: usize) -> Vec<u8> {
        self.try_read(count).unwrap()
    }

    /// Reads so many bytes, if the other side sends them.
    pub fn try_read(&mut self, count: usize) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        match &mut self.0 {
            Stream::Unix(stream) => stream.read_exact(&mut bytes)?,
            Stream::Tcp(stream) => stream.read_exact(&mut bytes)?,
        }
        Ok(bytes)
    }

    /// Reads until the other side ends the connection, which it must in time; gives what
    /// came before that.
    #[track_caller]
    pub fn read_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let result = match &mut self.0 {
            Stream::Unix(stream) => stream.read_to_end(&mut bytes),
            Stream::Tcp(stream) => stream.read_to_end(&mut bytes),
        };
        match result {
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => {
                panic!("the connection is not ended: {error}")
            }
            _ => bytes,
        }
    }
}
