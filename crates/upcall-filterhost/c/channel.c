/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A channel: taking submissions, putting completions, and waiting.
 *
 * The protocol is that of crates/upcall-abi/src/ring.rs. Each atomic below says which
 * of the worker's it pairs with.
 */
#include "host.h"

#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

_Thread_local struct upcall_host *uh_current_host;
_Thread_local struct uh_channel *uh_current_channel;

/* Most entries between two looks at the worker's doorbell and at our place in the ring. */
#define BATCH_MAX 32u
/* How long to yield before sleeping: adapts between these. */
#define PATIENCE_MIN_NS 2000u
#define PATIENCE_MAX_NS 50000u
/* Looks at the ring between two looks at the clock, while nobody else wants the core. */
#define POLLS 200u
/* While nobody else does, a wait shorter than this has no yield in it: what comes sooner is
   from a worker that has a core, and a system call in the middle would make it later. */
#define UNDISTURBED_NS 2000u
/* A yield that took at least this let somebody else run. For so many yields from then on
   each look is followed by a yield: what we wait for may be waiting for our core. */
#define SLOW_YIELD_NS 1000u
#define CROWDED_YIELDS 16u

static _Atomic uint32_t *word(const struct uh_channel *channel, size_t offset) {
    return (_Atomic uint32_t *)(void *)(channel->base + offset);
}

/* ---- entries ---- */

static bool submission_ready(const struct uh_channel *channel) {
    uint32_t at = channel->taken;
    const struct wire_submission *entry = &channel->submissions[at & (channel->entries - 1)];
    /* Acquire: pairs with the worker's release of seq; the other words come before it. */
    return atomic_load_explicit((const _Atomic uint32_t *)&entry->seq, memory_order_acquire) ==
           at + 1;
}

/* Copies the next submission out, once. Only after submission_ready(). */
static void take_submission(struct uh_channel *channel, struct wire_submission *into) {
    uint32_t at = channel->taken++;
    const volatile uint64_t *from =
        (const volatile uint64_t *)&channel->submissions[at & (channel->entries - 1)];
    uint64_t words[WIRE_ENTRY_SIZE / 8];
    for (size_t i = 0; i < WIRE_ENTRY_SIZE / 8; i++)
        words[i] = from[i];
    memcpy(into, words, sizeof(*into));
}

/* Gives the entries taken so far back to the worker. */
static void release_submissions(struct uh_channel *channel) {
    /* Release: our reads of the entries come before the worker's acquire of the head. */
    atomic_store_explicit(word(channel, WIRE_SUBMISSION_HEAD_OFFSET), channel->taken,
                          memory_order_release);
}

static void put_completion(struct uh_channel *channel, const struct wire_completion *entry) {
    uint32_t at = channel->put++;
    struct wire_completion *slot = &channel->completions[at & (channel->entries - 1)];
    uint64_t words[WIRE_ENTRY_SIZE / 8];
    memcpy(words, entry, sizeof(words));
    volatile uint64_t *into = (volatile uint64_t *)slot;
    for (size_t i = 1; i < WIRE_ENTRY_SIZE / 8; i++)
        into[i] = words[i];
    ((volatile uint32_t *)slot)[1] = (uint32_t)(words[0] >> 32);
    uh_point(UH_POINT_PUTTING, entry->kind, 0);
    /* Release: pairs with the worker's acquire of seq. */
    atomic_store_explicit((_Atomic uint32_t *)&slot->seq, at + 1, memory_order_release);
    uh_point(UH_POINT_PUT, entry->kind, 0);
}

static bool has_room(struct uh_channel *channel) {
    if (channel->put - channel->worker_head < channel->entries)
        return true;
    /* Acquire: the worker's reads of the entries come before our writing over them. */
    channel->worker_head = atomic_load_explicit(word(channel, WIRE_COMPLETION_HEAD_OFFSET),
                                                memory_order_acquire);
    return channel->put - channel->worker_head < channel->entries;
}

/* ---- doorbells ---- */

