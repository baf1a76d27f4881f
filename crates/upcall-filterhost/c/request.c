/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * One delivery: a submission becomes a call of the filter, and its verdict a completion.
 *
 * Always true: a START or DONE gets exactly one verdict, whatever the filter
 * does; HELD is sent at most once per hold, and before the verdict. Whether a verdict is
 * allowed is judged by the worker alone: what the filter said is passed on as it is.
 *
 * Requests come from chunks that grow to the most that was ever in flight; after that
 * nothing is allocated. One that answer() freed is used again as late as possible, so
 * that a second answer() finds it free and is noticed.
 */
#include "host.h"

#include <stdlib.h>
#include <string.h>

/* A code that is no verdict, for what does not fit into the entry's byte or means nothing there. */
#define NO_VERDICT 255u

/* ---- the free list ---- */

static void grow(struct uh_channel *channel) {
    if (channel->chunk_count == UH_CHUNKS_MAX)
        return;
    struct uh_chunk *chunk = aligned_alloc(64, sizeof(*chunk));
    if (!chunk)
        return;
    memset(chunk, 0, sizeof(*chunk));
    for (uint32_t i = 0; i < UH_CHUNK_REQUESTS; i++) {
        chunk->requests[i].channel = channel;
        chunk->requests[i].next = channel->free;
        channel->free = &chunk->requests[i];
    }
    chunk->next = channel->chunks;
    channel->chunks = chunk;
    channel->chunk_count++;
}

/* On the channel's thread. NULL: out of memory. */
static struct uh_request *take_request(struct uh_channel *channel) {
    if (!channel->free)
        channel->free = atomic_exchange_explicit(&channel->freed, NULL, memory_order_acquire);
    if (!channel->free)
        grow(channel);
    struct uh_request *request = channel->free;
    if (request)
        channel->free = request->next;
    return request;
}

static void free_here(struct uh_channel *channel, struct uh_request *request) {
    atomic_store_explicit(&request->state, UH_FREE, memory_order_release);
    request->next = channel->free;
    channel->free = request;
}

/* From any thread. Only takers remove, and they take all: no ABA. */
static void free_from_anywhere(struct uh_request *request) {
    struct uh_channel *channel = request->channel;
    atomic_store_explicit(&request->state, UH_FREE, memory_order_release);
    request->next = atomic_load_explicit(&channel->freed, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&channel->freed, &request->next, request,
                                                  memory_order_release, memory_order_relaxed)) {}
}

void uh_requests_free(struct uh_channel *channel) {
    while (channel->chunks) {
        struct uh_chunk *chunk = channel->chunks;
        channel->chunks = chunk->next;
        free(chunk);
    }
}

/* ---- delivery ---- */

static int refuse(const struct wire_submission *in, int32_t error, struct wire_completion *out) {
    *out = (struct wire_completion){ .kind = WIRE_VERDICT, .code = UPCALL_FAIL, .token = in->token,
                                     .status = error, .data = WIRE_NO_DATA,
                                     .instance = in->instance };
    return 1;
}

/* What the filter says on, as an entry. @status counts where filter.h says that it does. */
static struct wire_completion verdict_entry(const struct uh_request *request, uint32_t verdict,
                                            int32_t status) {
    bool has_status = verdict == UPCALL_FAIL ||
                      (verdict == UPCALL_PASS && request->phase == WIRE_DONE);
    return (struct wire_completion){
        .kind = WIRE_VERDICT,
        .code = (uint8_t)(verdict < UPCALL_HOLD ? verdict : NO_VERDICT),
        .token = request->token,
        .status = has_status ? status : 0,
        .data = WIRE_NO_DATA,
        .cookie = verdict == UPCALL_WATCH ? (uintptr_t)request->req.context : 0,
        .instance = request->instance->number,
    };
}

/* Whether the data is in the arena; *data is where, NULL for none. */
static bool find_data(const struct upcall_instance *inst, const struct wire_submission *in,
                      void **data) {
    *data = NULL;
    if (in->data == WIRE_NO_DATA)
        return true;
    if (!inst->arena_base || in->data > inst->arena_size ||
        in->length > inst->arena_size - in->data)
        return false;
    *data = inst->arena_base + in->data;
    return true;
}

