//! The client's side of the NBD protocol, as far as asking a daemon what its disk consists of
//! needs it.
//!
//! All of the handshake is said at once, when the daemon is started and before it listens: what
//! it answers is read with the first question. So nobody waits for it who does not ask, and a
//! daemon that gives its clients a few seconds to negotiate (QEMU 9.1) has nothing to wait for.
//!
//! Always true: each wait has an end, and each answer a largest size; after something that is no
//! answer nothing more is asked, as nobody knows where in the stream the next one would begin.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const GREETING: [u64; 2] = [0x4e42_444d_4147_4943, OPTION_MAGIC];
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

const FIXED_NEWSTYLE: u16 = 1;
const FIXED_NEWSTYLE_NO_ZEROES: u32 = 3;

const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const CONTEXT: &[u8] = b"base:allocation";

const CMD_BLOCK_STATUS: u16 = 7;
const CHUNK_NONE: u16 = 0;
const CHUNK_BLOCK_STATUS: u16 = 5;
/// Kinds from here on say that it has failed.
const CHUNK_ERROR: u16 = 1 << 15;
const FLAG_DONE: u16 = 1;

/// More than QEMU answers to an option.
const OPTION_REPLY_BYTES_MAX: u32 = 4096;
/// Replies to one option; QEMU sends three at the most.
const OPTION_REPLIES_MAX: usize = 16;
/// As many stretches as QEMU puts into one answer, and the context's number.
const STATUS_BYTES_MAX: u32 = (1 << 20) + 4;

/// A stretch as the daemon tells it: its length, and its flags.
pub(crate) type Stretch = (u32, u32);

/// Takes no space.
pub(crate) const FLAG_HOLE: u32 = 1;
/// Reads as zeroes.
pub(crate) const FLAG_ZERO: u32 = 2;

/// A connection on which questions are asked, one after the other.
#[derive(Debug)]
pub(crate) struct Asking {
    socket: UnixStream,
    /// The context's number, once the handshake's answers were read.
    context: Option<u32>,
    cookie: u64,
}

impl Asking {
    /// Says the handshake for the export `name`. Does not wait: it is less than a socket takes.
    pub fn new(mut socket: UnixStream, name: &str) -> io::Result<Asking> {
        let mut hello = FIXED_NEWSTYLE_NO_ZEROES.to_be_bytes().to_vec();
        option(&mut hello, OPT_STRUCTURED_REPLY, &[]);
        let mut context = counted(name.as_bytes());
        context.extend(1u32.to_be_bytes());
        context.extend(counted(CONTEXT));
        option(&mut hello, OPT_SET_META_CONTEXT, &context);
        let mut go = counted(name.as_bytes());
        go.extend(0u16.to_be_bytes());
        option(&mut hello, OPT_GO, &go);
        socket.set_nonblocking(true)?;
        socket.write_all(&hello)?;
        socket.set_nonblocking(false)?;
        Ok(Asking { socket, context: None, cookie: 0 })
    }

