//! What a change shall make of the chains, as it is drawn.

use super::*;

impl Simulation {
    /// A change begins, of one disk or of all at once.
    pub(crate) fn begin_change(&mut self) {
        if self.change.is_some() || self.gives_up() {
            return;
        }
        let disks: Vec<usize> = match self.random.one_in(2) {
            true => (0..self.disks.len()).collect(),
            false => vec![self.random.below(self.disks.len())],
        };
        let mut parts = Vec::new();
        for disk in disks {
            let wanted = self.draw(disk);
            parts.extend(self.part(disk, wanted));
        }
        let is_edited = |part: &Part| part.wanted != part.before;
        if !parts.iter().any(is_edited) {
            return self.forget_newcomers();
        }
        let mut going = Going::new(parts);
        if self.random.one_in(5) {
            use ChangeStep::*;
            going.fails_at = Some(self.random.pick(&[Prepare, Leave, Enter, Commit]));
        }
        let wants_trial = !self.random.one_in(4);
        let comes = going.parts.iter().any(|part| part.wanted.iter().any(|slot| slot.is_fresh));
        going.has_trial =
            wants_trial && comes && going.parts.iter().all(|part| part.outline.can_be_taken_back());
        self.coverage.count("chain change: begun");
        if going.parts.len() > 1 {
            self.coverage.count("chain change: of several disks");
        }
        for part in &going.parts {
            self.trace.add(
                self.now_ns,
                format_args!("disk {}: {:?} becomes {:?}", part.disk, part.before, part.wanted),
            );
        }
        self.change = Some(going);
    }

    /// What a disk's chain shall be.
    pub(super) fn draw(&mut self, at: usize) -> Vec<Wanted> {
        let mut wanted = self.wanted_now(at);
        for _ in 0..self.random.range(1, 3) {
            let random = &mut self.random;
            let disk = &self.disks[at];
            let role_of = |id: SlotId| disk.slots.iter().find(|slot| slot.id == id).map(|s| s.role);
            if random.one_in(3) || wanted.is_empty() {
                let role = random.pick(&Role::ALL);
                // What changes data would make what is there unreadable; grants are given only
                // at the start.
                let is_there = disk.slots.iter().chain(&disk.left).any(|slot| slot.role == role);
                if is_there || matches!(role, Role::Changer | Role::Splitter) {
                    continue;
                }
                let policy = self.plan.policy_of(role);
                let slot = self.disks[at].new_slot(role, policy, 0);
                wanted.push(Wanted { id: slot.id, order: slot.order, is_fresh: true });
                self.disks[at].left.push(slot);
                continue;
            }
            // Two of one class, of which neither changes anything, change places.
            let mut alike = wanted
                .iter_mut()
                .filter(|slot| matches!(role_of(slot.id), Some(Role::Watcher | Role::Observer)));
            if let (Some(first), Some(second)) = (alike.next(), alike.next())
                && random.one_in(2)
            {
                first.order = second.order + 1;
                continue;
            }
            let place = random.below(wanted.len());
            let Some(role) = role_of(wanted[place].id) else { continue };
            match random.below(4) {
                0 if role != Role::Changer => drop(wanted.remove(place)),
                1 | 2 if matches!(role, Role::Watcher | Role::Observer) => {
                    wanted[place].order = random.below(4) as i32;
                }
                _ if role != Role::Splitter => wanted[place].is_fresh = true,
                _ => {}
            }
        }
        wanted
    }

    pub(super) fn wanted_now(&self, at: usize) -> Vec<Wanted> {
        let slots = self.disks[at].slots.iter();
        slots.map(|slot| Wanted { id: slot.id, order: slot.order, is_fresh: false }).collect()
    }

    pub(super) fn part(&self, at: usize, wanted: Vec<Wanted>) -> Option<Part> {
        let disk = &self.disks[at];
        let spec_of = |wanted: &Wanted| {
            let mut slots = disk.slots.iter().chain(&disk.left);
            let slot = slots.find(|slot| slot.id == wanted.id).expect("a slot that is known");
            SlotSpec { order: wanted.order, ..slot.spec() }
        };
        let make =
            |generation, specs| Chain::new(Generation(generation), specs, &disk.medium.info());
        let was = make(1, disk.slots.iter().map(|slot| slot.spec()).collect()).ok()?;
        let chain = make(2, wanted.iter().map(spec_of).collect()).ok()?;
        let sorted: Vec<Wanted> =
            chain.slots().map(|(index, _)| wanted[chain.source_index(index)]).collect();
        let mut part = Part {
            disk: at,
            before: self.wanted_now(at),
            outline: Outline::new(&was, &chain, [], []),
            chain: Arc::new(chain),
            wanted: sorted,
            replaced: Vec::new(),
            leaving: Vec::new(),
        };
        let is_there = |id: SlotId| disk.slots.iter().any(|slot| slot.id == id);
        let present = disk.slots.iter().map(|slot| Present {
            spec: slot.spec(),
            has_successor: part.keeps(slot.id) || part.replaces(slot.id),
            leaves_for_good: slot.gaps.is_some() || slot.role == Role::Splitter,
        });
        let present: Vec<Present> = present.collect();
        let comes: Vec<SlotSpec> =
            part.wanted.iter().filter(|slot| !is_there(slot.id)).map(spec_of).collect();
        part.outline = Outline::new(&was, &part.chain, &present, &comes);
        for slot in &disk.slots {
            if part.replaces(slot.id) {
                if part.outline.may_await_successor() {
                    part.replaced.push(slot.instance);
                }
            } else if !part.keeps(slot.id) && Outline::may_go_past(&slot.spec()) {
                part.leaving.push(slot.instance);
            }
        }
        Some(part)
    }

    pub(super) fn forget_newcomers(&mut self) {
        for disk in &mut self.disks {
            let written = &disk.written;
            disk.left.retain(|slot| written.iter().any(|(id, _)| *id == slot.id));
        }
    }
}
