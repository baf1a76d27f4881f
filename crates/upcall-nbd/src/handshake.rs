//! From the first byte of a client to the export it uses: a pure state machine. Bytes come
//! in by [`Handshake::handle`], what to send is appended to the caller's `out`.
//!
//! Always true, whatever the bytes: not more than one option is answered in a call, so that
//! the caller decides how much waits to be sent; not more than [`OPTION_LENGTH_MAX`] bytes
//! are kept; the handshake ends after [`OPTIONS_MAX`] options. Where TLS is required, nothing
//! about exports is said before it, and nothing that was said in the clear counts after it.

use std::sync::Arc;

use crate::export::ExportInfo;
use crate::wire::*;

/// Longest data of an option, in bytes. A name and all that can be asked about it is shorter.
pub const OPTION_LENGTH_MAX: usize = 64 << 10;
/// Data of an option that is too long is skipped up to this; a client that says more than
/// that is not spoken to any longer.
const OPTION_SKIPPED_MAX: usize = 1 << 20;
/// Most options of one client.
pub const OPTIONS_MAX: u32 = 256;
const OPTION_HEADER: usize = 16;

/// Whether clients speak TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// They cannot.
    Off,
    /// They can.
    Offered,
    /// They must, before they learn anything.
    Required,
}

/// How replies are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyStyle {
    /// As it was in the beginning.
    Simple,
    /// In chunks.
    Structured,
    /// In chunks, with 64-bit lengths.
    Extended,
}

/// What a client and we have agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// Index of the export.
    pub export: usize,
    /// How replies are written, and how long the headers of commands are.
    pub style: ReplyStyle,
    /// The client may ask for `base:allocation`.
    pub base_allocation: bool,
}

/// What comes after a handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Commands.
    Transmission(Session),
    /// TLS, and then options again, for [`Handshake::after_tls`]. What the client has sent
    /// beyond this already, in the clear, must end the connection.
    StartTls,
    /// Nothing: what to send is the last.
    End(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    ClientFlags,
    OptionHeader,
    OptionData { option: u32, length: usize },
    Skip { option: u32, left: usize },
    Over,
}

/// See the module.
#[derive(Debug)]
pub struct Handshake {
    exports: Arc<[ExportInfo]>,
    tls: TlsMode,
    is_secure: bool,
    state: State,
    gathered: Vec<u8>,
    options: u32,
    no_zeroes: bool,
    style: ReplyStyle,
    /// The export for which `base:allocation` was chosen.
    base_allocation: Option<usize>,
}