    /// What the `length` bytes from `offset` on are, or the first of them; in no more time
    /// than `patience`. The stretches are as the daemon says them; none: it could not tell, and
    /// may be asked again.
    pub fn ask(
        &mut self,
        offset: u64,
        length: u32,
        patience: Duration,
    ) -> io::Result<Vec<Stretch>> {
        let deadline = Instant::now() + patience;
        let context = match self.context {
            Some(context) => context,
            None => self.finish_handshake(deadline)?,
        };
        self.context = Some(context);
        self.cookie += 1;
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend(0u16.to_be_bytes());
        request.extend(CMD_BLOCK_STATUS.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        self.socket.set_write_timeout(Some(patience))?;
        self.socket.write_all(&request)?;
        self.status(context, deadline)
    }

    fn finish_handshake(&mut self, deadline: Instant) -> io::Result<u32> {
        for expected in GREETING {
            if u64::from_be_bytes(self.read(deadline)?) != expected {
                return Err(odd("does not greet as an NBD server"));
            }
        }
        if u16::from_be_bytes(self.read(deadline)?) & FIXED_NEWSTYLE == 0 {
            return Err(odd("speaks an old NBD"));
        }
        self.replies(OPT_STRUCTURED_REPLY, deadline)?;
        let context = self.replies(OPT_SET_META_CONTEXT, deadline)?;
        self.replies(OPT_GO, deadline)?;
        context.ok_or_else(|| odd("does not tell what its disk consists of"))
    }

    /// Reads all replies to an option; gives the number of a context among them.
    fn replies(&mut self, asked: u32, deadline: Instant) -> io::Result<Option<u32>> {
        let mut context = None;
        for _ in 0..OPTION_REPLIES_MAX {
            let magic = u64::from_be_bytes(self.read(deadline)?);
            let [option, reply, length] = self.words(deadline)?;
            if magic != REPLY_MAGIC || option != asked || length > OPTION_REPLY_BYTES_MAX {
                return Err(odd("answers something else than it was asked"));
            }
            let data = self.read_vec(length, deadline)?;
            match reply {
                REP_ACK => return Ok(context),
                REP_INFO => {}
                REP_META_CONTEXT => {
                    context = data
                        .split_first_chunk()
                        .filter(|(_, name)| *name == CONTEXT)
                        .map(|(number, _)| u32::from_be_bytes(*number));
                }
                _ => return Err(odd("refuses an option")),
            }
        }
        Err(odd("answers one option for ever"))
    }

    /// Reads the answer to the last question.
    fn status(&mut self, context: u32, deadline: Instant) -> io::Result<Vec<Stretch>> {
        let (mut found, mut has_failed) = (None, false);
        loop {
            let magic = u32::from_be_bytes(self.read(deadline)?);
            let flags = u16::from_be_bytes(self.read(deadline)?);
            let kind = u16::from_be_bytes(self.read(deadline)?);
            let cookie = u64::from_be_bytes(self.read(deadline)?);
            let length = u32::from_be_bytes(self.read(deadline)?);
            if magic != CHUNK_MAGIC || cookie != self.cookie || length > STATUS_BYTES_MAX {
                return Err(odd("answers something else than it was asked"));
            }
            let data = self.read_vec(length, deadline)?;
            match (kind, &found) {
                (CHUNK_NONE, _) => {}
                (CHUNK_ERROR.., _) => has_failed = true,
                (CHUNK_BLOCK_STATUS, None) => found = Some(stretches(&data, context)?),
                _ => return Err(odd("cannot tell what its disk consists of")),
            }
            if flags & FLAG_DONE != 0 {
                let found = if has_failed { Some(Vec::new()) } else { found };
                return found.ok_or_else(|| odd("tells nothing"));
            }
        }
    }

    fn words<const N: usize>(&mut self, deadline: Instant) -> io::Result<[u32; N]> {
        let mut words = [0; N];
        for word in &mut words {
            *word = u32::from_be_bytes(self.read(deadline)?);
        }
        Ok(words)
    }

    fn read<const N: usize>(&mut self, deadline: Instant) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_all(&mut bytes, deadline)?;
        Ok(bytes)
    }