static uint32_t call(struct upcall_host *host, struct uh_request *request) {
    void *self = request->instance->self;
    if (request->phase == WIRE_START)
        return host->table.start_io(self, &request->req);
    /* A filter that watches and has no io_done watches for nothing. */
    return host->table.io_done ? host->table.io_done(self, &request->req) : UPCALL_PASS;
}

/* The filter has returned, but answered before. Returns as uh_deliver(). */
static int answered_already(struct uh_channel *channel, struct uh_request *request,
                            struct wire_completion *out) {
    bool within = atomic_load_explicit(&request->state, memory_order_acquire) == UH_ANSWERED_WITHIN;
    if (within)
        *out = request->late;
    free_here(channel, request);
    return within ? 1 : 0;
}

/* The filter said HOLD. Returns as uh_deliver(). */
static int hold(struct uh_channel *channel, struct uh_request *request,
                struct wire_completion *out) {
    struct wire_completion held = { .kind = WIRE_HELD, .token = request->token,
                                    .data = WIRE_NO_DATA,
                                    .cookie = (uintptr_t)request->req.context,
                                    .instance = request->instance->number };
    uint32_t running = UH_RUNNING;
    bool to_ring = !channel->host->inline_mode;
    /* With `out` taken before the request counts as held, no answer can overtake HELD. */
    bool room = to_ring && uh_channel_reserve(channel, false);
    bool answered = !atomic_compare_exchange_strong_explicit(
        &request->state, &running, UH_HELD, memory_order_acq_rel, memory_order_acquire);
    if (room && answered)
        uh_channel_cancel(channel);
    else if (room)
        uh_channel_commit(channel, &held);
    if (answered)
        return answered_already(channel, request, out);
    if (to_ring)
        return 0;
    *out = held;
    return 2;
}

static int deliver_request(struct uh_channel *channel, struct upcall_instance *inst,
                           const struct wire_submission *in, struct wire_completion *out) {
    void *data;
    if (!find_data(inst, in, &data)) {
        uh_logf(channel->host, inst, UPCALL_LOG_ERROR, "a request's data is outside the arena");
        return refuse(in, -EFAULT, out);
    }
    struct uh_request *request = take_request(channel);
    if (!request)
        return refuse(in, -ENOMEM, out);
    request->req = (struct upcall_request){
        .size = sizeof(struct upcall_request), .op = in->op, .flags = in->flags,
        .offset = in->offset, .length = in->length,
        .status = in->kind == WIRE_DONE ? in->status : 0, .data = data,
        .context = in->kind == WIRE_DONE ? (void *)(uintptr_t)in->cookie : NULL,
    };
    request->phase = in->kind;
    request->token = in->token;
    request->instance = inst;
    atomic_store_explicit(&request->state, UH_RUNNING, memory_order_relaxed);

    uint32_t verdict = call(channel->host, request);
    if (verdict == UPCALL_HOLD)
        return hold(channel, request, out);
    if (atomic_load_explicit(&request->state, memory_order_acquire) != UH_RUNNING) {
        uh_logf(channel->host, inst, UPCALL_LOG_ERROR,
                "the filter answered a request and then returned verdict %u for it", verdict);
        return answered_already(channel, request, out);
    }
    *out = verdict_entry(request, verdict, request->req.status);
    free_here(channel, request);
    return 1;
}

static bool is_served(struct upcall_instance *inst) {
    uint32_t state = inst ? atomic_load_explicit(&inst->state, memory_order_acquire) : 0;
    return state == UH_INSTANCE_OPEN || state == UH_INSTANCE_CLOSING;
}

/*
 * Executes one submission, with `serve` held. 1: *out is the verdict; 2: *out is HELD,
 * inline only; 0: nothing to say, or it is on the ring already.
 */
int uh_deliver(struct uh_channel *channel, const struct wire_submission *in,
               struct wire_completion *out) {
    struct upcall_host *host = channel->host;
    struct upcall_instance *inst = uh_instance(host, in->instance);
    switch (in->kind) {
    case WIRE_START:
    case WIRE_DONE:
        if (!is_served(inst))
            return refuse(in, -ESHUTDOWN, out);
        return deliver_request(channel, inst, in, out);
    case WIRE_CANCEL:
        if (is_served(inst) && host->table.cancel)
            host->table.cancel(inst->self, (void *)(uintptr_t)in->cookie);
        return 0;
    case WIRE_ISSUED:
        if (inst)
            uh_issued(inst, in);
        return 0;
    default:
        uh_logf(host, inst, UPCALL_LOG_ERROR, "unknown submission %u", in->kind);
        return 0;
    }
}

