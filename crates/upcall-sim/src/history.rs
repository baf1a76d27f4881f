//! What a disk may hold, judged from what its guest saw and from nothing else.
//!
//! Always true: a value is allowed for a sector if some order of the guest's requests gives
//! it, in which each request takes effect between its submission and its completion; and
//! after a power cut, if what a flush (or FUA) covered is among them. A read must return
//! an allowed value; one that met no write narrows what is allowed to what it saw, for
//! nothing may change by itself.

use std::collections::BTreeMap;

use crate::stamp::Content;

/// A value that a sector may hold.
#[derive(Clone, Copy, Debug)]
struct Value {
    content: Content,
    /// The request that wrote it.
    request: u64,
    /// When its request completed; until then it may take effect at any time.
    ended: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct Sector {
    /// What a read may find.
    now: Vec<Value>,
    /// What may be found after a power cut.
    cut: Vec<Value>,
}

#[derive(Debug)]
struct Write {
    begun: u64,
    sectors: std::ops::Range<usize>,
}

#[derive(Debug)]
struct Read {
    first: usize,
    /// By sector: what it may return.
    allowed: Vec<Vec<Content>>,
    /// By sector: no write was in flight with it.
    quiet: Vec<bool>,
}

/// A write that completed and that no flush has covered yet.
#[derive(Debug)]
struct Unflushed {
    request: u64,
    begun: u64,
    ended: u64,
    sectors: std::ops::Range<usize>,
}

/// See the module.
#[derive(Debug)]
pub struct History {
    /// Counts what the guest did and saw.
    moment: u64,
    sectors: Vec<Sector>,
    writes: BTreeMap<u64, Write>,
    reads: BTreeMap<u64, Read>,
    flushes: BTreeMap<u64, u64>,
    unflushed: Vec<Unflushed>,
}

/// Takes out what was there before `request` began, if that has completed.
fn overwrite(values: &mut Vec<Value>, request: u64, begun: u64) {
    values
        .retain(|value| value.request == request || value.ended.is_none_or(|ended| ended > begun));
}

impl History {
    /// A disk of so many sectors, all of zeroes.
    pub fn new(sectors: usize) -> History {
        let zero = Value { content: Content::Zero, request: 0, ended: Some(0) };
        let sector = Sector { now: vec![zero], cut: vec![zero] };
        History {
            moment: 0,
            sectors: vec![sector; sectors],
            writes: BTreeMap::new(),
            reads: BTreeMap::new(),
            flushes: BTreeMap::new(),
            unflushed: Vec::new(),
        }
    }