static void ring_worker(struct uh_channel *channel) {
    _Atomic uint32_t *sleeping = word(channel, WIRE_COMPLETION_SLEEPING_OFFSET);
    /* Our entries, then this look; the worker: its sleeping = 1, then its last look. */
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(sleeping, memory_order_relaxed) == 1 &&
        atomic_exchange_explicit(sleeping, 0, memory_order_relaxed) == 1) {
        uint64_t one = 1;
        /* Fails only if it has been rung 2^64 times already, or the worker is gone. */
        ssize_t ignored = write(channel->worker_doorbell, &one, sizeof(one));
        (void)ignored;
    }
}

static void ring_if_due(struct uh_channel *channel) {
    if (channel->bell_due) {
        channel->bell_due = false;
        ring_worker(channel);
    }
}

static void sleep_for_room(struct uh_channel *channel, uint32_t turn) {
    if (turn == 0)
        ring_worker(channel); /* it may sleep with our entries not yet announced */
    if (turn == 0 && uh_current_channel == channel && !channel->host->inline_mode)
        release_submissions(channel); /* or wait for room on its side, within this batch */
    if (turn < 100)
        sched_yield();
    else
        nanosleep(&(struct timespec){ .tv_nsec = 50000 }, NULL);
}

/* ---- the producer ---- */

bool uh_channel_is_ours(const struct uh_channel *channel) {
    return channel->host->inline_mode && uh_current_channel == channel;
}

bool uh_channel_reserve(struct uh_channel *channel, bool must_not_wait) {
    for (uint32_t turn = 0;; turn++) {
        pthread_mutex_lock(&channel->out);
        if (has_room(channel))
            return true;
        pthread_mutex_unlock(&channel->out);
        if (must_not_wait || atomic_load_explicit(&channel->host->stopping, memory_order_relaxed))
            return false;
        sleep_for_room(channel, turn);
    }
}

void uh_channel_commit(struct uh_channel *channel, const struct wire_completion *entry) {
    put_completion(channel, entry);
    pthread_mutex_unlock(&channel->out);
    if (uh_current_channel == channel)
        channel->bell_due = true;
    else
        ring_worker(channel);
}

void uh_channel_cancel(struct uh_channel *channel) {
    pthread_mutex_unlock(&channel->out);
}

/* ---- the thread ---- */

#ifdef UPCALL_HOST_POINTS
static uint32_t kind_ready(const struct uh_channel *channel) {
    return channel->submissions[channel->taken & (channel->entries - 1)].kind;
}
#endif

/* Serves what is there, at most a batch; says whether there was anything. */
static bool serve_batch(struct uh_channel *channel) {
    if (!submission_ready(channel))
        return false;
    pthread_mutex_lock(&channel->serve);
    for (uint32_t i = 0; i < BATCH_MAX && submission_ready(channel); i++) {
        struct wire_submission in;
        struct wire_completion out;
        uh_point(UH_POINT_READY, kind_ready(channel), 0);
        take_submission(channel, &in);
        uh_point(UH_POINT_TAKEN, in.kind, in.op);
        int said = uh_deliver(channel, &in, &out);
        uh_point(UH_POINT_DECIDED, in.kind, in.op);
        if (said == 1 && uh_channel_reserve(channel, false))
            uh_channel_commit(channel, &out);
    }
    release_submissions(channel);
    uh_point(UH_POINT_RELEASED, 0, 0);
    pthread_mutex_unlock(&channel->serve);
    ring_if_due(channel);
    return true;
}

static bool must_stop(const struct uh_channel *channel) {
    return atomic_load_explicit(&channel->host->stopping, memory_order_relaxed);
}

static void sleep_until_rung(struct uh_channel *channel) {
    _Atomic uint32_t *sleeping = word(channel, WIRE_SUBMISSION_SLEEPING_OFFSET);
    atomic_store_explicit(sleeping, 1, memory_order_relaxed);
    /* This store, then a last look; the worker: its entry, a fence, its look at this. */
    atomic_thread_fence(memory_order_seq_cst);
    if (!submission_ready(channel) && !must_stop(channel)) {
        struct pollfd bell = { .fd = channel->doorbell, .events = POLLIN };
        uint64_t rings;
        if (poll(&bell, 1, -1) > 0 && (bell.revents & POLLIN)) {
            ssize_t ignored = read(channel->doorbell, &rings, sizeof(rings));
            (void)ignored;
        }
    }
    atomic_store_explicit(sleeping, 0, memory_order_relaxed);
}

