//! A client's socket, in the clear or in TLS. Never blocks.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SendFlags, Shutdown};
use rustls::ServerConnection;
use upcall_ring::ArenaSlice;

use crate::output::Output;
use crate::tls::Tls;

/// What came from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// It sends no more.
    End,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: OwnedFd,
    tls: Option<Box<ServerConnection>>,
}

struct Raw<'a>(&'a OwnedFd);

impl Read for Raw<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::retry_on_intr(|| rustix::io::read(self.0, &mut *into))?)
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let send = || rustix::net::send(self.0, bytes, SendFlags::NOSIGNAL);
        Ok(rustix::io::retry_on_intr(send)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn would_block(error: &io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock
}

impl Stream {
    /// A non-blocking socket.
    pub fn new(socket: OwnedFd) -> Stream {
        Stream { socket, tls: None }
    }

    /// From the next byte on, in both directions, everything is TLS.
    pub fn start_tls(&mut self, tls: &Tls) -> Result<(), rustls::Error> {
        self.tls = Some(Box::new(ServerConnection::new(tls.0.clone())?));
        Ok(())
    }

    /// Whether TLS has something to send, of its own or of ours.
    pub fn wants_write(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    /// Takes what is there.
    pub fn receive(&mut self, into: &mut [u8]) -> io::Result<Received> {
        let mut raw = Raw(&self.socket);
        let Some(tls) = &mut self.tls else {
            return match raw.read(into) {
                Ok(0) => Ok(Received::End),
                Ok(count) => Ok(Received::Bytes(count)),
                Err(error) if would_block(&error) => Ok(Received::Nothing),
                Err(error) => Err(error),
            };
        };
        loop {
            match tls.reader().read(into) {
                Ok(0) => return Ok(Received::End),
                Ok(count) => return Ok(Received::Bytes(count)),
                // Cut off: what came before was whole, as each record is.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    return Ok(Received::End);
                }
                Err(error) if would_block(&error) => {}
                Err(error) => return Err(error),
            }
            if !tls.wants_read() {
                return Ok(Received::Nothing);
            }
            match tls.read_tls(&mut raw) {
                Ok(0) => return Ok(Received::End),
                Ok(_) => {}
                Err(error) if would_block(&error) => return Ok(Received::Nothing),
                Err(error) => return Err(error),
            }
            if let Err(error) = tls.process_new_packets() {
                // The alert, if there is room for it.
                let _ = tls.write_tls(&mut raw);
                return Err(io::Error::new(ErrorKind::InvalidData, error));
            }
        }
    }

    /// Sends what there is room for; true if that was something. Pages that are done with
    /// go to `free`.
    pub fn send(&mut self, output: &mut Output, free: &mut Vec<ArenaSlice>) -> io::Result<bool> {
        let mut raw = Raw(&self.socket);
        let mut progress = false;
        let result = loop {
            if let Some(tls) = &mut self.tls {
                if tls.wants_write() {
                    match tls.write_tls(&mut raw) {
                        Ok(count) => {
                            progress |= count > 0;
                            continue;
                        }
                        Err(error) => break Err(error),
                    }
                }
                let next = if tls.is_handshaking() { &[] } else { output.next(free) };
                if next.is_empty() {
                    break Ok(());
                }
                match tls.writer().write(next) {
                    Ok(0) => break Ok(()),
                    Ok(count) => output.advance(count),
                    Err(error) => break Err(error),
                }
            } else {
                let next = output.next(free);
                if next.is_empty() {
                    break Ok(());
                }
                match raw.write(next) {
                    Ok(count) => {
                        progress |= count > 0;
                        output.advance(count);
                    }
                    Err(error) => break Err(error),
                }
            }
        };
        match result {
            Err(error) if !would_block(&error) => Err(error),
            _ => Ok(progress),
        }
    }

    /// Says that nothing more comes.
    pub fn end(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            let _ = tls.write_tls(&mut Raw(&self.socket));
        }
        // Fails only where the other side is gone already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
