//! A turn of a filter host: what it takes, what its filter does with it, and what it checks.

use super::*;

/// One turn of a process at a place.
pub(super) struct Turn<'a, 'b> {
    pub(super) process: &'a mut Process,
    pub(super) place: usize,
    pub(super) world: &'a mut World,
    pub(super) view: &'a View<'a>,
    pub(super) tools: &'a mut Tools<'b>,
    pub(super) died: bool,
}

impl Turn<'_, '_> {
    fn desk(&mut self) -> &mut Desk {
        &mut self.process.desks[self.place]
    }

    fn host(&self) -> usize {
        self.process.places[self.place].host
    }

    /// Whether it dies here.
    fn reaches(&mut self, step: Step) -> bool {
        self.died |= self.process.doom == Some(step);
        self.died
    }

    fn note(&mut self, what: std::fmt::Arguments) {
        let Turn { process, place, view, tools, .. } = self;
        let Place { engine, host } = process.places[*place];
        let name = process.role.name();
        tools
            .trace
            .add(view.now_ns, format_args!("  {name} (engine {engine}, host {host}) {what}"));
    }

    pub(super) fn act(&mut self) -> bool {
        let held = self.desk().held.len();
        if held > 0 && (self.tools.hurries || self.tools.random.one_in(3)) {
            let at = self.tools.random.below(held);
            if matches!(self.desk().held[at].why, Why::Slow) {
                let Held { entry, .. } = self.desk().held.swap_remove(at);
                self.note(format_args!("answers {:#x}, which it held", entry.token));
                self.go_on(&entry);
                return true;
            }
        }
        let host = self.host();
        let Some(entry) = self.world.hosts[host].take() else { return false };
        match entry.kind {
            submission_kind::START => self.start(&entry),
            submission_kind::DONE => self.done(&entry),
            submission_kind::CANCEL => self.cancelled(&entry),
            submission_kind::ISSUED => self.result(&entry),
            kind => panic!("a submission of kind {kind}"),
        }
        true
    }

    /// Writes what no filter host of ours would write.
    pub(super) fn babble(&mut self) -> bool {
        self.process.nonsense -= 1;
        self.process.babbled = true;
        let host = self.host();
        let random = &mut self.tools.random;
        // A delivery that there never was: serials do not come so far.
        let token = random.number() | 1 << 63;
        let mut entry = Completion { token, cookie: random.number(), ..Completion::default() };
        entry.kind = random.pick(&[
            completion_kind::VERDICT,
            completion_kind::HELD,
            completion_kind::ISSUE,
            0,
            77,
        ]);
        entry.code = random.number() as u8;
        entry.status = random.number() as i32;
        if entry.kind == completion_kind::ISSUE {
            // Too long, whoever it is from.
            (entry.offset, entry.length) = (random.number(), u32::MAX);
        }
        self.world.hosts[host].say(entry);
        self.note(format_args!("says nonsense"));
        true
    }

    // ------------------------------------------------------------------ checks

    /// Rules of the chain that every delivery keeps.
    fn check(&mut self, entry: &Submission) {
        let desk = self.desk();
        let again = desk.open.insert(number(entry), *entry);
        assert!(again.is_none(), "{entry:?} is delivered and {again:?} is not answered");
        desk.order.push(*entry);
        if is_retry(entry) {
            let same = |owed: &Submission| {
                (owed.kind, number(owed), owed.op) == (entry.kind, number(entry), entry.op)
                    && (owed.offset, owed.length) == (entry.offset, entry.length)
            };
            if let Some(at) = desk.owed.iter().position(same) {
                assert!(at >= desk.owed_at, "{entry:?} comes again after one that had come later");
                desk.owed_at = at + 1;
                self.tools.coverage.count("seen: delivered again");
            }
        }
        self.desk().forget_old();
    }

    /// The data of a request as the guest sees it.
    fn plain(&self, entry: &Submission) -> Vec<Bytes> {
        let sectors = sectors_of(entry);
        let read = |sector: u64| {
            let at = entry.data as usize + (sector - sectors.start) as usize * SECTOR;
            let mut bytes = self.world.arena.read_array(at).expect("data in the arena");
            for key in self.view.keys_above {
                change(&mut bytes, *key, sector as u32);
            }
            bytes
        };
        sectors.clone().map(read).collect()
    }

