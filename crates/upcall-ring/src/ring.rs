//! One ring: how a producer and a consumer pass entries through memory that both write.
//!
//! This is the protocol of [`upcall_abi::ring`] and nothing else: no descriptors, no system
//! calls. It is generic over the memory, so that loom checks the very code that runs over a
//! memfd (see `tests/loom.rs` for the command).
//!
//! Always true: positions live in private memory, so whatever the other side writes, slots
//! are used in order and an entry is copied out exactly once. A peer that follows the
//! protocol gets every entry whole, in order, exactly once, and its sleep is never missed.
//! A peer that does not can only harm what it is told: entries of nonsense, no entries, a
//! ring that stays full.

use std::fmt;
use std::marker::PhantomData;

use upcall_abi::ring::{Completion, Submission, Words};

use crate::sync::{AtomicU32, Ordering, PlainU32, PlainU64, fence};

/// What crosses a ring.
pub trait Entry: Copy {
    /// The entry as words; the low half of word 0 is not used.
    fn to_words(&self) -> Words;
    /// The entry of these words. Any words make an entry.
    fn from_words(words: &Words) -> Self;
}

impl Entry for Submission {
    fn to_words(&self) -> Words {
        Submission::to_words(self)
    }

    fn from_words(words: &Words) -> Self {
        Submission::from_words(words)
    }
}

impl Entry for Completion {
    fn to_words(&self) -> Words {
        Completion::to_words(self)
    }

    fn from_words(words: &Words) -> Self {
        Completion::from_words(words)
    }
}

/// The place of one entry in a ring.
///
/// Word 0 is two 32-bit words, because the C side reads and writes `seq` alone.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Slot {
    seq: AtomicU32,
    /// The other half of word 0: kind, op or code, flags.
    rest: PlainU32,
    words: [PlainU64; 7],
}

impl Slot {
    /// Writes the entry of `position` and then says that it is there.
    fn publish(&self, words: &Words, position: u32) {
        self.rest.set((words[0] >> 32) as u32);
        for (shared, word) in self.words.iter().zip(&words[1..]) {
            shared.set(*word);
        }
        // Release: whoever sees this `seq` sees the words above.
        self.seq.store(position.wrapping_add(1), Ordering::Release);
    }

    fn is_ready(&self, position: u32) -> bool {
        // Acquire: the words read after this are those written before `seq`.
        self.seq.load(Ordering::Acquire) == position.wrapping_add(1)
    }

    /// Copies the entry of `position` out, if it is there.
    fn take(&self, position: u32) -> Option<Words> {
        if !self.is_ready(position) {
            return None;
        }
        let rest = self.rest.get();
        let mut words = [0; 8];
        words[0] = u64::from(position.wrapping_add(1)) | u64::from(rest) << 32;
        for (word, shared) in words[1..].iter_mut().zip(&self.words) {
            *word = shared.get();
        }
        Some(words)
    }
}

/// The memory of one ring. Both sides of a ring, perhaps in two processes, hold one each.
pub trait RingMemory {
    /// How many slots: a power of two that never changes and is not read from the memory.
    fn entries(&self) -> u32;
    /// The slot of a position: number `position % entries`. Any position has one.
    fn slot(&self, position: u32) -> &Slot;
    /// The position up to which the consumer has taken entries; written by the consumer.
    fn head(&self) -> &AtomicU32;
    /// 1 while the consumer sleeps or is about to; written by both.
    fn sleeping(&self) -> &AtomicU32;
}

/// The ring has no free slot: nothing was pushed. If it stays so, [`Producer::free`] tells
/// whether the consumer is merely slow or talks nonsense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the ring is full")
    }
}

impl std::error::Error for Full {}

/// The consumer's head is one that it cannot have reached: it is broken or hostile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The head that was read.
    pub head: u32,
    /// The last head that was believed.
    pub believed: u32,
    /// The position of the next entry to be produced.
    pub tail: u32,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation { head, believed, tail } = self;
        write!(f, "the ring's consumer says {head}, which is not from {believed} to {tail}")
    }
}

impl std::error::Error for Violation {}

/// The end of a ring that entries are put into. One per ring; one thread at a time.
#[derive(Debug)]
pub struct Producer<E, M> {
    memory: M,
    /// Position of the next entry.
    tail: u32,
    /// The last head that made sense: everything before it may be overwritten.
    head: u32,
    /// Entries were pushed since the last [`publish`](Self::publish).
    pushed: bool,
    entry: PhantomData<fn(E)>,
}

impl<E: Entry, M: RingMemory> Producer<E, M> {
    /// The producer of a ring that nothing has passed through yet (all words 0).
    pub fn new(memory: M) -> Self {
        Self::starting_at(memory, 0)
    }

    /// The producer of a ring through which `position` entries have passed, all taken.
    pub(crate) fn starting_at(memory: M, position: u32) -> Self {
        Producer { memory, tail: position, head: position, pushed: false, entry: PhantomData }
    }

    /// Slots of the ring.
    pub fn entries(&self) -> u32 {
        self.memory.entries()
    }

