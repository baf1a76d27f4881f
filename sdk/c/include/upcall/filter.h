/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * upcall/filter.h: the contract between Upcall and a filter.
 *
 * A filter is a shared object that exports one table, `struct upcall_filter`,
 * under the name `upcall_filter` (UPCALL_EXPORT_FILTER does it). Upcall loads it
 * into a process of its own, the filter host, and calls the table's functions;
 * the filter calls back through `struct upcall_services`, which it is handed in
 * load().
 *
 * This file is the reference manual. It compiles alone, as C11 and as C++11,
 * for 32 and for 64 bits, from the same source.
 *
 * THE LIFE OF A REQUEST
 *
 *   guest -> [start_io of slot 0] -> [start_io of slot 1] -> ... -> store
 *   guest <- [io_done  of slot 0] <- [io_done  of slot 1] <- ... <- store
 *
 * start_io() answers with a verdict. Filters that answered UPCALL_WATCH see the
 * completion in io_done(), the one nearest to the store first. A filter that
 * answered DONE or FAIL does not see its own completion, and the filters below
 * it never saw the request.
 *
 * THREADS
 *
 * Callbacks are re-entrant: the filter host has one thread for each queue of the
 * disk, and all of them call at once. One request is never in two callbacks at
 * the same time, with one exception: cancel() may run while another thread of
 * the filter is about to answer(); see cancel(). load() and unload() run alone.
 * Timers, watched descriptors and blocking work have threads of their own.
 * A callback must not block: a blocked start_io() stops one queue of the disk.
 * Use hold and run_blocking().
 *
 * NUMBERS
 *
 * Offsets and lengths are in bytes and multiples of the disk's block size. A
 * request is never longer than 2147483136 bytes (0x7ffffe00), and one that
 * carries data (read, write) never longer than 4 MiB.
 * Errors are negative errno values of Linux, as in -EIO.
 */