    /// The data of a write is what the guest wrote, whole; and it comes once.
    fn check_write(&mut self, entry: &Submission) {
        if op_of(entry) != Op::Write || entry.data == NO_DATA {
            return;
        }
        let first = sectors_of(entry).start;
        if first >= self.view.guests as u64 {
            return;
        }
        for (number, bytes) in self.plain(entry).iter().enumerate() {
            let sector = first + number as u64;
            let content = parse(bytes);
            let covers = |request: &Request| request.sectors.contains(&(sector as usize));
            let good = match content {
                Content::Stamp { disk, sector: at, request } => {
                    let open = self.view.open.get(&request);
                    let whose = (disk, u64::from(at)) == (self.view.disk, sector);
                    whose && open.is_some_and(covers)
                }
                Content::Zero => self.view.open.values().any(|request| {
                    matches!(request.kind, Kind::WriteZeroes { .. }) && covers(request)
                }),
                Content::Garbage => false,
            };
            assert!(
                good,
                "a {} is given {content:?} as sector {sector} of {entry:?}, which nobody in \
                 flight writes there",
                self.process.role.name()
            );
        }
        if let Content::Stamp { request, .. } = parse(&self.plain(entry)[0]) {
            let answered = self.desk().answered.contains(&(request, entry.offset));
            assert!(
                !answered,
                "a {} gets request {request} again, which it had answered: {entry:?}",
                self.process.role.name()
            );
            self.desk().writes.insert(number(entry), (request, entry.offset));
            let new = self.desk().seen.insert((request, entry.offset));
            let new = new
                && !self.view.seen_before.contains(&request)
                && !self.desk().earlier.contains(&(request, entry.offset));
            assert!(
                new || is_retry(entry),
                "a {} sees request {request} twice, unmarked: {entry:?}",
                self.process.role.name()
            );
        }
    }

    // ----------------------------------------------------------------- answers

    /// It has got or let go of a request that changes the disk.
    fn note_change(&mut self, entry: &Submission, ended: bool) {
        if op_of(entry).is_modification() {
            let (host, sectors) = (self.host(), sectors_of(entry));
            self.process.changes.push(Change { host, sectors, ended });
        }
    }

    fn answer(&mut self, to: &Submission, code: u8, status: i32, cookie: u64) {
        self.note(format_args!("answers {:#x} with verdict {code}, status {status}", to.token));
        if to.kind == submission_kind::DONE || code == verdict::PASS {
            self.note_change(to, true);
        }
        self.desk().open.remove(&number(to));
        if let Some(write) = self.desk().writes.remove(&number(to)) {
            self.desk().answered.insert(write);
        }
        let host = self.host();
        self.world.hosts[host].answer_with(to, code, status, cookie);
    }

    fn hold(&mut self, entry: &Submission, why: Why) {
        self.note(format_args!("holds {:#x}", entry.token));
        let host = self.host();
        self.world.hosts[host].hold(entry);
        self.desk().held.push(Held { entry: *entry, why });
    }

    /// Passes a request on, and watches it.
    fn watch(&mut self, entry: &Submission) {
        let cookie = self.tools.random.number();
        let old = self.desk().watching.insert(number(entry), (cookie, *entry));
        assert!(old.is_none(), "{entry:?} comes down, and {old:?} has not come up");
        self.answer(entry, verdict::WATCH, 0, cookie);
    }

    // -------------------------------------------------------------- a way down

    fn start(&mut self, entry: &Submission) {
        self.note(format_args!("takes {entry:?}"));
        self.check(entry);
        self.check_write(entry);
        self.note_change(entry, false);
        if self.process.fails {
            // Its trial ends with that, and nobody hears it, unless the trial has just been stood.
            self.process.babbled = true;
            return self.answer(entry, verdict::FAIL, EIO, 0);
        }
        if self.reaches(Step::Taken) {
            return;
        }
        let slow = !self.tools.hurries
            && match self.process.role {
                Role::Holder => self.tools.random.one_in(2),
                Role::Changer => self.tools.random.one_in(6),
                _ => false,
            };
        if slow {
            self.hold(entry, Why::Slow);
            self.reaches(Step::Held);
            return;
        }
        self.go_on(entry);
    }