    /// Puts an entry into the ring; its `seq` is set here. The consumer may see it at once,
    /// but is only woken by [`publish`](Self::publish).
    pub fn push(&mut self, entry: &E) -> Result<(), Full> {
        if self.known_free() == 0 && !matches!(self.free(), Ok(1..)) {
            return Err(Full);
        }
        self.memory.slot(self.tail).publish(&entry.to_words(), self.tail);
        self.tail = self.tail.wrapping_add(1);
        self.pushed = true;
        Ok(())
    }

    /// Looks how many entries can be pushed now. After a violation the producer goes on
    /// believing the last head that made sense, so it never overwrites what is not taken.
    pub fn free(&mut self) -> Result<u32, Violation> {
        // Acquire: the consumer has copied the entries before this head, so that what is
        // written to their slots from now on cannot tear them.
        let head = self.memory.head().load(Ordering::Acquire);
        let taken = head.wrapping_sub(self.head);
        if taken > self.tail.wrapping_sub(self.head) {
            return Err(Violation { head, believed: self.head, tail: self.tail });
        }
        self.head = head;
        Ok(self.known_free())
    }

    fn known_free(&self) -> u32 {
        self.memory.entries() - self.tail.wrapping_sub(self.head)
    }

    /// Ends a batch of pushes: true if the consumer sleeps, and then the caller must ring
    /// its doorbell. Costs nothing if nothing was pushed since the last call.
    #[must_use = "a consumer that sleeps must be woken"]
    pub fn publish(&mut self) -> bool {
        if !std::mem::take(&mut self.pushed) {
            return false;
        }
        // Either this side sees `sleeping`, or the consumer, looking once more after its
        // own fence, sees the entries: with both fences it cannot be neither.
        fence(Ordering::SeqCst);
        let sleeping = self.memory.sleeping();
        // The swap makes sure that one sleep is rung for once.
        sleeping.load(Ordering::Relaxed) == 1 && sleeping.swap(0, Ordering::Relaxed) == 1
    }
}

/// The end of a ring that entries are taken from. One per ring; one thread at a time.
#[derive(Debug)]
pub struct Consumer<E, M> {
    memory: M,
    /// Position of the next entry.
    head: u32,
    entry: PhantomData<fn() -> E>,
}

impl<E: Entry, M: RingMemory> Consumer<E, M> {
    /// The consumer of a ring that nothing has passed through yet (all words 0).
    pub fn new(memory: M) -> Self {
        Self::starting_at(memory, 0)
    }

    /// The consumer of a ring through which `position` entries have passed.
    pub(crate) fn starting_at(memory: M, position: u32) -> Self {
        Consumer { memory, head: position, entry: PhantomData }
    }

    /// Slots of the ring.
    pub fn entries(&self) -> u32 {
        self.memory.entries()
    }

    /// Takes the next entry: a private copy, made in one pass, that nobody changes any
    /// more. What it says is still the producer's word and needs checking.
    ///
    /// A hostile producer can have entries ready for ever: take at most
    /// [`entries`](Self::entries) of them in a row, then look at something else.
    pub fn pop(&mut self) -> Option<E> {
        let words = self.memory.slot(self.head).take(self.head)?;
        self.head = self.head.wrapping_add(1);
        // Release: the copy above is done before the producer may reuse the slot.
        self.memory.head().store(self.head, Ordering::Release);
        Some(E::from_words(&words))
    }

    /// Whether [`pop`](Self::pop) would find an entry now.
    pub fn is_ready(&self) -> bool {
        self.memory.slot(self.head).is_ready(self.head)
    }

    /// Says that this side is about to sleep. True: block on the doorbell, and call
    /// [`after_sleep`](Self::after_sleep) when awake, for whatever reason. False: there are
    /// entries after all, and this side is not said to sleep.
    ///
    /// Clear the doorbell after waking and before the next `pop`, never between this and
    /// blocking: the ring that is cleared then is the one to wait for.
    #[must_use = "sleep only if this is true"]
    pub fn before_sleep(&mut self) -> bool {
        // A swap, where a store would do, because loom does not see that the producer's
        // swap, when it read an older value of ours, comes before this in every order.
        self.memory.sleeping().swap(1, Ordering::Relaxed);
        // Pairs with the fence in `publish`.
        fence(Ordering::SeqCst);
        if self.is_ready() {
            self.after_sleep();
            return false;
        }
        true
    }

