//! A request in the hands of a filter.
//!
//! [`Request`] is a request on its way down, [`Completion`] the same request on its way
//! up. Each ends in exactly one [`Verdict`], and that is enforced while the filter is
//! compiled: a verdict can only be had by giving up the request, and carries the lifetime
//! of the call it belongs to. To answer later, hold the request; what remains is a token,
//! [`Held`] or [`HeldCompletion`], that any thread may use to answer once. A token that is
//! dropped answers `EIO`, so that a forgotten request cannot hang the guest.

use std::marker::PhantomData;
use std::ptr::NonNull;

use crate::table::services;
use crate::{Data, DataMut, Errno, Filter, HoldId, Op, context, sys};

/// A filter's answer. Comes from the methods of [`Request`] and [`Completion`].
#[must_use = "return it from the callback"]
pub struct Verdict<'a> {
    pub(crate) number: u32,
    _call: Call<'a>,
}

/// Ties a request and its verdict to one call of a callback, and to no other.
type Call<'a> = PhantomData<fn(&'a ()) -> &'a ()>;

/// A request on its way down.
pub struct Request<'a, F: Filter> {
    raw: NonNull<sys::Request>,
    _call: Call<'a>,
    _filter: PhantomData<F>,
}

/// A request on its way up, which the filter has watched.
pub struct Completion<'a, F: Filter> {
    raw: NonNull<sys::Request>,
    context: Option<F::Context>,
    _call: Call<'a>,
}

/// A request on its way down that the filter will answer later.
pub struct Held<F: Filter> {
    token: Token<F>,
}

/// A request on its way up that the filter will answer later.
pub struct HeldCompletion<F: Filter> {
    token: Token<F>,
    context: Option<F::Context>,
}

/// What the four have in common.
macro_rules! accessors {
    ($raw:ident => $raw_of_self:expr) => {
        /// What to do.
        pub fn op(&self) -> Op {
            // `table` lets no other number in.
            Op::from_number(self.raw().op).unwrap_or(Op::Read)
        }

        /// Bytes from the start of the disk.
        pub fn offset(&self) -> u64 {
            self.raw().offset.0
        }

        /// Bytes; 0 for a flush.
        pub fn length(&self) -> u32 {
            self.raw().length
        }

        /// Write, discard, write zeroes: whether it must be durable before it completes.
        pub fn is_fua(&self) -> bool {
            self.raw().flags & sys::REQ_FUA != 0
        }

        /// Write zeroes: whether the range may be deallocated.
        pub fn may_unmap(&self) -> bool {
            self.raw().flags & sys::REQ_UNMAP != 0
        }

        /// Whether it was delivered before, to an instance that is gone: what it asks may
        /// have been done already.
        pub fn is_retry(&self) -> bool {
            self.raw().flags & sys::REQ_RETRY != 0
        }

        /// The data, where the filter asked for it and there is some: of a write on its
        /// way down, of a read on its way up, of a read on its way down if the filter
        /// answers reads.
        pub fn data(&self) -> Option<Data<'_>> {
            let raw = self.raw();
            let bytes = NonNull::new(raw.data)?;
            // SAFETY: the header: `data` is `length` bytes as long as the filter owns the
            // request, and `self` is that ownership.
            Some(unsafe { Data::new(bytes.as_ptr().cast(), raw.length as usize) })
        }

        /// The data, where the filter may change it.
        pub fn data_mut(&mut self) -> Option<DataMut<'_>> {
            let op = self.op();
            let info = F::INFO;
            let answers_read = op == Op::Read && info.answers.contains(op);
            if !info.changes.contains(op) && !answers_read {
                return None;
            }
            let raw = self.raw();
            let bytes = NonNull::new(raw.data)?;
            // SAFETY: as in `data`; the pages are mapped writable, because the filter
            // declared the operation in `changes` or answers reads.
            Some(unsafe { DataMut::new(bytes.as_ptr().cast(), raw.length as usize) })
        }

        fn raw(&self) -> &sys::Request {
            let $raw = self;
            // SAFETY: the request is the filter's until it is answered, which takes
            // `self`; the framework does not touch it meanwhile.
            unsafe { $raw_of_self.as_ref() }
        }
    };
}

impl<'a, F: Filter> Request<'a, F> {
    /// # Safety
    ///
    /// `raw` was handed to the `start_io` that runs during `'a`, and this is the only
    /// [`Request`] made of it.
    pub(crate) unsafe fn new(raw: NonNull<sys::Request>) -> Request<'a, F> {
        Request { raw, _call: PhantomData, _filter: PhantomData }
    }

    accessors!(this => this.raw);

    /// Go on down; no call on completion.
    pub fn pass(self) -> Verdict<'a> {
        verdict(sys::PASS)
    }

    /// Go on down, and call [`Filter::io_done`] on completion, with `context`.
    pub fn watch(self, context: F::Context) -> Verdict<'a> {
        // SAFETY: `self` is the only way to the request, which is ours for this call.
        unsafe { context::store(self.raw, context::into_word(context)) };
        verdict(sys::WATCH)
    }

    /// Answered here: success. Only for operations in `answers`; else the request fails
    /// with `EIO` and counts as a violation.
    pub fn done(self) -> Verdict<'a> {
        verdict(sys::DONE)
    }

    /// Answered here: an error.
    pub fn fail(mut self, errno: Errno) -> Verdict<'a> {
        // SAFETY: as in `watch`.
        unsafe { self.raw.as_mut() }.status = errno.negative();
        verdict(sys::FAIL)
    }

    /// The answer comes later, by the token. The verdict must still be returned; the token
    /// may be used before that.
    pub fn hold(self) -> (Held<F>, Verdict<'a>) {
        let token = Token::new(self.raw);
        (Held { token }, verdict(sys::HOLD))
    }
}