    /// Does with a request what the filter is there for, and answers.
    fn go_on(&mut self, entry: &Submission) {
        if entry.kind == submission_kind::DONE {
            return self.finish(entry);
        }
        let op = op_of(entry);
        match self.process.role {
            Role::Changer if op == Op::Write => {
                if !self.change(entry, Step::HalfChanged, Step::Changed) {
                    return;
                }
                self.answer(entry, verdict::PASS, 0, 0);
            }
            Role::Changer => self.watch(entry),
            Role::Splitter | Role::Journal => return self.issue(entry),
            Role::Cache => self.look_up(entry),
            _ if self.tools.random.one_in(2) => self.watch(entry),
            _ => self.answer(entry, verdict::PASS, 0, 0),
        }
        self.reaches(Step::Answered);
    }

    /// Changes the data; false if it died over that.
    fn change(&mut self, entry: &Submission, half: Step, whole: Step) -> bool {
        let sectors = sectors_of(entry);
        let dies_at = match self.process.doom == Some(half) {
            true => Some(sectors.start + self.tools.random.below(sectors.clone().count()) as u64),
            false => None,
        };
        for sector in sectors.clone() {
            let at = entry.data as usize + (sector - sectors.start) as usize * SECTOR;
            let mut bytes: Bytes = self.world.arena.read_array(at).expect("data in the arena");
            change(&mut bytes, self.process.key, sector as u32);
            let mut length = SECTOR;
            if dies_at == Some(sector) {
                length = self.tools.random.below(SECTOR + 1);
            }
            self.world.arena.write(at, &bytes[..length]).expect("data in the arena");
            if dies_at == Some(sector) {
                self.reaches(half);
                return false;
            }
        }
        !self.reaches(whole)
    }

    fn issue(&mut self, entry: &Submission) {
        assert!(self.desk().issued.len() < ISSUED_MAX, "more requests than the guest has");
        self.hold(entry, Why::Issued);
        if self.reaches(Step::Held) {
            return;
        }
        let id = self.process.next_issue;
        self.process.next_issue += 1;
        let has_data = op_of(entry) == Op::Write;
        let host = self.host();
        let splits = self.process.role == Role::Splitter;
        // All filters of an engine have one arena for this here: each has a part.
        let part = u64::from(splits) * ISSUED_MAX as u64;
        let at = (part + id % ISSUED_MAX as u64) * ISSUE_ROOM;
        let (disk, offset, length) = match splits {
            true => (1, entry.offset, entry.length),
            false => {
                let own = self.view.guests as u64 + id % OWN_SECTORS as u64;
                (0, own * SECTOR as u64, SECTOR as u32)
            }
        };
        if has_data {
            let mut bytes = vec![id as u8; length as usize];
            if splits {
                self.world.arena.read(entry.data as usize, &mut bytes).expect("data");
            }
            self.world.issue_arena.write(at as usize, &bytes).expect("room");
        }
        self.desk().issued.insert(id, *entry);
        self.world.hosts[host].say(Completion {
            kind: completion_kind::ISSUE,
            code: entry.op,
            token: id,
            offset,
            length,
            data: if has_data { at } else { NO_DATA },
            disk,
            ..Completion::default()
        });
        self.reaches(Step::Issued);
    }

    /// A request that it issued has ended.
    fn result(&mut self, entry: &Submission) {
        let waiting = self.desk().issued.remove(&entry.token);
        let Some(waiting) = waiting else {
            panic!("{entry:?} is told of a request that was not issued in this life");
        };
        self.note(format_args!("is told that {} ended with {}", entry.token, entry.status));
        if self.reaches(Step::ResultTaken) {
            return;
        }
        let held = &mut self.desk().held;
        let Some(at) = held.iter().position(|held| held.entry.token == waiting.token) else {
            // It was cancelled, and answered then.
            return;
        };
        held.swap_remove(at);
        match entry.status {
            0 => self.answer(&waiting, verdict::PASS, 0, 0),
            status => self.answer(&waiting, verdict::FAIL, status, 0),
        }
        self.reaches(Step::Answered);
    }

    fn cancelled(&mut self, entry: &Submission) {
        self.note(format_args!("is to let go of {:#x}", entry.token));
        self.tools.coverage.count("seen: cancel of a held request");
        if self.reaches(Step::CancelTaken) {
            return;
        }
        let held = &mut self.desk().held;
        // If it is not there, the answer and the cancel have crossed.
        if let Some(at) = held.iter().position(|held| held.entry.token == entry.token) {
            let Held { entry, .. } = held.swap_remove(at);
            match entry.kind {
                submission_kind::DONE => self.finish(&entry),
                _ => self.answer(&entry, verdict::FAIL, ECANCELED, 0),
            }
        }
    }

