//! An opened gap file, as the worker uses it.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

use rustix::fs::{AtFlags, Mode, OFlags};
use upcall_block::{Errno, Range, Status};
use upcall_ring::Inbox;

use crate::file::{Damage, GapFile};
use crate::lock::lock;
use crate::map::{ClearId, Gap};
use crate::span::Span;
use crate::syncer::{self, Shared, Syncer};
use crate::{GapError, offline};

/// The caller's name for a mark that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MarkToken(pub u64);

/// What [`Marker::mark`] answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Mark {
    /// All of the range is marked, durably: submit the change.
    Already,
    /// Wait for the [`MarkDone`] with this token.
    Queued,
}

/// A mark that was queued has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkDone {
    /// Whose.
    pub token: MarkToken,
    /// Ok: the range is marked, durably. Else the change must not be submitted: the file could
    /// not be written, or (EINVAL) the range lies behind the disk's end.
    pub status: Status,
}

/// A gap file: what one filter missed of one disk. Owns the thread that writes it. Any thread
/// may use it; what blocks says so.
pub struct Gaps {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// One queue thread's way to mark. Each has its own list of completions and its own doorbell.
pub struct Marker {
    shared: Arc<Shared>,
    inbox: Arc<Inbox<MarkDone>>,
    in_flight: usize,
}

/// A clear in progress; dropped without [`finish`](Self::finish), it clears nothing.
pub struct Clearing<'a> {
    gaps: &'a Gaps,
    id: ClearId,
}

impl Gaps {
    /// Opens the gap file `name` in `folder` for a disk of `capacity` bytes, or makes it, with
    /// nothing marked. Follows no symbolic link; holds a lock on it until dropped. Blocks for IO.
    ///
    /// [`Damage`] says what in the file could not be believed and therefore counts as marked
    /// now; tell the operator.
    pub fn open_in(
        folder: BorrowedFd<'_>,
        name: &str,
        capacity: u64,
    ) -> Result<(Gaps, Damage), GapError> {
        let (map, file, damage) = match open_existing(folder, name)? {
            Some(medium) => {
                let (file, map, damage) = GapFile::open(medium, random_id(name)?, capacity)
                    .map_err(|error| GapError::of_file(name, error))?;
                (map, file, damage)
            }
            None => create(folder, name, capacity)?,
        };
        let gaps =
            Gaps::start(map, file).map_err(|error| GapError::system(name, "start", error))?;
        Ok((gaps, damage))
    }

    fn start(map: crate::map::Map, file: GapFile<impl crate::medium::Medium>) -> io::Result<Gaps> {
        let shared = Arc::new(Shared::new(map));
        let syncer = Syncer { shared: shared.clone(), file };
        let thread = Builder::new().name("gap-sync".into()).spawn(move || syncer.run())?;
        Ok(Gaps { shared, thread: Some(thread) })
    }

    /// A way to mark for one queue thread.
    pub fn marker(&self) -> io::Result<Marker> {
        Ok(Marker { shared: self.shared.clone(), inbox: Arc::new(Inbox::new()?), in_flight: 0 })
    }

    /// What is marked, in the order of the disk, neighbours joined; marks that are still being
    /// written may be among it.
    pub fn ranges(&self) -> Vec<Gap> {
        self.shared.map().ranges()
    }

    /// Begins to clear the granules that lie wholly in the range (`offset` and `length` in
    /// bytes). From now on changes there are marked anew, and what is marked anew is not
    /// cleared by [`Clearing::finish`].
    ///
    /// A change that was told [`Mark::Already`] just before may still be on its way. So the
    /// order of a repair is: begin; wait until every queue thread has looked at its marks
    /// again and each change that was submitted before has ended in the store; copy the
    /// range to whoever missed it; finish.
    pub fn begin_clear(&self, offset: u64, length: u64) -> Clearing<'_> {
        let capacity = self.shared.map().capacity();
        let id = self.shared.begin_clear(Span::covered(offset, length, capacity));
        Clearing { gaps: self, id }
    }

    /// The disk has grown to `capacity` bytes. Blocks until the file has room, durably; only
    /// then may the guest hear of it. What is new is not marked.
    pub fn grow(&self, capacity: u64) -> io::Result<Damage> {
        let (answer, answered) = mpsc::channel();
        self.shared.ask(|asked| asked.grow.push((capacity, answer)));
        answered.recv().unwrap_or_else(|_| Err(ended()))
    }
}