impl<'a, F: Filter> Completion<'a, F> {
    /// # Safety
    ///
    /// `raw` was handed to the `io_done` that runs during `'a`, and this is the only
    /// [`Completion`] made of it.
    pub(crate) unsafe fn new(raw: NonNull<sys::Request>) -> Completion<'a, F> {
        // SAFETY: the request is ours for this call; the word was put there by `watch` of
        // this filter, or is null after a restart; and comes back once.
        let context = unsafe {
            let word = raw.as_ref().context;
            context::store(raw, std::ptr::null_mut());
            context::from_word(word)
        };
        Completion { raw, context, _call: PhantomData }
    }

    accessors!(this => this.raw);

    /// How it ended below.
    pub fn status(&self) -> Result<(), Errno> {
        Errno::result(self.raw().status)
    }

    /// What the filter gave to `watch`. None if that was another instance, which is gone
    /// (then [`is_retry`](Self::is_retry)).
    pub fn context(&self) -> Option<&F::Context> {
        self.context.as_ref()
    }

    /// Likewise, to keep.
    pub fn take_context(&mut self) -> Option<F::Context> {
        self.context.take()
    }

    /// Go on up, with the status as it is.
    pub fn pass(self) -> Verdict<'a> {
        verdict(sys::PASS)
    }

    /// Go on up, with success.
    pub fn done(self) -> Verdict<'a> {
        verdict(sys::DONE)
    }

    /// Go on up, with an error.
    pub fn fail(mut self, errno: Errno) -> Verdict<'a> {
        // SAFETY: `self` is the only way to the request, which is ours for this call.
        unsafe { self.raw.as_mut() }.status = errno.negative();
        verdict(sys::FAIL)
    }

    /// The answer comes later, by the token. The verdict must still be returned; the token
    /// may be used before that.
    pub fn hold(self) -> (HeldCompletion<F>, Verdict<'a>) {
        let token = Token::new(self.raw);
        (HeldCompletion { token, context: self.context }, verdict(sys::HOLD))
    }
}

impl<F: Filter> Held<F> {
    accessors!(this => this.token.raw);

    /// Its name, which [`Filter::cancel`] gives.
    pub fn id(&self) -> HoldId {
        self.token.id
    }

    /// Go on down; no call on completion.
    pub fn pass(self) {
        self.token.answer(sys::PASS, 0);
    }

    /// Go on down, and call [`Filter::io_done`] on completion, with `context`. If the
    /// request was cancelled it goes no further down, but `io_done` is called even so.
    pub fn watch(self, context: F::Context) {
        // SAFETY: the request is held; `answer` takes it away after this.
        unsafe { context::store(self.token.raw, context::into_word(context)) };
        self.token.answer(sys::WATCH, 0);
    }

    /// Answered here: success. Only for operations in `answers`.
    pub fn done(self) {
        self.token.answer(sys::DONE, 0);
    }

    /// Answered here: an error.
    pub fn fail(self, errno: Errno) {
        self.token.answer(sys::FAIL, errno.negative());
    }
}

impl<F: Filter> HeldCompletion<F> {
    accessors!(this => this.token.raw);

    /// Its name, which [`Filter::cancel`] gives.
    pub fn id(&self) -> HoldId {
        self.token.id
    }

    /// How it ended below.
    pub fn status(&self) -> Result<(), Errno> {
        Errno::result(self.raw().status)
    }

    /// What the filter gave to `watch`, as in [`Completion::context`].
    pub fn context(&self) -> Option<&F::Context> {
        self.context.as_ref()
    }

    /// Go on up, with the status as it is.
    pub fn pass(self) {
        let status = self.raw().status;
        self.token.answer(sys::PASS, status);
    }

    /// Go on up, with success.
    pub fn done(self) {
        self.token.answer(sys::DONE, 0);
    }

    /// Go on up, with an error.
    pub fn fail(self, errno: Errno) {
        self.token.answer(sys::FAIL, errno.negative());
    }
}

fn verdict<'a>(number: u32) -> Verdict<'a> {
    Verdict { number, _call: PhantomData }
}

/// The right, and the duty, to answer a held request once.
struct Token<F: Filter> {
    raw: NonNull<sys::Request>,
    id: HoldId,
    is_answered: bool,
    _filter: PhantomData<fn() -> F>,
}

// SAFETY: a held request may be answered, and until then touched, from any thread, and the
// token is the only way to it.
unsafe impl<F: Filter> Send for Token<F> {}

impl<F: Filter> Token<F> {
    fn new(raw: NonNull<sys::Request>) -> Token<F> {
        let id = HoldId::next();
        // SAFETY: the caller gives up the request, which is the filter's during this call.
        unsafe { context::store(raw, id.word()) };
        Token { raw, id, is_answered: false, _filter: PhantomData }
    }

    fn answer(mut self, verdict: u32, status: i32) {
        self.answer_once(verdict, status);
    }

    fn answer_once(&mut self, verdict: u32, status: i32) {
        self.is_answered = true;
        if let Some(services) = services() {
            // SAFETY: `raw` is held and unanswered: a token is answered by being consumed or
            // dropped, and `is_answered` keeps the one from following the other.
            unsafe { (services.answer)(self.raw.as_ptr(), verdict, status) }
        }
    }
}

impl<F: Filter> Drop for Token<F> {
    fn drop(&mut self) {
        if !self.is_answered {
            self.answer_once(sys::FAIL, Errno::EIO.negative());
        }
    }
}
