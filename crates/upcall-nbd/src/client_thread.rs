//! A thread that speaks with clients: many, none of which can keep it waiting.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::Timespec;

use crate::connection::{Connection, Context, RECEIVED_MAX, Wish};
use crate::extents::Question;
use crate::listener::Listener;
use crate::queue::{Inbox, News};
use crate::server::{Level, Shared, now_ns};

/// What events are about: connections have larger numbers.
const INBOX: u64 = 0;
const LISTENER: u64 = 1;
const CONNECTION: u64 = 2;
/// Events taken at a time.
const EVENTS: usize = 64;
/// Connections accepted at a time.
const ACCEPTED: usize = 16;
/// How long nothing is accepted after that has failed.
const ACCEPT_PAUSE_NS: u64 = 100_000_000;
/// How long clients may take for what is theirs, once nothing more comes from the worker.
const HURRY_NS: u64 = 2_000_000_000;

struct Entry {
    connection: Connection,
    interest: EventFlags,
    deadline_ns: Option<u64>,
}

/// See the module.
pub(crate) struct ClientThread {
    index: usize,
    shared: Arc<Shared>,
    listener: Option<Listener>,
    questions: Sender<Question>,
    epoll: OwnedFd,
    entries: HashMap<u64, Entry>,
    /// Not later than the first deadline of all.
    deadline_ns: u64,
    accepts_from_ns: Option<u64>,
    /// To be run although nothing has happened to them.
    again: Vec<u64>,
    ends: bool,
    scratch: Vec<u8>,
}

impl ClientThread {
    pub fn new(
        index: usize,
        shared: Arc<Shared>,
        listener: Option<Listener>,
        questions: Sender<Question>,
    ) -> io::Result<ClientThread> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let number = EventData::new_u64(INBOX);
        epoll::add(&epoll, &shared.inboxes[index], number, EventFlags::IN)?;
        if let Some(listener) = &listener {
            epoll::add(&epoll, listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        }
        Ok(ClientThread {
            index,
            shared,
            listener,
            questions,
            epoll,
            entries: HashMap::new(),
            deadline_ns: u64::MAX,
            accepts_from_ns: None,
            again: Vec::new(),
            ends: false,
            scratch: vec![0; RECEIVED_MAX],
        })
    }

    fn inbox(&self) -> &Inbox {
        &self.shared.inboxes[self.index]
    }