impl Drop for Gaps {
    /// Waits for what was asked for. Markers that are left report failure from now on.
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Marker {
    /// Asks for `range` to be marked. Never blocks for IO; takes no lock and makes no system
    /// call where all of it is marked already.
    pub fn mark(&mut self, token: MarkToken, range: Range) -> Mark {
        let span = Span::touched(range.offset(), u64::from(range.length()));
        if self.shared.known.contains(span) {
            return Mark::Already;
        }
        let inbox = self.inbox.clone();
        let is_taken = self.shared.ask(|asked| {
            asked.marks.push(syncer::Mark { span, token, inbox });
        });
        if !is_taken {
            self.inbox.push(MarkDone { token, status: Err(Errno::EIO) });
        }
        self.in_flight += 1;
        Mark::Queued
    }

    /// Appends marks that have ended, in any order.
    pub fn poll(&mut self, out: &mut Vec<MarkDone>) {
        if self.in_flight > 0 {
            let before = out.len();
            self.inbox.take(out);
            self.in_flight -= out.len() - before;
        }
    }

    /// Marks queued and not yet given out by [`poll`](Self::poll).
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// What becomes readable for a sleeping thread when a mark has ended.
    pub fn doorbell(&self) -> BorrowedFd<'_> {
        self.inbox.doorbell()
    }

    /// The thread is about to sleep; false if there is something to poll.
    pub fn before_sleep(&mut self) -> bool {
        self.in_flight == 0 || self.inbox.before_sleep()
    }
}

impl Clearing<'_> {
    /// Clears what was not marked anew. Blocks until that is durable; after an error, or a
    /// crash, the marks may be there again.
    pub fn finish(self) -> io::Result<()> {
        let (answer, answered) = mpsc::channel();
        self.gaps.shared.ask(|asked| asked.clears.push((self.id, answer)));
        answered.recv().unwrap_or_else(|_| Err(ended()))
    }
}

impl Drop for Clearing<'_> {
    fn drop(&mut self) {
        self.gaps.shared.map().abandon_clear(self.id);
    }
}

fn ended() -> io::Error {
    io::Error::other("the thread that writes the gap file has ended")
}

fn open_existing(folder: BorrowedFd<'_>, name: &str) -> Result<Option<File>, GapError> {
    match offline::open_at(folder, name, OFlags::RDWR)? {
        Some(file) => lock(name, &file, File::try_lock).map(|()| Some(file)),
        None => Ok(None),
    }
}

/// The file gets its name when it is whole: a crash leaves none, or one with nothing marked.
fn create(
    folder: BorrowedFd<'_>,
    name: &str,
    capacity: u64,
) -> Result<(crate::map::Map, GapFile<File>, Damage), GapError> {
    let failed = |error: rustix::io::Errno| GapError::system(name, "create", error.into());
    let unfinished = format!("{name}.new");
    match rustix::fs::unlinkat(folder, &unfinished, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(failed(error)),
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let medium: File = rustix::fs::openat(folder, &unfinished, flags, mode).map_err(failed)?.into();
    lock(name, &medium, File::try_lock)?;
    let (file, map) = GapFile::create(medium, random_id(name)?, capacity)
        .map_err(|error| GapError::of_file(name, error))?;
    rustix::fs::renameat(folder, &unfinished, folder, name).map_err(failed)?;
    rustix::fs::fsync(folder).map_err(failed)?;
    Ok((map, file, Damage::default()))
}

fn random_id(name: &str) -> Result<[u8; 16], GapError> {
    let mut id = [0; 16];
    match rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty()) {
        Ok(_) => Ok(id),
        Err(error) => Err(GapError::system(name, "get random numbers for", error.into())),
    }
}

#[cfg(test)]
mod tests;