/* Looks for a submission until patience ends; says whether one came. */
static bool poll_then_yield(struct uh_channel *channel) {
    uint64_t now = 0, begin = 0;
    for (;;) {
        for (uint32_t looks = channel->crowded ? 1 : POLLS; looks; looks--)
            if (submission_ready(channel))
                return true;
        uint64_t before = begin && channel->crowded ? now : uh_now_ns();
        begin = begin ? begin : before;
        if (before - begin >= channel->patience_ns)
            return false;
        if (!channel->crowded && before - begin < UNDISTURBED_NS)
            continue;
        sched_yield();
        now = uh_now_ns();
        if (now - before >= SLOW_YIELD_NS)
            channel->crowded = CROWDED_YIELDS;
        else if (channel->crowded)
            channel->crowded--;
    }
}

/*
 * Yielding is worth it if the next submission comes soon: patience doubles when it did,
 * or when a sleep was short, and halves when not. An idle disk sleeps at once.
 */
static void wait_for_submission(struct uh_channel *channel) {
    bool soon = poll_then_yield(channel);
    if (!soon) {
        uint64_t asleep = uh_now_ns();
        sleep_until_rung(channel);
        soon = uh_now_ns() - asleep < 2 * PATIENCE_MAX_NS;
    }
    uint64_t patience = soon ? channel->patience_ns * 2 : channel->patience_ns / 2;
    channel->patience_ns = patience < PATIENCE_MIN_NS   ? PATIENCE_MIN_NS
                           : patience > PATIENCE_MAX_NS ? PATIENCE_MAX_NS
                                                        : patience;
}

static void *channel_thread(void *arg) {
    struct uh_channel *channel = arg;
    prctl(PR_SET_NAME, "upcall-channel");
    uh_current_host = channel->host;
    uh_current_channel = channel;
    channel->patience_ns = PATIENCE_MIN_NS;
    channel->crowded = CROWDED_YIELDS;
    while (!must_stop(channel))
        if (!serve_batch(channel))
            wait_for_submission(channel);
    return NULL;
}

/* ---- all of them ---- */

/* The thread names itself: naming another one would open a file of /proc. */
int uh_thread_start(pthread_t *thread, void *(*run)(void *), void *arg) {
    /* Signals are for the threads that were here before us: inline, the worker's. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(thread, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

#define FOR_EACH_CHANNEL(host, channel)                                                       \
    for (uint32_t at_ = 0; at_ < atomic_load(&(host)->channel_count); at_++)                  \
        for (struct uh_channel *channel = atomic_load_explicit(&(host)->channels[at_],        \
                                                               memory_order_acquire);         \
             channel; channel = NULL)

int uh_channels_start(struct upcall_host *host) {
    if (host->inline_mode)
        return 0;
    FOR_EACH_CHANNEL(host, channel) {
        if (channel->served)
            continue;
        int error = uh_thread_start(&channel->thread, channel_thread, channel);
        if (error)
            return uh_fail(host, -error, "cannot start a thread: %s", strerror(error));
        channel->served = true;
    }
    return 0;
}

void uh_channels_stop(struct upcall_host *host) {
    atomic_store(&host->stopping, true);
    FOR_EACH_CHANNEL(host, channel) {
        if (!channel->served)
            continue;
        uint64_t one = 1;
        ssize_t ignored = write(channel->doorbell, &one, sizeof(one));
        (void)ignored;
        pthread_join(channel->thread, NULL);
        channel->served = false;
    }
}

void uh_channels_lock(struct upcall_host *host) {
    FOR_EACH_CHANNEL(host, channel)
        pthread_mutex_lock(&channel->serve);
}

void uh_channels_unlock(struct upcall_host *host) {
    FOR_EACH_CHANNEL(host, channel)
        pthread_mutex_unlock(&channel->serve);
}
