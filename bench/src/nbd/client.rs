//! A plain NBD client on a Unix socket: the oldest handshake that all servers have, simple
//! replies, several requests in flight, a socket that it sleeps on.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::measure::{CLIENT, Round};
use crate::process::Used;

const HELLO: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTIONS: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Fixed newstyle, no zeroes behind the export's flags.
const FLAGS: u32 = 0b11;
const EXPORT_NAME: u32 = 1;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const READ: u16 = 0;
const WRITE: u16 = 1;
const HEADER_BYTES: usize = 28;

/// What a client does for one round.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests in flight.
    pub depth: usize,
    /// Bytes of each.
    pub length: u32,
    /// Reads, or else writes.
    pub reads: bool,
    /// How long it goes on.
    pub slice: Duration,
}

/// A connection.
pub struct Client {
    stream: UnixStream,
    replies: BufReader<UnixStream>,
    capacity: u64,
    random: u64,
}

impl Client {
    /// Connects to an export.
    pub fn connect(path: &Path, export: &str) -> io::Result<Client> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.set_write_timeout(Some(Duration::from_secs(20)))?;
        let mut replies = BufReader::with_capacity(256 << 10, stream.try_clone()?);
        let mut hello = [0; 18];
        replies.read_exact(&mut hello)?;
        if number(&hello[..8]) != HELLO || number(&hello[8..16]) != OPTIONS {
            return Err(io::Error::other("no NBD server of this century"));
        }
        let mut option = FLAGS.to_be_bytes().to_vec();
        option.extend_from_slice(&OPTIONS.to_be_bytes());
        option.extend_from_slice(&EXPORT_NAME.to_be_bytes());
        option.extend_from_slice(&(export.len() as u32).to_be_bytes());
        option.extend_from_slice(export.as_bytes());
        (&stream).write_all(&option)?;
        let mut answer = [0; 10];
        replies.read_exact(&mut answer)?;
        Ok(Client { stream, replies, capacity: number(&answer[..8]), random: 88_172_645_463_325 })
    }

    /// Runs a load.
    pub fn run(&mut self, load: Load) -> io::Result<Round> {
        let before = Used::by_this_thread();
        let mut round = Round::default();
        let mut free: Vec<usize> = (0..load.depth).collect();
        let mut since = vec![Instant::now(); load.depth];
        let mut out = Vec::with_capacity(load.depth * (HEADER_BYTES + load.length as usize));
        let mut data = vec![0x5a; load.length as usize];
        let start = Instant::now();
        let mut now = start;
        while now - start < load.slice || free.len() < load.depth {
            if now - start < load.slice {
                out.clear();
                while let Some(cookie) = free.pop() {
                    self.put_request(&mut out, load, cookie as u64);
                    since[cookie] = now;
                    if !load.reads {
                        out.extend_from_slice(&data);
                    }
                }
                self.stream.write_all(&out)?;
            }
            // All replies that are here already are worth one batch of new requests.
            loop {
                let cookie = self.take_reply(load, &mut data, &mut round)?;
                now = Instant::now();
                let since = since.get(cookie).ok_or_else(nonsense)?;
                round.latencies.record((now - *since).as_nanos() as u64);
                round.requests += 1;
                free.push(cookie);
                if self.replies.buffer().len() < 16 || free.len() == load.depth {
                    break;
                }
            }
        }
        round.elapsed = now - start;
        round.used = vec![(CLIENT.into(), Used::by_this_thread().since(before))];
        Ok(round)
    }

    fn put_request(&mut self, out: &mut Vec<u8>, load: Load, cookie: u64) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let block = self.random % (self.capacity / u64::from(load.length));
        out.extend_from_slice(&REQUEST.to_be_bytes());
        out.extend_from_slice(&0u16.to_be_bytes());
        out.extend_from_slice(&if load.reads { READ } else { WRITE }.to_be_bytes());
        out.extend_from_slice(&cookie.to_be_bytes());
        out.extend_from_slice(&(block * u64::from(load.length)).to_be_bytes());
        out.extend_from_slice(&load.length.to_be_bytes());
    }

    fn take_reply(&mut self, load: Load, data: &mut [u8], round: &mut Round) -> io::Result<usize> {
        let mut reply = [0; 16];
        self.replies.read_exact(&mut reply)?;
        if number(&reply[..4]) != u64::from(SIMPLE_REPLY) {
            return Err(nonsense());
        }
        if number(&reply[4..8]) != 0 {
            round.errors += 1;
        } else if load.reads {
            self.replies.read_exact(data)?;
        }
        usize::try_from(number(&reply[8..])).map_err(|_| nonsense())
    }
}

fn nonsense() -> io::Error {
    io::Error::other("the server's reply is nonsense")
}

/// A number as NBD has it: the highest byte first.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}