    /// Serves until the server ends and all connections have.
    pub fn run(mut self) {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        let mut due: Vec<u64> = Vec::new();
        loop {
            let news = self.inbox().take();
            self.handle_news(news, &mut due);
            due.append(&mut self.again);
            self.find_overdue(&mut due);
            due.sort_unstable();
            due.dedup();
            for id in due.drain(..) {
                self.run_connection(id);
            }
            if self.ends && self.entries.is_empty() {
                return;
            }
            let sleeps = self.again.is_empty() && self.inbox().before_sleep();
            let timeout = if sleeps { self.timeout() } else { Some(Timespec::default()) };
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    let text = format!("NBD clients can be served no longer: {errno}");
                    self.shared.log(Level::Error, &text);
                    return;
                }
            }
            self.inbox().after_sleep();
            for event in events.drain(..) {
                let (number, flags) = (event.data.u64(), event.flags);
                match number {
                    INBOX => {}
                    LISTENER => self.accept(),
                    _ => {
                        self.notice(number - CONNECTION, flags);
                        due.push(number - CONNECTION);
                    }
                }
            }
        }
    }

    /// A hang-up is not to be asked for, and would come again for ever where nothing is read.
    fn notice(&mut self, id: u64, flags: EventFlags) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let reads = entry.interest.contains(EventFlags::IN);
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) && !reads {
            entry.connection.hung_up();
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        let at = self.deadline_ns.min(self.accepts_from_ns.unwrap_or(u64::MAX));
        (at != u64::MAX).then(|| {
            let left = at.saturating_sub(now_ns());
            Timespec { tv_sec: (left / 1_000_000_000) as i64, tv_nsec: (left % 1_000_000_000) as _ }
        })
    }

    fn handle_news(&mut self, news: News, due: &mut Vec<u64>) {
        for socket in news.sockets {
            self.add(socket, due);
        }
        let ClientThread { shared, questions, scratch, entries, .. } = self;
        if !news.answers.is_empty() {
            let now_ns = now_ns();
            let context = Context { shared, thread: self.index, questions, scratch, now_ns };
            for (ticket, answer) in news.answers {
                if let Some(entry) = entries.get_mut(&ticket.connection) {
                    entry.connection.handle_answer(ticket.job, answer, &context);
                    due.push(ticket.connection);
                }
            }
        }
        if news.ends && !self.ends {
            self.ends = true;
            // Nobody is let in, and the address is free for who comes after us.
            self.listener = None;
            self.accepts_from_ns = None;
            self.entries.values_mut().for_each(|entry| entry.connection.end());
            due.extend(self.entries.keys());
        }
        if news.hurries {
            let until_ns = now_ns() + HURRY_NS;
            self.entries.values_mut().for_each(|entry| entry.connection.hurry(until_ns));
            due.extend(self.entries.keys());
        }
    }

    fn find_overdue(&mut self, due: &mut Vec<u64>) {
        let now = now_ns();
        if self.accepts_from_ns.is_some_and(|from| now >= from) {
            self.accepts_from_ns = None;
            self.listen(EventFlags::IN);
        }
        if now < self.deadline_ns {
            return;
        }
        self.deadline_ns = u64::MAX;
        for (id, entry) in &self.entries {
            match entry.deadline_ns {
                Some(at) if at <= now => due.push(*id),
                Some(at) => self.deadline_ns = self.deadline_ns.min(at),
                None => {}
            }
        }
    }

    fn run_connection(&mut self, id: u64) {
        let ClientThread { shared, questions, scratch, entries, .. } = self;
        let Some(entry) = entries.get_mut(&id) else { return };
        let now_ns = now_ns();
        let mut context = Context { shared, thread: self.index, questions, scratch, now_ns };
        let Some(wish) = entry.connection.run(&mut context) else {
            self.remove(id);
            return;
        };
        entry.deadline_ns = wish.deadline_ns;
        self.deadline_ns = self.deadline_ns.min(wish.deadline_ns.unwrap_or(u64::MAX));
        if wish.again {
            self.again.push(id);
        }
        let interest = interest(wish);
        if interest != entry.interest
            && let Some(socket) = entry.connection.socket()
        {
            entry.interest = interest;
            let number = EventData::new_u64(id + CONNECTION);
            // It is registered, and stays so; this fails only for want of memory.
            if epoll::modify(&self.epoll, socket, number, interest).is_err() {
                entry.connection.hung_up();
                self.again.push(id);
            }
        }
    }

    fn add(&mut self, socket: OwnedFd, due: &mut Vec<u64>) {
        let id = self.shared.next_connection.fetch_add(1, Ordering::Relaxed);
        let ClientThread { shared, questions, scratch, .. } = self;
        let context = Context { shared, thread: self.index, questions, scratch, now_ns: now_ns() };
        let mut connection = Connection::new(id, socket, &context);
        if self.ends {
            connection.end();
        }
        let interest = EventFlags::IN;
        let number = EventData::new_u64(id + CONNECTION);
        let registered =
            connection.socket().map(|socket| epoll::add(&self.epoll, socket, number, interest));
        if let Some(Err(errno)) = registered {
            self.shared.log(Level::Warn, &format!("a client cannot be served: {errno}"));
            self.shared.counts[self.index].fetch_sub(1, Ordering::Relaxed);
            return;
        }
        self.entries.insert(id, Entry { connection, interest, deadline_ns: None });
        due.push(id);
    }

    fn remove(&mut self, id: u64) {
        if self.entries.remove(&id).is_some() {
            self.shared.counts[self.index].fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn listen(&self, interest: EventFlags) {
        if let Some(listener) = &self.listener {
            let number = EventData::new_u64(LISTENER);
            if let Err(errno) = epoll::modify(&self.epoll, listener, number, interest) {
                let text = format!("no more NBD clients can be let in: {errno}");
                self.shared.log(Level::Error, &text);
            }
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTED {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok(Some(socket)) => self.let_in(socket),
                Ok(None) => return,
                Err(error) => {
                    let text = format!("an NBD client could not be let in: {error}");
                    self.shared.log(Level::Warn, &text);
                    // As for want of descriptors: trying again at once would only spin.
                    self.accepts_from_ns = Some(now_ns() + ACCEPT_PAUSE_NS);
                    self.listen(EventFlags::empty());
                    return;
                }
            }
        }
    }

    /// To the thread with the fewest connections.
    fn let_in(&mut self, socket: OwnedFd) {
        let counts = self.shared.counts.iter().map(|count| count.load(Ordering::Relaxed));
        let counts: Vec<usize> = counts.collect();
        if counts.iter().sum::<usize>() >= self.shared.limits.connections {
            let text = format!(
                "an NBD client was turned away: there are {} connections already",
                self.shared.limits.connections
            );
            return self.shared.log(Level::Warn, &text);
        }
        let fewest = (0..counts.len()).min_by_key(|thread| counts[*thread]).unwrap_or(0);
        self.shared.counts[fewest].fetch_add(1, Ordering::Relaxed);
        self.shared.inboxes[fewest].put(|news| news.sockets.push(socket));
    }
}

fn interest(wish: Wish) -> EventFlags {
    let when = |yes: bool, flag: EventFlags| if yes { flag } else { EventFlags::empty() };
    when(wish.read, EventFlags::IN) | when(wish.write, EventFlags::OUT)
}

impl Drop for ClientThread {
    fn drop(&mut self) {
        let count = self.entries.len();
        self.shared.counts[self.index].fetch_sub(count, Ordering::Relaxed);
    }
}