    fn next(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    /// A request that changes sectors is submitted; `content` says to what.
    pub fn begin_write(
        &mut self,
        request: u64,
        sectors: std::ops::Range<usize>,
        content: impl Fn(usize) -> Content,
    ) {
        let begun = self.next();
        for sector in sectors.clone() {
            let value = Value { content: content(sector), request, ended: None };
            self.sectors[sector].now.push(value);
            self.sectors[sector].cut.push(value);
            for read in self.reads.values_mut() {
                if let Some(at) = sector.checked_sub(read.first)
                    && at < read.allowed.len()
                {
                    read.allowed[at].push(value.content);
                    read.quiet[at] = false;
                }
            }
        }
        self.writes.insert(request, Write { begun, sectors });
    }

    /// It completed; `durable`: with write-through. One that failed may have taken effect.
    pub fn end_write(&mut self, request: u64, ok: bool, durable: bool) {
        let ended = self.next();
        let Write { begun, sectors } = self.writes.remove(&request).expect("a write that began");
        for sector in sectors.clone() {
            let Sector { now, cut } = &mut self.sectors[sector];
            for value in now.iter_mut().chain(cut.iter_mut()) {
                if value.request == request {
                    value.ended = Some(ended);
                }
            }
            if ok {
                overwrite(now, request, begun);
            }
            if ok && durable {
                overwrite(cut, request, begun);
            }
        }
        if ok && !durable {
            self.unflushed.push(Unflushed { request, begun, ended, sectors });
        }
    }

    pub fn begin_read(&mut self, request: u64, sectors: std::ops::Range<usize>) {
        self.next();
        let first = sectors.start;
        let range = &self.sectors[sectors];
        let allowed =
            range.iter().map(|s| s.now.iter().map(|value| value.content).collect()).collect();
        let quiet = range.iter().map(|s| s.now.iter().all(|v| v.ended.is_some())).collect();
        self.reads.insert(request, Read { first, allowed, quiet });
    }

    /// It completed with these contents; None: it failed.
    pub fn end_read(&mut self, request: u64, contents: Option<&[Content]>) -> Result<(), String> {
        self.next();
        let read = self.reads.remove(&request).expect("a read that began");
        for (at, content) in contents.unwrap_or_default().iter().enumerate() {
            let sector = read.first + at;
            if !read.allowed[at].contains(content) {
                return Err(format!(
                    "read {request} of sector {sector} returned {content:?}; allowed: {:?}",
                    read.allowed[at]
                ));
            }
            if read.quiet[at] {
                self.sectors[sector]
                    .now
                    .retain(|value| value.content == *content || value.ended.is_none());
            }
        }
        Ok(())
    }

    pub fn begin_flush(&mut self, request: u64) {
        let begun = self.next();
        self.flushes.insert(request, begun);
    }

    /// It completed. After one that failed, nobody knows what of earlier writes is durable,
    /// and no later flush changes that.
    pub fn end_flush(&mut self, request: u64, ok: bool) {
        let ended = self.next();
        let begun = self.flushes.remove(&request).expect("a flush that began");
        let until = if ok { begun } else { ended };
        let sectors = &mut self.sectors;
        self.unflushed.retain(|write| {
            if write.ended > until {
                return true;
            }
            if ok {
                for sector in write.sectors.clone() {
                    overwrite(&mut sectors[sector].cut, write.request, write.begun);
                }
            }
            false
        });
    }

    /// A flush failed and nobody was told: what is not durable now may never be.
    pub fn doubt(&mut self) {
        self.unflushed.clear();
    }

    /// A request will never complete: the guest has forgotten it.
    pub fn forget(&mut self, request: u64) {
        if self.writes.contains_key(&request) {
            self.end_write(request, false, false);
        }
        self.reads.remove(&request);
        self.flushes.remove(&request);
    }

    /// The power was cut, and the guest has forgotten all requests.
    pub fn cut_power(&mut self) {
        assert!(self.writes.is_empty() && self.reads.is_empty() && self.flushes.is_empty());
        self.next();
        self.unflushed.clear();
        for sector in &mut self.sectors {
            sector.now.clone_from(&sector.cut);
        }
    }

    /// Nothing is in flight: whether a sector may hold this.
    pub fn check(&self, sector: usize, content: Content) -> Result<(), String> {
        let now = &self.sectors[sector].now;
        if now.iter().any(|value| value.content == content) {
            return Ok(());
        }
        Err(format!("sector {sector} holds {content:?}; allowed: {now:?}"))
    }

    /// What a sector holds, if only one value is allowed.
    pub fn only(&self, sector: usize) -> Option<Content> {
        let now = &self.sectors[sector].now;
        let first = now.first()?.content;
        now.iter().all(|value| value.content == first).then_some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: Content = Content::Zero;

    fn value(request: u64) -> Content {
        Content::Stamp { disk: 0, sector: 0, request }
    }

    fn write(history: &mut History, request: u64) {
        history.begin_write(request, 0..1, |_| value(request));
        history.end_write(request, true, false);
    }

    fn read(history: &mut History, content: Content) -> bool {
        history.begin_read(99, 0..1);
        history.end_read(99, Some(&[content])).is_ok()
    }

    #[test]
    fn a_read_returns_the_last_write_or_one_in_flight() {
        let mut history = History::new(1);
        write(&mut history, 1);
        assert!(!read(&mut history, ZERO) && read(&mut history, value(1)));
        history.begin_write(2, 0..1, |_| value(2));
        assert!(read(&mut history, value(1)) && read(&mut history, value(2)));
        history.end_write(2, true, false);
        assert!(!read(&mut history, value(1)));
    }

    #[test]
    fn of_writes_in_flight_together_either_is_last_until_a_read_has_seen_which() {
        let mut history = History::new(1);
        history.begin_write(1, 0..1, |_| value(1));
        history.begin_write(2, 0..1, |_| value(2));
        history.end_write(1, true, false);
        history.end_write(2, true, false);
        assert!(!read(&mut history, ZERO));
        assert!(read(&mut history, value(1)));
        assert!(!read(&mut history, value(2)), "it changed by itself");
    }

    #[test]
    fn a_read_in_flight_with_a_write_returns_either() {
        for content in [ZERO, value(1)] {
            let mut history = History::new(1);
            history.begin_read(50, 0..1);
            write(&mut history, 1);
            assert!(history.end_read(50, Some(&[content])).is_ok());
            assert!(!read(&mut history, ZERO));
        }
    }

    #[test]
    fn what_failed_may_be_there_or_not() {
        let mut history = History::new(1);
        history.begin_write(1, 0..1, |_| value(1));
        history.end_write(1, false, false);
        assert!(history.check(0, ZERO).is_ok() && history.check(0, value(1)).is_ok());
        write(&mut history, 2);
        assert!(history.check(0, value(1)).is_err());
    }

    #[test]
    fn a_power_cut_leaves_what_was_flushed_or_came_later() {
        let mut history = History::new(1);
        write(&mut history, 1);
        history.begin_flush(7);
        write(&mut history, 2);
        history.end_flush(7, true);
        history.cut_power();
        assert!(history.check(0, ZERO).is_err());
        assert!(history.check(0, value(1)).is_ok() && history.check(0, value(2)).is_ok());
    }

    #[test]
    fn a_failed_flush_makes_nothing_durable_and_no_later_one_does() {
        let mut history = History::new(1);
        write(&mut history, 1);
        history.begin_flush(7);
        history.end_flush(7, false);
        history.begin_flush(8);
        history.end_flush(8, true);
        history.cut_power();
        assert!(history.check(0, ZERO).is_ok());
        let mut history = History::new(1);
        history.begin_write(1, 0..1, |_| value(1));
        history.end_write(1, true, true);
        history.cut_power();
        assert!(history.check(0, ZERO).is_err(), "written through");
    }
}