    /// Says that this side is awake, so that nobody rings for it.
    pub fn after_sleep(&mut self) {
        // Nothing is ordered by this: a producer that still sees 1 rings once in vain.
        self.memory.sleeping().store(0, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// A ring on the heap, both of whose sides, and the enemy, are this thread.
    #[derive(Debug)]
    struct Heap {
        slots: Vec<Slot>,
        head: AtomicU32,
        sleeping: AtomicU32,
    }

    impl RingMemory for Arc<Heap> {
        fn entries(&self) -> u32 {
            self.slots.len() as u32
        }

        fn slot(&self, position: u32) -> &Slot {
            &self.slots[position as usize % self.slots.len()]
        }

        fn head(&self) -> &AtomicU32 {
            &self.head
        }

        fn sleeping(&self) -> &AtomicU32 {
            &self.sleeping
        }
    }

    type Ends = (Producer<Submission, Arc<Heap>>, Consumer<Submission, Arc<Heap>>, Arc<Heap>);

    fn ring(entries: usize, position: u32) -> Ends {
        let heap = Arc::new(Heap {
            slots: std::iter::repeat_with(Slot::default).take(entries).collect(),
            head: AtomicU32::new(position),
            sleeping: AtomicU32::new(0),
        });
        (
            Producer::starting_at(heap.clone(), position),
            Consumer::starting_at(heap.clone(), position),
            heap,
        )
    }

    fn entry(number: u64) -> Submission {
        Submission {
            kind: number as u8,
            flags: !number as u16,
            token: number,
            length: number as u32,
            status: -1,
            reserved: !number,
            ..Submission::default()
        }
    }

    #[test]
    fn every_bit_of_an_entry_but_seq_arrives() {
        let (mut producer, mut consumer, _) = ring(2, 0);
        let words = [0x0102_0304_0000_0001, 2, 3, 4 << 40 | 4, 5, !6, 7, 8];
        producer.push(&Submission::from_words(&words)).unwrap();
        assert_eq!(consumer.pop().unwrap().to_words(), words);
        assert_eq!(consumer.pop(), None);
    }

    #[test]
    fn positions_wrap_without_a_gap() {
        for entries in [1, 2, 8] {
            let (mut producer, mut consumer, _) = ring(entries, u32::MAX - 20);
            for number in 0..40 {
                assert_eq!(consumer.pop(), None);
                producer.push(&entry(number)).unwrap();
                let taken = consumer.pop().unwrap();
                assert_eq!(taken, Submission { seq: taken.seq, ..entry(number) });
            }
        }
    }

    #[test]
    fn a_full_ring_takes_nothing_until_an_entry_was_taken() {
        let (mut producer, mut consumer, _) = ring(4, u32::MAX - 1);
        for number in 0..4 {
            assert_eq!(producer.free(), Ok(4 - number as u32));
            producer.push(&entry(number)).unwrap();
        }
        assert_eq!(producer.push(&entry(9)), Err(Full));
        assert_eq!(producer.free(), Ok(0));
        assert_eq!(consumer.pop().unwrap().token, 0);
        assert_eq!(producer.push(&entry(4)), Ok(()));
        assert_eq!(producer.push(&entry(9)), Err(Full));
        let rest: Vec<u64> = std::iter::from_fn(|| consumer.pop()).map(|e| e.token).collect();
        assert_eq!(rest, [1, 2, 3, 4]);
    }

    #[test]
    fn a_head_that_cannot_be_is_a_violation_and_frees_nothing() {
        let (mut producer, mut consumer, heap) = ring(4, 0);
        for number in 0..4 {
            producer.push(&entry(number)).unwrap();
        }
        consumer.pop().unwrap();
        assert_eq!(producer.free(), Ok(1));
        // Backwards; more than was produced; far away.
        for head in [0, 5, 1 << 31, u32::MAX] {
            heap.head.store(head, Ordering::Relaxed);
            assert_eq!(producer.free(), Err(Violation { head, believed: 1, tail: 4 }));
        }
        producer.push(&entry(4)).expect("the slot that was free before");
        assert_eq!(producer.push(&entry(9)), Err(Full), "nothing is overwritten");
        heap.head.store(1, Ordering::Relaxed);
        assert_eq!(producer.free(), Ok(0));
        assert_eq!(consumer.pop().unwrap().token, 1, "a peer that comes to its senses goes on");
    }

    #[test]
    fn an_entry_whose_seq_is_of_another_position_is_not_there() {
        let (mut producer, mut consumer, heap) = ring(4, 0);
        producer.push(&entry(0)).unwrap();
        for seq in [0, 2, 5, u32::MAX] {
            heap.slots[0].seq.store(seq, Ordering::Relaxed);
            assert_eq!(consumer.pop(), None);
        }
        heap.slots[0].seq.store(1, Ordering::Relaxed);
        assert!(consumer.pop().is_some());
    }

    #[test]
    fn one_sleep_is_rung_for_once_and_only_after_a_push() {
        let (mut producer, mut consumer, _) = ring(4, 0);
        assert!(consumer.before_sleep());
        assert!(!producer.publish(), "nothing was pushed");
        producer.push(&entry(0)).unwrap();
        producer.push(&entry(1)).unwrap();
        assert!(producer.publish());
        assert!(!producer.publish());
        producer.push(&entry(2)).unwrap();
        assert!(!producer.publish(), "it was rung for already");
        assert!(!consumer.before_sleep(), "there are entries");
        producer.push(&entry(3)).unwrap();
        assert!(!producer.publish(), "it does not sleep");
        while consumer.pop().is_some() {}
        assert!(consumer.before_sleep());
        consumer.after_sleep();
        producer.push(&entry(4)).unwrap();
        assert!(!producer.publish(), "it is awake");
    }
}