    fn read_vec(&mut self, length: u32, deadline: Instant) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length as usize];
        self.read_all(&mut bytes, deadline)?;
        Ok(bytes)
    }

    /// A whole piece by a point in time, however small the drops in which it comes.
    fn read_all(&mut self, mut bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.socket.set_read_timeout(Some(left))?;
            match self.socket.read(bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => bytes = &mut bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The payload of an answer: the context's number, and pairs.
fn stretches(data: &[u8], context: u32) -> io::Result<Vec<Stretch>> {
    let (words, rest) = data.as_chunks::<4>();
    let mut words = words.iter().map(|word| u32::from_be_bytes(*word));
    if !rest.is_empty() || words.next() != Some(context) {
        return Err(odd("tells something else than it was asked"));
    }
    let mut found = Vec::with_capacity(words.len() / 2);
    while let Some(length) = words.next() {
        let Some(flags) = words.next() else { return Err(odd("tells half a stretch")) };
        found.push((length, flags));
    }
    Ok(found)
}

fn option(hello: &mut Vec<u8>, number: u32, data: &[u8]) {
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(number.to_be_bytes());
    hello.extend(counted(data));
}

fn counted(bytes: &[u8]) -> Vec<u8> {
    let mut counted = (bytes.len() as u32).to_be_bytes().to_vec();
    counted.extend(bytes);
    counted
}

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend([option, kind].iter().flat_map(|word| word.to_be_bytes()));
        bytes.extend(counted(data));
        bytes
    }

    /// What a server says up to the first answer.
    pub fn handshake() -> Vec<u8> {
        let mut bytes: Vec<u8> = GREETING.iter().flat_map(|word| word.to_be_bytes()).collect();
        bytes.extend(3u16.to_be_bytes());
        bytes.extend(reply(OPT_STRUCTURED_REPLY, REP_ACK, &[]));
        let context = [&7u32.to_be_bytes()[..], CONTEXT].concat();
        bytes.extend(reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, &context));
        bytes.extend(reply(OPT_SET_META_CONTEXT, REP_ACK, &[]));
        bytes.extend(reply(OPT_GO, REP_INFO, &[0; 12]));
        bytes.extend(reply(OPT_GO, REP_ACK, &[]));
        bytes
    }

    /// The answer to the question `cookie`.
    pub fn answer(flags: u16, kind: u16, cookie: u64, words: &[u32]) -> Vec<u8> {
        let mut bytes = CHUNK_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        let data: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        bytes.extend(counted(&data));
        bytes
    }

    /// Asks a server that says `bytes`, whatever it hears, and does not close.
    fn asked(bytes: &[u8]) -> io::Result<Vec<Stretch>> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut asking = Asking::new(ours, "disk").unwrap();
        theirs.write_all(bytes).unwrap();
        asking.ask(0, 1 << 20, Duration::from_millis(50))
    }

    #[test]
    fn stretches_are_read_and_a_second_question_needs_no_handshake() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut asking = Asking::new(ours, "disk").unwrap();
        theirs.write_all(&handshake()).unwrap();
        theirs.write_all(&answer(0, CHUNK_BLOCK_STATUS, 1, &[7, 4096, 3, 512, 0])).unwrap();
        theirs.write_all(&answer(FLAG_DONE, CHUNK_NONE, 1, &[])).unwrap();
        theirs.write_all(&answer(FLAG_DONE, CHUNK_BLOCK_STATUS, 2, &[7, 512, 2])).unwrap();
        let patience = Duration::from_secs(5);
        assert_eq!(asking.ask(0, 4608, patience).unwrap(), [(4096, 3), (512, 0)]);
        assert_eq!(asking.ask(0, 512, patience).unwrap(), [(512, 2)]);
    }

    #[test]
    fn a_server_that_cannot_tell_may_be_asked_again() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut asking = Asking::new(ours, "disk").unwrap();
        theirs.write_all(&handshake()).unwrap();
        // An error with a message, behind a part of an answer; and one for the whole.
        theirs.write_all(&answer(0, CHUNK_BLOCK_STATUS, 1, &[7, 4096, 3])).unwrap();
        theirs.write_all(&answer(FLAG_DONE, 0x8002, 1, &[5, 0, 0])).unwrap();
        theirs.write_all(&answer(FLAG_DONE, 0x8001, 2, &[5, 0])).unwrap();
        theirs.write_all(&answer(FLAG_DONE, CHUNK_BLOCK_STATUS, 3, &[7, 512, 2])).unwrap();
        let patience = Duration::from_secs(5);
        for expected in [vec![], vec![], vec![(512, 2)]] {
            assert_eq!(asking.ask(0, 4608, patience).unwrap(), expected);
        }
    }

    #[test]
    fn a_server_that_talks_nonsense_is_not_believed_and_never_waited_for_for_ever() {
        let ready = handshake();
        let then = |more: Vec<u8>| [ready.clone(), more].concat();
        let changed = |at: usize| {
            let mut bytes = then(answer(FLAG_DONE, CHUNK_BLOCK_STATUS, 1, &[7, 512, 0]));
            bytes[at] ^= 0x40;
            bytes
        };
        let endless = reply(OPT_STRUCTURED_REPLY, REP_INFO, &[]).repeat(100);
        for (bytes, says) in [
            (vec![], "timed out"),
            (ready[..30].to_vec(), "timed out"),
            (ready.clone(), "timed out"),
            (changed(0), "greet"),
            (changed(18), "something else"),
            ([&ready[..18], &endless].concat(), "for ever"),
            ([&ready[..18], &reply(8, 0x8000_0001, &[])].concat(), "refuses"),
            ([&ready[..18], &reply(8, 1, &[0; 5000])].concat(), "something else"),
            (then(answer(FLAG_DONE, CHUNK_BLOCK_STATUS, 2, &[7, 512, 0])), "something else"),
            (then(answer(FLAG_DONE, CHUNK_BLOCK_STATUS, 1, &[6, 512, 0])), "something else"),
            (then(answer(FLAG_DONE, CHUNK_BLOCK_STATUS, 1, &[7, 512])), "half"),
            (then(answer(FLAG_DONE, CHUNK_BLOCK_STATUS, 1, &[])), "something else"),
            (then(answer(FLAG_DONE, CHUNK_NONE, 1, &[])), "nothing"),
            (then(answer(0, CHUNK_BLOCK_STATUS, 1, &[7, 512, 0]).repeat(2)), "cannot tell"),
        ] {
            let said = asked(&bytes).unwrap_err().to_string();
            assert!(said.contains(says), "{said} does not say {says}");
        }
    }
}