/// An error reply and its text.
struct Refused(u32, &'static str);

const MALFORMED: Refused = Refused(rep::ERR_INVALID, "malformed option");
const NO_SUCH_EXPORT: Refused = Refused(rep::ERR_UNKNOWN, "there is no such export");

impl Handshake {
    /// Begins; appends the server's greeting to `out`.
    pub fn new(exports: Arc<[ExportInfo]>, tls: TlsMode, out: &mut Vec<u8>) -> Handshake {
        out.extend(MAGIC_SERVER.to_be_bytes());
        out.extend(MAGIC_OPTION.to_be_bytes());
        out.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        Handshake {
            exports,
            tls,
            is_secure: false,
            state: State::ClientFlags,
            gathered: Vec::new(),
            options: 0,
            no_zeroes: false,
            style: ReplyStyle::Simple,
            base_allocation: None,
        }
    }

    /// Goes on after TLS has begun. Of what was agreed on in the clear only the form of the
    /// handshake itself remains.
    pub fn after_tls(self) -> Handshake {
        Handshake {
            is_secure: true,
            state: State::OptionHeader,
            gathered: Vec::new(),
            style: ReplyStyle::Simple,
            base_allocation: None,
            ..self
        }
    }

    /// Takes bytes of the client, up to the end of one option; says how many. Less than all
    /// of them only with an outcome, or if something was appended to `out`.
    pub fn handle(&mut self, input: &[u8], out: &mut Vec<u8>) -> (usize, Option<Outcome>) {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            if let State::Skip { option, left } = self.state {
                let here = left.min(rest.len());
                used += here;
                self.state = State::Skip { option, left: left - here };
                if here < left {
                    return (used, None);
                }
                self.state = State::OptionHeader;
                let text = "the option's data is too long";
                return (used, self.refuse(option, Refused(rep::ERR_TOO_BIG, text), out));
            }
            let needed = match self.state {
                State::ClientFlags => 4,
                State::OptionHeader => OPTION_HEADER,
                State::OptionData { length, .. } => length,
                State::Skip { .. } | State::Over => return (input.len(), None),
            };
            let here = (needed - self.gathered.len()).min(rest.len());
            self.gathered.extend(&rest[..here]);
            used += here;
            if self.gathered.len() < needed {
                return (used, None);
            }
            let gathered = std::mem::take(&mut self.gathered);
            let before = out.len();
            let outcome = self.step(&gathered, out);
            if matches!(outcome, Some(Outcome::Transmission(_) | Outcome::End(_))) {
                self.state = State::Over;
            }
            if outcome.is_some() || out.len() > before {
                return (used, outcome);
            }
        }
    }

    /// Whether the client has begun to say something and not ended it.
    pub fn is_amid(&self) -> bool {
        !self.gathered.is_empty() || !matches!(self.state, State::OptionHeader | State::Over)
    }

    fn step(&mut self, gathered: &[u8], out: &mut Vec<u8>) -> Option<Outcome> {
        match self.state {
            State::ClientFlags => {
                let flags = u32_at(gathered, 0);
                if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
                    return Some(Outcome::End("unknown flags of the client"));
                }
                self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
                self.state = State::OptionHeader;
                None
            }
            State::OptionHeader => {
                if u64_at(gathered, 0) != MAGIC_OPTION {
                    return Some(Outcome::End("not an option"));
                }
                self.options += 1;
                if self.options > OPTIONS_MAX {
                    return Some(Outcome::End("too many options"));
                }
                let (option, length) = (u32_at(gathered, 8), u32_at(gathered, 12) as usize);
                if length > OPTION_SKIPPED_MAX {
                    return Some(Outcome::End("an option that is too long"));
                }
                if length > OPTION_LENGTH_MAX {
                    self.state = State::Skip { option, left: length };
                    return None;
                }
                self.state = State::OptionData { option, length };
                if length == 0 { self.option(option, &[], out) } else { None }
            }
            State::OptionData { option, .. } => self.option(option, gathered, out),
            State::Skip { .. } | State::Over => None,
        }
    }

    fn option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Option<Outcome> {
        self.state = State::OptionHeader;
        let in_the_clear = self.tls == TlsMode::Required && !self.is_secure;
        if in_the_clear && !matches!(option, option::STARTTLS | option::ABORT) {
            let text = "this server wants TLS first";
            return self.refuse(option, Refused(rep::ERR_TLS_REQD, text), out);
        }
        let result = match option {
            option::EXPORT_NAME => return Some(self.export_name(data, out)),
            option::ABORT => {
                reply(out, option, rep::ACK, &[]);
                return Some(Outcome::End("aborted by the client"));
            }
            option::LIST => self.list(data, out),
            option::STARTTLS => self.start_tls(data, out),
            option::INFO | option::GO => self.go(option, data, out),
            option::STRUCTURED_REPLY => self.structured_reply(data, out),
            option::EXTENDED_HEADERS => self.extended_headers(data, out),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(option, data, out)
            }
            _ => Err(Refused(rep::ERR_UNSUP, "unknown option")),
        };
        match result {
            Ok(outcome) => outcome,
            Err(refused) => self.refuse(option, refused, out),
        }
    }

    fn refuse(&self, option: u32, refused: Refused, out: &mut Vec<u8>) -> Option<Outcome> {
        let Refused(code, text) = refused;
        if option == option::EXPORT_NAME {
            // The one option that has no error reply.
            return Some(Outcome::End(text));
        }
        reply(out, option, code, text.as_bytes());
        None
    }

    /// The export of that name. Without a name: the only one.
    fn find(&self, name: &[u8]) -> Option<usize> {
        match self.exports.iter().position(|export| export.name().as_bytes() == name) {
            None if name.is_empty() && self.exports.len() == 1 => Some(0),
            found => found,
        }
    }

    fn session(&self, export: usize) -> Session {
        let base_allocation = self.base_allocation == Some(export);
        Session { export, style: self.style, base_allocation }
    }

    fn export_flags(&self, export: usize) -> u16 {
        self.exports[export].flags(self.style != ReplyStyle::Simple)
    }

    fn export_name(&mut self, data: &[u8], out: &mut Vec<u8>) -> Outcome {
        let Some(export) = self.find(data) else {
            return Outcome::End(NO_SUCH_EXPORT.1);
        };
        out.extend(self.exports[export].disk().capacity.to_be_bytes());
        out.extend(self.export_flags(export).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        Outcome::Transmission(self.session(export))
    }

    fn list(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<Option<Outcome>, Refused> {
        expect_empty(data)?;
        for export in self.exports.iter() {
            let mut body = text(export.name());
            body.extend(export.description().as_bytes());
            reply(out, option::LIST, rep::SERVER, &body);
        }
        reply(out, option::LIST, rep::ACK, &[]);
        Ok(None)
    }

    fn start_tls(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<Option<Outcome>, Refused> {
        expect_empty(data)?;
        if self.is_secure {
            return Err(Refused(rep::ERR_INVALID, "TLS has begun already"));
        }
        if self.tls == TlsMode::Off {
            return Err(Refused(rep::ERR_UNSUP, "this server has no TLS"));
        }
        reply(out, option::STARTTLS, rep::ACK, &[]);
        Ok(Some(Outcome::StartTls))
    }

    fn go(
        &mut self,
        option: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Outcome>, Refused> {
        let mut data = Data(data);
        let name = data.text()?;
        let mut wanted = Vec::new();
        for _ in 0..data.u16()? {
            wanted.push(data.u16()?);
        }
        data.expect_end()?;
        let export = self.find(name).ok_or(NO_SUCH_EXPORT)?;
        let info = &self.exports[export];
        let mut send = |kind: u16, body: &[u8]| {
            let whole: Vec<u8> =
                kind.to_be_bytes().into_iter().chain(body.iter().copied()).collect();
            reply(out, option, rep::INFO, &whole);
        };
        let mut body = info.disk().capacity.to_be_bytes().to_vec();
        body.extend(self.export_flags(export).to_be_bytes());
        send(info::EXPORT, &body);
        if wanted.contains(&info::NAME) {
            send(info::NAME, info.name().as_bytes());
        }
        if wanted.contains(&info::DESCRIPTION) {
            send(info::DESCRIPTION, info.description().as_bytes());
        }
        // Also for who did not ask: it is what commands are held to.
        let sizes: Vec<u8> = info.block_sizes().into_iter().flat_map(u32::to_be_bytes).collect();
        send(info::BLOCK_SIZE, &sizes);
        reply(out, option, rep::ACK, &[]);
        Ok((option == option::GO).then(|| Outcome::Transmission(self.session(export))))
    }

    fn structured_reply(
        &mut self,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Outcome>, Refused> {
        expect_empty(data)?;
        match self.style {
            ReplyStyle::Simple => self.style = ReplyStyle::Structured,
            ReplyStyle::Structured => {
                return Err(Refused(rep::ERR_INVALID, "structured replies are agreed on already"));
            }
            ReplyStyle::Extended => {
                let text = "extended headers are agreed on already";
                return Err(Refused(rep::ERR_EXT_HEADER_REQD, text));
            }
        }
        reply(out, option::STRUCTURED_REPLY, rep::ACK, &[]);
        Ok(None)
    }

    fn extended_headers(
        &mut self,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Outcome>, Refused> {
        expect_empty(data)?;
        if self.style == ReplyStyle::Extended {
            return Err(Refused(rep::ERR_INVALID, "extended headers are agreed on already"));
        }
        self.style = ReplyStyle::Extended;
        reply(out, option::EXTENDED_HEADERS, rep::ACK, &[]);
        Ok(None)
    }

    fn meta_context(
        &mut self,
        option: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Outcome>, Refused> {
        let sets = option == option::SET_META_CONTEXT;
        if sets {
            // Whatever comes of it, what was chosen before is chosen no longer.
            self.base_allocation = None;
        }
        if self.style == ReplyStyle::Simple {
            return Err(Refused(rep::ERR_INVALID, "ask for structured replies first"));
        }
        let mut data = Data(data);
        let name = data.text()?;
        let count = data.u32()?;
        let mut found = count == 0 && !sets;
        for _ in 0..count {
            let query = data.text()?;
            found |= query == BASE_ALLOCATION.as_bytes() || !sets && query == b"base:";
        }
        data.expect_end()?;
        let export = self.find(name).ok_or(NO_SUCH_EXPORT)?;
        if found {
            let id = if sets { BASE_ALLOCATION_ID } else { 0 };
            let mut body = id.to_be_bytes().to_vec();
            body.extend(BASE_ALLOCATION.as_bytes());
            reply(out, option, rep::META_CONTEXT, &body);
            if sets {
                self.base_allocation = Some(export);
            }
        }
        reply(out, option, rep::ACK, &[]);
        Ok(None)
    }
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, body: &[u8]) {
    out.extend(MAGIC_OPTION_REPLY.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((body.len() as u32).to_be_bytes());
    out.extend(body);
}

/// A text with its length in front.
fn text(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn expect_empty(data: &[u8]) -> Result<(), Refused> {
    Data(data).expect_end()
}

/// The data of an option, read from its start.
struct Data<'a>(&'a [u8]);

impl<'a> Data<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Refused> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(MALFORMED)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, Refused> {
        Ok(u16_at(self.take(2)?, 0))
    }

    fn u32(&mut self) -> Result<u32, Refused> {
        Ok(u32_at(self.take(4)?, 0))
    }

    fn text(&mut self) -> Result<&'a [u8], Refused> {
        let length = self.u32()? as usize;
        self.take(length)
    }

    fn expect_end(&self) -> Result<(), Refused> {
        if self.0.is_empty() { Ok(()) } else { Err(MALFORMED) }
    }
}

#[cfg(test)]
mod tests;