#ifndef UPCALL_FILTER_H
#define UPCALL_FILTER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define UPCALL_ALIGN8 alignas(8)
extern "C" {
#else
#define UPCALL_ALIGN8 _Alignas(8)
#endif

/*
 * The version of this contract: (major << 16) | minor. A filter is refused if
 * its major differs from the framework's, or if its minor is newer. A filter
 * built against an older minor keeps working: every struct begins with its size
 * as its author compiled it, and what lies beyond is taken as zero.
 *
 * 1.1: UPCALL_FILTER_SIDECAR; sidecar_read(), sidecar_write(), sidecar_sync().
 * 1.2: upcall_filter.save_state, load_state; events ATTACH and DETACH, MIGRATE_OUT and
 *      MIGRATE_IN.
 * 1.3: UPCALL_FILTER_EXTENTS; extents().
 */
#define UPCALL_ABI_MAJOR 1u
#define UPCALL_ABI_MINOR 3u
#define UPCALL_ABI_VERSION ((UPCALL_ABI_MAJOR << 16) | UPCALL_ABI_MINOR)

/* Operations. In masks, use UPCALL_OP_BIT. */
enum {
    UPCALL_READ = 1,
    UPCALL_WRITE = 2,
    UPCALL_FLUSH = 3,
    UPCALL_DISCARD = 4,      /* the range reads as zeroes afterwards */
    UPCALL_WRITE_ZEROES = 5  /* likewise; may stay allocated unless UPCALL_REQ_UNMAP */
};
#define UPCALL_OP_BIT(op) (1u << (op))

/*
 * Classes. A filter's place in the chain is decided by its class, in this order
 * from the guest to the store, and inside a class by a number that the operator
 * gives.
 */
enum {
    UPCALL_CLASS_INSPECTION = 1,
    UPCALL_CLASS_COMPRESSION = 2,
    UPCALL_CLASS_ENCRYPTION = 3,
    UPCALL_CLASS_REPLICATION = 4,
    UPCALL_CLASS_CACHE = 5,
    UPCALL_CLASS_PROVIDER = 6,
    UPCALL_CLASS_QOS = 7,
    UPCALL_CLASS_CAPTURE = 8
};

/*
 * Verdicts: what start_io(), io_done() and answer() may say.
 *
 *              from start_io / answer          from io_done / answer
 * PASS         go on down, do not call me      go on up with req->status
 *              on completion
 * WATCH        go on down, call io_done()      (a violation)
 * DONE         I answered it: success, go up   go on up with success
 * FAIL         go up with req->status, which   go on up with req->status,
 *              must be a negative errno        which must be a negative errno
 * HOLD         I will answer() later           I will answer() later
 *
 * DONE from start_io is allowed only for operations in `answers`. Anything else
 * is a violation: the request fails with -EIO and the violation is counted.
 */
enum {
    UPCALL_PASS = 0,
    UPCALL_WATCH = 1,
    UPCALL_DONE = 2,
    UPCALL_FAIL = 3,
    UPCALL_HOLD = 4
};

/* upcall_request.flags, upcall_issue.flags */
#define UPCALL_REQ_FUA 1u    /* write, discard, write zeroes: durable before it completes */
#define UPCALL_REQ_UNMAP 2u  /* write zeroes: may deallocate */
#define UPCALL_REQ_RETRY 4u  /* delivered before, to an instance that is gone */

/*
 * One request, as one filter sees it. It belongs to the filter from the call of
 * start_io() or io_done() until the filter has answered it (a verdict other than
 * HOLD, or answer()), and must not be touched after that. The next call for the
 * same request may bring another address.
 */
struct upcall_request {
    uint32_t size;    /* of this struct, in bytes */
    uint8_t op;       /* UPCALL_READ ... */
    uint8_t reserved0;
    uint16_t flags;   /* UPCALL_REQ_... */
    UPCALL_ALIGN8 uint64_t offset; /* bytes from the start of the disk */
    uint32_t length;  /* bytes; 0 for flush */
    int32_t status;   /* io_done: 0, or a negative errno; the filter may change it */
    /*
     * The data, `length` bytes, or NULL where there is none to see: the filter did
     * not ask for it (`sees`, `changes`), or there is none yet (read on its way
     * down, unless the operation is in `answers`) or none any more (write on its
     * way up). If the operation is not in `changes` (nor, for reads, in
     * `answers`), the page is mapped read-only when the filter changes nothing at
     * all, and must not be written in any case.
     */
    void *data;
    /*
     * The filter's own: NULL in start_io(); what is stored here comes back in
     * io_done() and cancel(). NULL again in an io_done() marked UPCALL_REQ_RETRY.
     */
    void *context;
};

struct upcall_instance; /* one filter on one disk; the framework's */
struct upcall_timer;
struct upcall_watch;

/* What an instance's disk is. */
struct upcall_disk {
    uint32_t size;         /* of this struct, in bytes */
    uint32_t block_size;   /* bytes; a power of two, at least 512 */
    UPCALL_ALIGN8 uint64_t capacity; /* bytes */
    uint32_t read_only;    /* 0 or 1 */
    uint32_t reserved0;
};

/* A request of the filter's own; see upcall_services.issue. */
struct upcall_issue {
    uint32_t size;      /* of this struct, in bytes: sizeof(struct upcall_issue) */
    uint8_t op;         /* UPCALL_READ ... */
    uint8_t reserved0;
    uint16_t flags;     /* UPCALL_REQ_FUA, UPCALL_REQ_UNMAP */
    UPCALL_ALIGN8 uint64_t offset;
    uint32_t length;
    uint32_t disk;      /* 0: the instance's own disk, below it; n: the n-th granted disk */
    void *data;         /* of buffer_alloc(); NULL unless read or write */
    /*
     * Called once when the request has ended, on a thread of the framework, with
     * 0 or a negative errno. `data` may be reused or freed from then on.
     */
    void (*done)(void *arg, int32_t status);
    void *arg;
};

/* What a stretch of a disk is; see upcall_services.extents. */
enum {
    UPCALL_EXTENT_DATA = 0, /* anything */
    UPCALL_EXTENT_ZERO = 1, /* takes space and reads as zeroes */
    UPCALL_EXTENT_HOLE = 2  /* takes no space and reads as zeroes */
};

/* Since 1.3. */
struct upcall_extent {
    UPCALL_ALIGN8 uint64_t length; /* bytes; whole blocks, not 0 */
    uint32_t kind;                 /* UPCALL_EXTENT_... */
    uint32_t reserved0;
};

/* Most extents that are said at once. */
#define UPCALL_EXTENTS_MAX 1024u

/* Levels of log(). */
enum { UPCALL_LOG_ERROR = 1, UPCALL_LOG_WARN = 2, UPCALL_LOG_INFO = 3, UPCALL_LOG_DEBUG = 4 };

/* Types of parameters. */
enum {
    UPCALL_PARAM_INT = 1,       /* min..max */
    UPCALL_PARAM_BOOL = 2,      /* true, false, yes, no, on, off, 1, 0 */
    UPCALL_PARAM_STRING = 3,    /* min..max bytes */
    UPCALL_PARAM_SIZE = 4,      /* bytes, with an optional K, M, G or T (of 1024); min..max */
    UPCALL_PARAM_MILLIS = 5,    /* milliseconds, or with ms, s, m or h behind; min..max */
    UPCALL_PARAM_CHOICE = 6,    /* one of `choices` */
    UPCALL_PARAM_FRACTION = 7,  /* 0 to 1, as in 0.25; read it with param_string() */
    UPCALL_PARAM_FILE_READ = 8, /* a file, opened by the framework for reading */
    UPCALL_PARAM_FILE_APPEND = 9, /* likewise for appending; created if missing */
    UPCALL_PARAM_ADDRESS = 10   /* unix:PATH or HOST:PORT, connected by the framework */
};

/*
 * One parameter that the operator may set. Values are checked against this
 * declaration before the filter is opened; a wrong one never reaches it.
 */
struct upcall_param {
    uint32_t size;             /* of this struct, in bytes */
    uint32_t type;             /* UPCALL_PARAM_... */
    const char *name;          /* a-z, 0-9 and _; at most 31 bytes */
    const char *doc;           /* one sentence for people */
    const char *default_value; /* as the operator would write it; NULL: must be given,
                                  except for files and addresses, which are then absent */
    const char *choices;       /* CHOICE: "one|two|three"; else NULL */
    UPCALL_ALIGN8 int64_t min; /* INT, SIZE, MILLIS: value; STRING: bytes */
    int64_t max;               /* both 0: any value */
};

/*
 * What the framework does for a filter. Every function may be called from any
 * thread, at any time between load() and unload(), except where it says so.
 */
struct upcall_services {
    uint32_t size; /* of this struct, in bytes */
    uint32_t abi_version;

    /*
     * Answers a request for which start_io() or io_done() returned UPCALL_HOLD.
     * Exactly once per hold; may be called even before that function returns, in
     * which case its UPCALL_HOLD means "already answered". Never blocks.
     * @status counts only for UPCALL_FAIL and, after io_done(), UPCALL_PASS.
     */
    void (*answer)(struct upcall_request *req, uint32_t verdict, int32_t status);

    /*
     * Issues a request of the filter's own. It enters the chain just below the
     * instance, or on a granted disk, and is never seen by the issuer. Returns 0,
     * and io->done is called once, later; or a negative errno, and it is not:
     *   -EINVAL  malformed: op, alignment, range, or data not of buffer_alloc()
     *   -EAGAIN  too many in flight (256 per instance); try again after a done
     *   -EPERM   the table lacks UPCALL_FILTER_ISSUES
     *   -ENODEV  no such granted disk
     *   -ESHUTDOWN  the instance is closing
     * @io is copied.
     */
    int32_t (*issue)(struct upcall_instance *inst, const struct upcall_issue *io);

    /*
     * Memory for the data of issued requests, aligned to 4096 bytes; at most 4 MiB
     * at once and 16 MiB in all instances of a filter in one VM. NULL if there is
     * none left just now. What is not freed when close() returns is taken back.
     */
    void *(*buffer_alloc)(struct upcall_instance *inst, uint32_t length);
    void (*buffer_free)(struct upcall_instance *inst, void *data);

    /* The instance's disk, and granted disk @index (from 1), or NULL. Valid until close(). */
    const struct upcall_disk *(*disk)(struct upcall_instance *inst, uint32_t index);

    /*
     * Parameters, by name; valid from open() to close(). INT, SIZE and MILLIS by
     * param_int(), BOOL as 0 or 1. param_string() gives any value as text, NULL for
     * an unknown name. param_fd() gives the descriptor of a file or address, which
     * stays the framework's, or -1 if none was given.
     */
    int64_t (*param_int)(struct upcall_instance *inst, const char *name);
    const char *(*param_string)(struct upcall_instance *inst, const char *name);
    int (*param_fd)(struct upcall_instance *inst, const char *name);

    /*
     * Calls fn(arg) on the timer thread after @delay_ms, then every @period_ms if
     * that is not 0. timer_stop() frees it, and must be called once for every
     * timer; when it returns, fn does not run and will not run again (called from
     * fn itself: will not run again). NULL if out of memory.
     */
    struct upcall_timer *(*timer_start)(struct upcall_instance *inst, uint64_t delay_ms,
                                        uint64_t period_ms, void (*fn)(void *arg), void *arg);
    void (*timer_stop)(struct upcall_timer *timer);

    /*
     * Calls fn(arg, revents) on the timer thread while @fd is ready for @events (as
     * of poll(2)). watch_stop() as timer_stop().
     */
    struct upcall_watch *(*watch_start)(struct upcall_instance *inst, int fd, uint32_t events,
                                        void (*fn)(void *arg, uint32_t revents), void *arg);
    void (*watch_stop)(struct upcall_watch *watch);

    /*
     * Runs fn(arg) once on one of up to 8 threads, where it may block. For work that ends:
     * close() waits for it. 0; or -ENOMEM; or -ESHUTDOWN, from close() on.
     */
    int32_t (*run_blocking)(struct upcall_instance *inst, void (*fn)(void *arg), void *arg);

    /*
     * counter() names a counter of the instance (at most 47 bytes; the same name
     * gives the same counter; at most 63) and returns its handle, or -1.
     * counter_add() is a few nanoseconds. `upcall top` shows them.
     */
    int32_t (*counter)(struct upcall_instance *inst, const char *name);
    void (*counter_add)(struct upcall_instance *inst, int32_t counter, uint64_t delta);

    /* One line to the worker's log; cut at 500 bytes, dropped when too many. @inst may be NULL. */
    void (*log)(struct upcall_instance *inst, uint32_t level, const char *text);

    /*
     * Since 1.1. The sidecar: a small state of the instance's own, at most
     * UPCALL_SIDECAR_MAX bytes, that travels with the disk. It is found again after
     * a restart of the filter, of the worker and of the host, and where the disk is
     * moved together with it. For a table with UPCALL_FILTER_SIDECAR; else -ENOTSUP.
     * From open() (in it, too) until close() returns, from any thread.
     *
     * sidecar_read() gives the length of the state, 0 in the beginning, and copies its
     * first @size bytes. What it gives in open() is durable. -EIO: the state is
     * damaged, not empty; a new one may be written.
     *
     * sidecar_write() replaces the whole state, in memory only. 0, or -E2BIG.
     *
     * sidecar_sync() makes the state as last written durable, at once and as a whole:
     * when it returns 0, a crash leaves this state or a later one; until then, the
     * one before or this one, never a mix. It blocks for IO: call it from open(),
     * close(), run_blocking() or a thread of your own. A negative errno (-EIO, -ENOSPC):
     * a crash still leaves the state before or this one; try again.
     */
    int32_t (*sidecar_read)(struct upcall_instance *inst, void *buf, uint32_t size);
    int32_t (*sidecar_write)(struct upcall_instance *inst, const void *data, uint32_t length);
    int32_t (*sidecar_sync)(struct upcall_instance *inst);

    /*
     * Since 1.3. What a range of a disk is, as its store knows it: of the instance's own
     * disk (@disk 0), what lies below the instance; of the n-th granted one, all of it. For a
     * table with UPCALL_FILTER_EXTENTS. Puts at most @max and UPCALL_EXTENTS_MAX extents in a
     * row, which begin at @offset, at @entries, and returns how many, at least one. They
     * may say less than @length bytes; ask again for the rest.
     *
     * It is DATA when nobody knows, or nobody answers within some seconds; and where a
     * filter below decides data (`changes`, `answers`), for what the store has is then not
     * what the instance reads. Writes that have completed below are in it; of those in flight
     * nothing is promised. A change of the chain can make it wrong: ask again after UNSTUN.
     *
     * It blocks. Call it from open(), run_blocking() or a thread of your own.
     *   -EINVAL   not whole blocks of the disk, empty, or no room at @entries
     *   -EDEADLK  called in start_io(), io_done() or done(), which must not block
     *   -EPERM    the table lacks UPCALL_FILTER_EXTENTS
     *   -ENODEV   no such granted disk
     */
    int32_t (*extents)(struct upcall_instance *inst, uint32_t disk, uint64_t offset,
                       uint64_t length, struct upcall_extent *entries, uint32_t max);
};

/* Most bytes of a sidecar. */
#define UPCALL_SIDECAR_MAX 65536u

/* Most bytes of a state that one instance hands to the next; see upcall_filter.save_state. */
#define UPCALL_STATE_MAX 1048576u

/*
 * Events; see upcall_filter.event. A filter answers within a second, or counts as one that
 * hangs. One that it does not know, it answers with 0.
 */
enum {
    /*
     * The disk stands still: no request is in flight, and none comes until UNSTUN. To
     * refuse it gives the chain change up for which it is.
     */
    UPCALL_EVENT_STUN = 1,
    UPCALL_EVENT_UNSTUN = 2, /* requests come again */
    /* Since 1.2: the instance joins the chain of a disk that is in use; after load_state(). */
    UPCALL_EVENT_ATTACH = 3,
    /* Since 1.2: it leaves the chain, and nobody takes its place; before close(). */
    UPCALL_EVENT_DETACH = 4,
    /*
     * Since 1.2: the disk's guest moves to another host; no request is in flight. What
     * save_state() gives next, before close(), goes with it. An error changes nothing.
     */
    UPCALL_EVENT_MIGRATE_OUT = 5,
    /*
     * Since 1.2: the guest has come from another host, or back as it could not stay there; after
     * load_state(), which is called only if the instance there had saved something.
     */
    UPCALL_EVENT_MIGRATE_IN = 6
};

/* upcall_filter.flags */
#define UPCALL_FILTER_ISSUES 1u  /* issues requests of its own */
#define UPCALL_FILTER_SIDECAR 2u /* since 1.1: keeps a state of its own; see sidecar_read() */
#define UPCALL_FILTER_EXTENTS 4u /* since 1.3: asks for extents() */

/*
 * The table that a filter exports. Functions that are not needed are NULL; only
 * start_io is required.
 */
struct upcall_filter {
    uint32_t size;        /* sizeof(struct upcall_filter) */
    uint32_t abi_version; /* UPCALL_ABI_VERSION */
    const char *name;     /* a-z, 0-9 and -; at most 31 bytes */
    const char *version;
    const char *vendor;
    const char *summary;  /* one line */
    uint32_t filter_class; /* UPCALL_CLASS_... */
    uint32_t flags;       /* UPCALL_FILTER_... */
    /*
     * Masks of UPCALL_OP_BIT. `ops`: start_io() is called for these. `sees`: with
     * the data mapped. `changes`: with the data mapped, and the filter may change
     * it, of a write on its way down, of a read on its way up. `answers`: it may
     * say DONE. All are parts of `ops`; `sees` and `changes` of read and write
     * only, and `ops` is not empty.
     *
     * A filter with `changes` or `answers` decides what is on the disk, so nothing
     * slips past it: it must declare both read and write; write-zeroes that it
     * does not declare is done with writes; discard that it does not declare is not
     * offered to the guest; flush, which carries no data, passes it by. A filter
     * that answers write, discard or write-zeroes must declare flush: what it
     * answered is durable when it completes a flush, and that is its promise.
     */
    uint32_t ops;
    uint32_t sees;
    uint32_t changes;
    uint32_t answers;
    uint32_t param_count;
    const struct upcall_param *params;

    /*
     * Once per filter host. load(): 0, or a negative errno: the filter is not used.
     * unload(): when it returns, the threads that the filter made have ended. From load()
     * on, the filter must not open files by path; what it needs comes by parameters.
     */
    int32_t (*load)(const struct upcall_services *services);
    void (*unload)(void);

    /*
     * One instance begins and ends. open() stores what the other callbacks get as
     * @self. 0, or a negative errno: the disk is not served; say why with log().
     * close() is called once after a successful open(), when no request of the
     * instance is with the filter, its issued requests have ended and its blocking
     * work has returned. It must stop the instance's timers and watches. It may block.
     */
    int32_t (*open)(struct upcall_instance *inst, void **self);
    void (*close)(void *self);

    /* A request on its way down. Returns a verdict. */
    uint32_t (*start_io)(void *self, struct upcall_request *req);

    /* A watched request on its way up. Returns PASS, DONE, FAIL or HOLD. */
    uint32_t (*io_done)(void *self, struct upcall_request *req);

    /*
     * The request, which the filter holds, is no longer wanted (guest reset). The
     * filter answers it within two seconds, in its own way; the answer only frees it. A
     * filter that does not may be ended. May come
     * after the filter has called answer() but before that has arrived: use
     * @context, not @req, to find what is meant, and ignore what is not held any
     * more. @context is what the filter stored in req->context.
     * A filter that answers WATCH all the same still gets its io_done(), with
     * -ECANCELED: it is where contexts are freed.
     */
    void (*cancel)(void *self, void *context);

    /* UPCALL_EVENT_...; 0, or a negative errno to refuse. */
    int32_t (*event)(void *self, uint32_t event);

    /*
     * Since 1.2. What an instance keeps in memory goes on in the one that takes its place when
     * the filter is replaced (by a newer version, or with other parameters) while the disk
     * is in use. No request is with the filter then.
     *
     * save_state(): called before close(). Puts the state at @buf, at most @size bytes
     * (UPCALL_STATE_MAX), and returns its length; -ENOTSUP: there is nothing to hand over;
     * another negative errno: the filter is not replaced now. It goes on serving if the change
     * is given up: then the same state comes back to another instance of it.
     *
     * load_state(): called once after open() and before the first request, and only with what a
     * save_state() of this filter (by name) gave, of any version. The instance before is
     * closed by then. 0, or a negative errno: the change is given up. Not called where there is
     * nothing to take over: after a crash a filter has its sidecar alone.
     *
     * No two instances of one slot are ever open at once.
     */
    int32_t (*save_state)(void *self, void *buf, uint32_t size);
    int32_t (*load_state)(void *self, const void *buf, uint32_t length);
};

/*
 * The one symbol that a filter exports; UPCALL_EXPORT_FILTER = { ... }; defines it. In C++,
 * where a constant is otherwise private to its file, this declaration makes it public.
 */
extern __attribute__((visibility("default"))) const struct upcall_filter upcall_filter;
#define UPCALL_EXPORT_FILTER const struct upcall_filter upcall_filter

#ifdef __cplusplus
}
#endif
#endif