    // ---------------------------------------------------------------- a way up

    fn done(&mut self, entry: &Submission) {
        self.note(format_args!("is told of the end of {entry:?}"));
        self.check(entry);
        match self.desk().watching.get(&number(entry)).copied() {
            Some((cookie, _)) => {
                assert_eq!(entry.cookie, cookie, "the context of {entry:?}");
            }
            None => {
                assert!(is_retry(entry), "{entry:?} comes up, and is not watched in this life");
                assert_eq!(entry.cookie, 0, "the context of a dead instance in {entry:?}");
            }
        }
        if self.reaches(Step::DoneTaken) {
            return;
        }
        let slow = !self.tools.hurries
            && match self.process.role {
                Role::Holder => self.tools.random.one_in(3),
                Role::Changer => self.tools.random.one_in(6),
                _ => false,
            };
        if slow {
            return self.hold(entry, Why::Slow);
        }
        self.finish(entry);
    }

    fn finish(&mut self, entry: &Submission) {
        let op = op_of(entry);
        let changes = self.process.role == Role::Changer && op == Op::Read;
        if changes && entry.status == 0 {
            let lives = self.change(entry, Step::DoneHalfChanged, Step::DoneChanged);
            if !lives {
                return;
            }
        }
        if self.process.role == Role::Cache {
            self.learn(entry);
        }
        self.desk().watching.remove(&number(entry));
        self.answer(entry, verdict::PASS, entry.status, 0);
        self.reaches(Step::DoneAnswered);
    }

    // ------------------------------------------------------------------- cache

    fn invalidate(&mut self, entry: &Submission, begins: bool) {
        for sector in sectors_of(entry) {
            let cached = self.process.cache.entry((self.view.disk, sector)).or_default();
            (cached.bytes, cached.epoch) = (None, cached.epoch + 1);
            match begins {
                true => cached.writes += 1,
                false => cached.writes -= 1,
            }
        }
    }

    fn look_up(&mut self, entry: &Submission) {
        match op_of(entry) {
            op if op.is_modification() => self.invalidate(entry, true),
            Op::Read => {
                let sectors: Vec<u64> = sectors_of(entry).collect();
                let disk = self.view.disk;
                let cache = &mut self.process.cache;
                let known: Option<Vec<Bytes>> = sectors
                    .iter()
                    .map(|sector| {
                        let cached = cache.get(&(disk, *sector))?;
                        cached.bytes.filter(|_| cached.writes == 0)
                    })
                    .collect();
                if let Some(known) = known {
                    for (number, bytes) in known.iter().enumerate() {
                        let at = entry.data as usize + number * SECTOR;
                        self.world.arena.write(at, bytes).expect("data in the arena");
                    }
                    self.tools.coverage.count("seen: read answered by a filter");
                    return self.answer(entry, verdict::DONE, 0, 0);
                }
                let epochs = sectors
                    .iter()
                    .map(|sector| cache.entry((disk, *sector)).or_default().epoch)
                    .collect();
                self.process.reads.insert((self.place, number(entry)), epochs);
            }
            _ => {}
        }
        self.watch(entry);
    }

    fn learn(&mut self, entry: &Submission) {
        let known = self.desk().watching.contains_key(&number(entry));
        match op_of(entry) {
            op if op.is_modification() && known => self.invalidate(entry, false),
            op if op.is_modification() => {
                // It came down to an instance that is dead.
                for sector in sectors_of(entry) {
                    let cached = self.process.cache.entry((self.view.disk, sector)).or_default();
                    (cached.bytes, cached.epoch) = (None, cached.epoch + 1);
                }
            }
            Op::Read => {
                let epochs = self.process.reads.remove(&(self.place, number(entry)));
                let Some(epochs) = epochs.filter(|_| known && entry.status == 0) else { return };
                for (sector, epoch) in sectors_of(entry).zip(epochs) {
                    let at = entry.data as usize + (sector * SECTOR as u64 - entry.offset) as usize;
                    let bytes = self.world.arena.read_array(at).expect("data in the arena");
                    let cached = self.process.cache.entry((self.view.disk, sector)).or_default();
                    if cached.epoch == epoch && cached.writes == 0 {
                        cached.bytes = Some(bytes);
                    }
                }
            }
            _ => {}
        }
    }
}