/* ---- answers ---- */

static void put_late(struct uh_job *job) {
    struct uh_request *request =
        (struct uh_request *)((char *)job - offsetof(struct uh_request, late_job));
    if (uh_channel_reserve(request->channel, false))
        uh_channel_commit(request->channel, &request->late);
    free_from_anywhere(request);
}

/*
 * Puts a held request's verdict on the ring and frees it. The worker's own thread,
 * inline, must not wait for room that only itself can make: the pool does.
 */
static void put_verdict(struct uh_request *request, const struct wire_completion *entry) {
    struct uh_channel *channel = request->channel;
    bool must_not_wait = uh_channel_is_ours(channel);
    if (uh_channel_reserve(channel, must_not_wait)) {
        uh_channel_commit(channel, entry);
    } else if (must_not_wait) {
        request->late = *entry;
        request->late_job = (struct uh_job){ .run = put_late };
        if (uh_pool_put(channel->host, &request->late_job) == 0)
            return;
        uh_logf(channel->host, NULL, UPCALL_LOG_ERROR, "a verdict is lost: no room, no thread");
    }
    free_from_anywhere(request);
}

/*
 * The answer came before the callback returned, which frees the request. From within
 * the callback, it is kept until then and put like any verdict. False: it has
 * returned meanwhile, and the request is held.
 */
static bool answer_early(struct uh_request *request, const struct wire_completion *entry) {
    struct uh_channel *channel = request->channel;
    bool from_within = uh_current_channel == channel;
    if (from_within)
        request->late = *entry;
    uint32_t state = UH_RUNNING;
    if (!atomic_compare_exchange_strong_explicit(&request->state, &state,
                                                 from_within ? UH_ANSWERED_WITHIN : UH_ANSWERED,
                                                 memory_order_acq_rel, memory_order_acquire))
        return false;
    if (!from_within && uh_channel_reserve(channel, false))
        uh_channel_commit(channel, entry);
    return true;
}

void uh_answer(struct upcall_request *req, uint32_t verdict, int32_t status) {
    struct uh_request *request = (struct uh_request *)(void *)req;
    struct upcall_host *host = request->channel->host;
    /* Before the exchange: after it, an early-answered request may be gone. */
    struct wire_completion entry = verdict_entry(request, verdict, status);
    uint32_t state;
    do {
        state = UH_HELD;
        if (atomic_compare_exchange_strong_explicit(&request->state, &state, UH_ANSWERED,
                                                    memory_order_acq_rel, memory_order_acquire)) {
            put_verdict(request, &entry);
            return;
        }
        if (state == UH_RUNNING && answer_early(request, &entry))
            return;
    } while (state == UH_RUNNING);
    uh_logf(host, NULL, UPCALL_LOG_ERROR, "the filter answered a request that it does not hold");
}

/* ---- looking at all requests; with `serve` of all channels held, or no thread left ---- */

static struct uh_chunk *chunks_of(struct upcall_host *host, uint32_t number) {
    struct uh_channel *channel = atomic_load(&host->channels[number]);
    return channel ? channel->chunks : NULL;
}

#define FOR_EACH_REQUEST(host, request)                                                       \
    for (uint32_t at_ = 0; at_ < atomic_load(&(host)->channel_count); at_++)                  \
        for (struct uh_chunk *chunk_ = chunks_of(host, at_); chunk_; chunk_ = chunk_->next)   \
            for (struct uh_request *request = chunk_->requests;                               \
                 request < chunk_->requests + UH_CHUNK_REQUESTS; request++)

/* Whether the filter has requests of this instance. */
bool uh_requests_with(struct upcall_host *host, const struct upcall_instance *inst) {
    FOR_EACH_REQUEST(host, request)
        if (atomic_load_explicit(&request->state, memory_order_acquire) != UH_FREE &&
            request->instance == inst)
            return true;
    return false;
}

/* Cancels those that are held. */
void uh_requests_cancel(struct upcall_host *host, const struct upcall_instance *inst) {
    FOR_EACH_REQUEST(host, request)
        if (atomic_load_explicit(&request->state, memory_order_acquire) == UH_HELD &&
            request->instance == inst && host->table.cancel)
            host->table.cancel(inst->self, request->req.context);
}
