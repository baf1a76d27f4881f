/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The parts of a filter host and their borders. Private to this folder.
 *
 *   control.c   takes messages off the control socket, and calls
 *   library.c   loads the filter and checks its table;  describe.c says what it is
 *   memory.c    maps what the worker sends: arenas, channels, counters
 *   instance.c  opens and closes instances;  params.c, counters.c, sidecar.c,
 *               extents.c are part of these
 *   channel.c   the two rings, and the thread that serves them, which calls
 *   request.c   one delivery: callback, verdict, hold, answer()
 *   issue.c     requests of the filter's own;  buffers.c the memory for their data
 *   timers.c, blocking.c, log.c   services that stand alone
 *   confine.c   what a process of its own gives up before it loads a filter
 *   points.c    points of its work at which tests let it die
 *   host.c      the whole: new, run, free, and the table of services
 *
 * THREADS. The control thread runs everything that messages ask for. A channel has one
 * thread (inline: the worker's). There is one timer thread and up to eight for blocking
 * work, both started when first needed. A filter may call services from threads of
 * its own.
 *
 * LOCKS. `serve` of a channel is held while its thread is in callbacks; whoever
 * holds it of all channels knows that none runs. `out` of a channel guards the
 * producer side of its completion ring and is a leaf; so are the locks of timers, pool,
 * buffers, counters and instances. No callback is called with any lock but `serve`.
 *
 * TRUST. The worker is trusted more than the filter, but nothing it says can make this
 * process touch memory outside what it mapped. The filter is in here with us: checks
 * against it find mistakes, they do not stop attacks. That is the worker's job.
 */
#ifndef UPCALL_HOST_H
#define UPCALL_HOST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define _FILE_OFFSET_BITS 64

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <upcall/filter.h>

#include "inline.h"
#include "wire.h"

#define UH_CHANNELS_MAX 1024u
#define UH_ARENAS_MAX 1024u
#define UH_INSTANCES_MAX 4096u
#define UH_DISKS_MAX 16u
#define UH_POOL_THREADS 8u
#define UH_PAGE 4096u
#define UH_TEXT_SIZE 1024u

/* Work for the pool. */
struct uh_job {
    struct uh_job *next;
    void (*run)(struct uh_job *job);
    struct upcall_instance *instance; /* NULL: the host's own */
    void (*fn)(void *arg);
    void *arg;
};

/*
 * Where a request is. FREE -> RUNNING (in a callback) -> FREE; or RUNNING -> HELD ->
 * ANSWERED -> FREE; or, when answer() comes before the callback has returned, RUNNING ->
 * ANSWERED -> FREE (from another thread) or RUNNING -> ANSWERED_WITHIN -> FREE.
 */
enum uh_request_state { UH_FREE, UH_RUNNING, UH_HELD, UH_ANSWERED, UH_ANSWERED_WITHIN };

/* One delivery. Lives in the chunks of its channel, and is never unmapped before the host. */
struct uh_request {
    _Alignas(64) struct upcall_request req; /* first: what the filter sees */
    _Atomic uint32_t state;
    uint32_t phase; /* WIRE_START or WIRE_DONE */
    uint64_t token;
    struct uh_channel *channel;
    struct upcall_instance *instance;
    struct uh_request *next;
    /* A verdict given from within the callback; or one that found the ring full where
       waiting for room would be waiting for oneself. */
    struct uh_job late_job;
    struct wire_completion late;
};

#define UH_CHUNK_REQUESTS 64u
#define UH_CHUNKS_MAX 1024u

struct uh_chunk {
    struct uh_chunk *next;
    struct uh_request requests[UH_CHUNK_REQUESTS];
};

struct uh_channel {
    struct upcall_host *host;
    uint32_t disk; /* number of the disk whose queue it serves */
    int doorbell;        /* ours */
    int worker_doorbell;
    bool served;
    pthread_t thread;

    /* The memfd. */
    unsigned char *base;
    size_t size;
    uint32_t entries;
    struct wire_submission *submissions;
    struct wire_completion *completions;

    /* Consumer of submissions: the channel's thread. */
    _Alignas(64) pthread_mutex_t serve;
    uint32_t taken;
    bool bell_due; /* entries were put in since the worker was last looked after */
    uint64_t patience_ns;
    uint32_t crowded; /* not 0: others want this core; see poll_then_yield() */
    struct uh_request *free;
    struct uh_chunk *chunks;
    uint32_t chunk_count;

    /* Producer of completions: any thread, with `out`. */
    _Alignas(64) pthread_mutex_t out;
    uint32_t put;
    uint32_t worker_head; /* as last seen */

    _Alignas(64) _Atomic(struct uh_request *) freed; /* by answer() */
};

/* A request that the filter issued. */
struct uh_issued {
    void (*done)(void *arg, int32_t status);
    void *arg;
    uint32_t generation;
    bool in_use;
    uint16_t next_free;
    struct uh_job late_job;
    struct uh_channel *channel;
    struct wire_completion late;
};

struct uh_parameter {
    char *name;
    char *value;
    int64_t number;
    int fd;
};

/* An instance's own durable state; see sidecar.c. */
struct uh_sidecar {
    pthread_mutex_t syncing; /* one sync at a time; taken before `lock` */
    pthread_mutex_t lock;    /* the state in memory */
    int fd;                  /* -1: the instance has none */
    int error;               /* what reading says until something is written */
    unsigned char *state;    /* WIRE_SIDECAR_MAX bytes */
    uint32_t length;
    uint64_t changes;        /* writes so far; */
    uint64_t synced;         /* and as of the last good sync */
    /* With `syncing`: */
    unsigned char *slot;     /* a slot as it is written */
    uint64_t sequence;       /* the last that was tried */
    uint32_t newest;         /* the slot that is known to be good */
};

/* The way to ask what a disk consists of; see extents.c. */
struct uh_extents {
    pthread_mutex_t lock; /* one question at a time */
    int fd;               /* -1: nobody can be asked */
    uint64_t number;      /* of the last question */
    unsigned char *answer;
};

/* CLOSING: as OPEN, but nothing new may be issued. CLOSED: no callback any more. */
enum uh_instance_state { UH_INSTANCE_NONE, UH_INSTANCE_OPENING, UH_INSTANCE_OPEN,
                         UH_INSTANCE_CLOSING, UH_INSTANCE_CLOSED };

/* Kept when closed, and used again when its number is; so a stale number finds no freed memory. */
struct upcall_instance {
    struct upcall_host *host;
    uint32_t number;
    _Atomic uint32_t state;
    void *self;

    uint32_t arena; /* number of its disk */
    unsigned char *arena_base;
    uint64_t arena_size;

    struct upcall_disk disks[UH_DISKS_MAX];
    uint32_t disk_count;
    struct uh_parameter *parameters;
    uint32_t parameter_count;

    struct wire_counter *counters;
    _Atomic uint32_t counter_count;

    pthread_mutex_t lock; /* counters' names; issued */
    struct uh_issued issued[WIRE_ISSUED_MAX];
    uint16_t issued_free;
    uint32_t issued_count;
    _Atomic uint32_t next_channel;

    struct uh_sidecar sidecar;
    struct uh_extents extents;

    uint32_t jobs; /* under the pool's lock */
};

struct uh_arena {
    unsigned char *base; /* NULL: none */
    uint64_t size;
};

struct uh_buffers {
    pthread_mutex_t lock;
    unsigned char *base;
    uint32_t pages;
    uint16_t *owner; /* of each page: number of the instance + 1, or 0 */
    uint32_t *length; /* pages of the buffer that begins here, or 0 */
};

struct uh_timers {
    pthread_mutex_t lock;
    pthread_cond_t idle; /* `running` changed */
    pthread_t thread;
    bool started, stop;
    int wake; /* eventfd */
    struct upcall_timer *timers; /* soonest first */
    struct upcall_watch *watches;
    uint32_t watch_count;
    uint64_t next_id;
    const void *running;      /* the timer or watch whose fn runs */
    bool running_stopped;     /* and was stopped by its own fn */
};

struct uh_pool {
    pthread_mutex_t lock;
    pthread_cond_t work;
    pthread_t threads[UH_POOL_THREADS];
    uint32_t thread_count, idle;
    struct uh_job *first, **last;
    bool stop;
};

struct uh_log {
    pthread_mutex_t lock;
    uint64_t second;
    uint32_t lines; /* in this second */
    uint32_t dropped;
};

struct upcall_host {
    int control_fd;
    int filter_fd;
    char *filter_path;
    bool inline_mode;

    void *library;
    struct upcall_filter table; /* a copy, complete */
    struct upcall_param *params; /* copies, complete */
    bool loaded;
    bool abandoned;

    struct upcall_services services;
    struct uh_arena arenas[UH_ARENAS_MAX];
    struct uh_buffers buffers;
    _Atomic(struct uh_channel *) channels[UH_CHANNELS_MAX];
    _Atomic uint32_t channel_count; /* highest number + 1 */
    _Atomic(struct upcall_instance *) instances[UH_INSTANCES_MAX];
    struct uh_timers timers;
    struct uh_pool pool;
    struct uh_log log;
    _Atomic bool stopping; /* channels end; what would wait for the worker gives up */
    char text[UH_TEXT_SIZE]; /* of the result of the current message */
};

/* A message of the worker. Descriptors that a handler keeps it replaces by -1. */
struct uh_message {
    struct wire_header header;
    const unsigned char *payload;
    size_t length;
    int fds[WIRE_DESCRIPTORS_MAX];
    uint32_t fd_count;
};

/* Reads a payload from its beginning; nothing is read past its end. */
struct uh_reader {
    const unsigned char *at;
    size_t left;
};
bool uh_read(struct uh_reader *reader, void *into, size_t length);

/* control.c */
int uh_control_serve(struct upcall_host *host); /* 1: QUIT; 0: the socket ended */
bool uh_control_hung_up(struct upcall_host *host, int timeout_ms);
__attribute__((format(printf, 3, 4)))
int uh_fail(struct upcall_host *host, int error, const char *format, ...);

/* library.c, describe.c: 0, or a negative errno with host->text */
int uh_library_open(struct upcall_host *host);
void uh_library_close(struct upcall_host *host);
int uh_describe(struct upcall_host *host, char **json, size_t *length);

/* memory.c */
void *uh_map(int fd, uint64_t size, bool writable); /* NULL and errno */
int uh_memory_arena(struct upcall_host *host, struct uh_message *message);
int uh_memory_issue_arena(struct upcall_host *host, struct uh_message *message);
int uh_memory_channel(struct upcall_host *host, struct uh_message *message);
void uh_memory_free(struct upcall_host *host);

/* instance.c */
struct upcall_instance *uh_instance(struct upcall_host *host, uint32_t number);
int uh_instance_open(struct upcall_host *host, struct uh_message *message);
int uh_instance_event(struct upcall_host *host, struct uh_message *message);
int uh_instance_close(struct upcall_host *host, struct uh_message *message);
int uh_instance_save(struct upcall_host *host, struct uh_message *message); /* its length */
int uh_instance_load(struct upcall_host *host, struct uh_message *message);
int uh_instances_abandon(struct upcall_host *host); /* the worker is gone: 0 or -EBUSY */
void uh_instances_free(struct upcall_host *host);
const struct upcall_disk *uh_disk(struct upcall_instance *inst, uint32_t index);

/* params.c */
int uh_params_read(struct upcall_host *host, struct upcall_instance *inst, uint32_t count,
                   struct uh_reader *reader, int *files, uint32_t file_count);
void uh_params_free(struct upcall_instance *inst);
int64_t uh_param_int(struct upcall_instance *inst, const char *name);
const char *uh_param_string(struct upcall_instance *inst, const char *name);
int uh_param_fd(struct upcall_instance *inst, const char *name);

/* sidecar.c */
void uh_sidecar_init(struct upcall_instance *inst);
int uh_sidecar_open(struct upcall_instance *inst, int fd); /* keeps @fd; -ENOMEM */
void uh_sidecar_close(struct upcall_instance *inst);
void uh_sidecar_free(struct upcall_instance *inst);
int32_t uh_sidecar_read(struct upcall_instance *inst, void *buf, uint32_t size);
int32_t uh_sidecar_write(struct upcall_instance *inst, const void *data, uint32_t length);
int32_t uh_sidecar_sync(struct upcall_instance *inst);

/* extents.c */
void uh_extents_init(struct upcall_instance *inst);
int uh_extents_open(struct upcall_instance *inst, int fd); /* keeps @fd; -ENOMEM */
void uh_extents_close(struct upcall_instance *inst);
void uh_extents_free(struct upcall_instance *inst);
int32_t uh_extents(struct upcall_instance *inst, uint32_t disk, uint64_t offset, uint64_t length,
                   struct upcall_extent *entries, uint32_t max);

/* counters.c */
int32_t uh_counter(struct upcall_instance *inst, const char *name);
void uh_counter_add(struct upcall_instance *inst, int32_t counter, uint64_t delta);

/* channel.c */
extern _Thread_local struct upcall_host *uh_current_host; /* NULL on foreign threads */
extern _Thread_local struct uh_channel *uh_current_channel;
int uh_channels_start(struct upcall_host *host);
void uh_channels_stop(struct upcall_host *host);
void uh_channels_lock(struct upcall_host *host); /* `serve` of all */
void uh_channels_unlock(struct upcall_host *host);
/*
 * Takes `out` when there is room for an entry; waits for room. False, without the
 * lock: the host stops, or (with @must_not_wait) there is none.
 */
bool uh_channel_reserve(struct uh_channel *channel, bool must_not_wait);
/* Puts in the entry and gives `out` back; rings the worker's doorbell now or at the batch's end. */
void uh_channel_commit(struct uh_channel *channel, const struct wire_completion *entry);
void uh_channel_cancel(struct uh_channel *channel); /* reserve, undone */
/* Whether this thread is the one that empties the completion ring. */
bool uh_channel_is_ours(const struct uh_channel *channel);
int uh_thread_start(pthread_t *thread, void *(*run)(void *), void *arg);

/* request.c */
int uh_deliver(struct uh_channel *channel, const struct wire_submission *in,
               struct wire_completion *out);
void uh_answer(struct upcall_request *req, uint32_t verdict, int32_t status);
bool uh_requests_with(struct upcall_host *host, const struct upcall_instance *inst);
void uh_requests_cancel(struct upcall_host *host, const struct upcall_instance *inst);
void uh_requests_free(struct uh_channel *channel);

/* issue.c */
int32_t uh_issue(struct upcall_instance *inst, const struct upcall_issue *io);
void uh_issued(struct upcall_instance *inst, const struct wire_submission *in);
bool uh_issued_any(struct upcall_instance *inst);
void uh_issued_abandon(struct upcall_instance *inst);
void uh_issued_init(struct upcall_instance *inst);

/* buffers.c */
void *uh_buffer_alloc(struct upcall_instance *inst, uint32_t length);
void uh_buffer_free(struct upcall_instance *inst, void *data);
/* Where in the issue arena @length bytes at @data are, all of buffers of @inst; or WIRE_NO_DATA. */
uint64_t uh_buffer_offset(struct upcall_instance *inst, const void *data, uint32_t length);
void uh_buffers_reclaim(struct upcall_instance *inst);

/* timers.c */
struct upcall_timer *uh_timer_start(struct upcall_instance *inst, uint64_t delay_ms,
                                    uint64_t period_ms, void (*fn)(void *arg), void *arg);
void uh_timer_stop(struct upcall_timer *timer);
struct upcall_watch *uh_watch_start(struct upcall_instance *inst, int fd, uint32_t events,
                                    void (*fn)(void *arg, uint32_t revents), void *arg);
void uh_watch_stop(struct upcall_watch *watch);
uint32_t uh_timers_reclaim(struct upcall_instance *inst); /* how many were left */
void uh_timers_end(struct upcall_host *host);
int uh_timers_init(struct uh_timers *timers);
uint64_t uh_now_ns(void);

/* blocking.c */
int32_t uh_run_blocking(struct upcall_instance *inst, void (*fn)(void *arg), void *arg);
int uh_pool_put(struct upcall_host *host, struct uh_job *job); /* 0; or -EAGAIN, no thread */
/* If no blocking work of @inst is left, closes it (state CLOSED) and says true. */
bool uh_pool_close(struct upcall_instance *inst);
void uh_pool_end(struct upcall_host *host);
void uh_pool_init(struct uh_pool *pool);

/*
 * points.c: with UPCALL_HOST_POINTS, for tests alone, the host says where in its work it is
 * to a function upcall_test_point() of the filter, which may end the process there. @kind is
 * that of the entry (wire.h), or 0.
 */
enum uh_point {
    UH_POINT_READY = 1, /* a submission is there and was not read */
    UH_POINT_TAKEN,     /* it was copied; the filter has not been called */
    UH_POINT_DECIDED,   /* the filter has returned; nothing is in the ring */
    UH_POINT_PUTTING,   /* an entry is in the ring but for its number, so not yet seen */
    UH_POINT_PUT,       /* it can be seen; the worker was not woken */
    UH_POINT_RELEASED,  /* the submission's place was given back; the worker was not woken */
    UH_POINT_ARENA,     /* a life's beginning: an arena is mapped, */
    UH_POINT_CHANNEL,   /* a channel is, */
    UH_POINT_LOADED,    /* load() has returned, */
    UH_POINT_OPENED,    /* open() has, */
    UH_POINT_SERVING,   /* and the channels' threads run */
    UH_POINT_CLOSING,   /* its end: an instance is to be closed, and is quiet */
    UH_POINT_CLOSED,    /* close() has returned; nobody was told */
    UH_POINT_QUITTING,  /* QUIT was said; unload() is next */
    UH_POINT_SLOT,      /* a sidecar's sync: nothing of a slot is written, */
    UH_POINT_SLOT_HALF, /* half of it is, */
    UH_POINT_SLOT_WHOLE, /* all of it, not durably, */
    UH_POINT_SLOT_SYNCED /* and durably */
};
#ifdef UPCALL_HOST_POINTS
void uh_points_find(void *library);
void uh_point(uint32_t point, uint32_t kind, uint32_t op);
#else
#define uh_points_find(library) ((void)(library))
#define uh_point(point, kind, op) ((void)0)
#endif

/* confine.c: for good; 0 or a negative errno */
int uh_confine(void);

/* log.c */
void uh_log(struct upcall_instance *inst, uint32_t level, const char *text);
__attribute__((format(printf, 4, 5)))
void uh_logf(struct upcall_host *host, const struct upcall_instance *inst, uint32_t level,
             const char *format, ...);

#endif
