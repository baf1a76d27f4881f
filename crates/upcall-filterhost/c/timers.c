/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Timers and watched descriptors: one thread that polls, started when first needed.
 *
 * Always true: one callback runs at a time, without the lock; when a stop returns, the
 * callback neither runs nor will (from within itself: will not again).
 */
#include "host.h"

#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_MS UINT64_C(1000000)
/* Longer delays and periods are this long: ten years. */
#define MS_MAX (UINT64_C(3650) * 86400 * 1000)

struct upcall_timer {
    struct upcall_timer *next;
    struct upcall_instance *instance;
    uint64_t due_ns, period_ns;
    void (*fn)(void *arg);
    void *arg;
};

struct upcall_watch {
    struct upcall_watch *next;
    struct upcall_instance *instance;
    uint64_t id; /* never used again, so that what poll() saw is not taken for another */
    int fd;
    uint32_t events;
    void (*fn)(void *arg, uint32_t revents);
    void *arg;
};

/* What poll() looks at: our eventfd first, then the watches. */
struct looks {
    struct pollfd *fds;
    uint64_t *ids;
    uint32_t count, room;
};

uint64_t uh_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int uh_timers_init(struct uh_timers *timers) {
    pthread_mutex_init(&timers->lock, NULL);
    pthread_cond_init(&timers->idle, NULL);
    timers->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return timers->wake < 0 ? -errno : 0;
}

/* ---- the lists; all with the lock ---- */

static void insert(struct uh_timers *timers, struct upcall_timer *timer) {
    struct upcall_timer **at = &timers->timers;
    while (*at && (*at)->due_ns <= timer->due_ns)
        at = &(*at)->next;
    timer->next = *at;
    *at = timer;
}

static void unlink_timer(struct uh_timers *timers, struct upcall_timer *timer) {
    for (struct upcall_timer **at = &timers->timers; *at; at = &(*at)->next)
        if (*at == timer) {
            *at = timer->next;
            return;
        }
}

static void unlink_watch(struct uh_timers *timers, struct upcall_watch *watch) {
    for (struct upcall_watch **at = &timers->watches; *at; at = &(*at)->next)
        if (*at == watch) {
            *at = watch->next;
            timers->watch_count--;
            return;
        }
}

static struct upcall_watch *watch_of(struct uh_timers *timers, uint64_t id) {
    struct upcall_watch *watch = timers->watches;
    while (watch && watch->id != id)
        watch = watch->next;
    return watch;
}

static void wake(struct uh_timers *timers) {
    uint64_t one = 1;
    ssize_t ignored = write(timers->wake, &one, sizeof(one));
    (void)ignored;
}

/* ---- the thread ---- */

static void begin(struct uh_timers *timers, const void *what) {
    timers->running = what;
    timers->running_stopped = false;
    pthread_mutex_unlock(&timers->lock);
}

static void finish(struct uh_timers *timers, void *what) {
    pthread_mutex_lock(&timers->lock);
    timers->running = NULL;
    if (timers->running_stopped)
        free(what);
    pthread_cond_broadcast(&timers->idle);
}

/* Runs what is due at @now; every timer at most once. */
static void run_due(struct uh_timers *timers, uint64_t now) {
    struct upcall_timer *timer;
    while (!timers->stop && (timer = timers->timers) && timer->due_ns <= now) {
        unlink_timer(timers, timer);
        if (timer->period_ns) {
            timer->due_ns += timer->period_ns;
            if (timer->due_ns <= now)
                timer->due_ns = now + timer->period_ns;
            insert(timers, timer);
        }
        begin(timers, timer);
        timer->fn(timer->arg);
        finish(timers, timer);
    }
}

static void run_ready(struct uh_timers *timers, const struct looks *looks) {
    for (uint32_t i = 1; i < looks->count && !timers->stop; i++) {
        short revents = looks->fds[i].revents;
        struct upcall_watch *watch = revents ? watch_of(timers, looks->ids[i]) : NULL;
        if (!watch)
            continue;
        if (revents & POLLNVAL) /* closed under us: say so once, do not spin */
            watch->fd = -1;
        begin(timers, watch);
        watch->fn(watch->arg, (uint32_t)revents);
        finish(timers, watch);
    }
}

/* Fills in what to look at; without memory, only some of it: the rest next time. */
static void collect(struct uh_timers *timers, struct looks *looks) {
    uint32_t wanted = timers->watch_count + 1;
    if (wanted > looks->room) {
        struct pollfd *fds = realloc(looks->fds, 2 * wanted * sizeof(*fds));
        if (fds)
            looks->fds = fds;
        uint64_t *ids = realloc(looks->ids, 2 * wanted * sizeof(*ids));
        if (ids)
            looks->ids = ids;
        if (fds && ids)
            looks->room = 2 * wanted;
    }
    looks->count = 0;
    if (looks->room == 0)
        return;
    looks->fds[looks->count++] = (struct pollfd){ .fd = timers->wake, .events = POLLIN };
    for (struct upcall_watch *w = timers->watches; w && looks->count < looks->room; w = w->next) {
        looks->fds[looks->count] = (struct pollfd){ .fd = w->fd, .events = (short)w->events };
        looks->ids[looks->count++] = w->id;
    }
}

static void look(struct uh_timers *timers, struct looks *looks, uint64_t now) {
    collect(timers, looks);
    uint64_t wait_ns = timers->timers ? timers->timers->due_ns - now : UINT64_C(3600000000000);
    if (timers->timers && timers->timers->due_ns <= now)
        wait_ns = 0;
    struct timespec timeout = { .tv_sec = (time_t)(wait_ns / 1000000000u % 1000000000u),
                                .tv_nsec = (long)(wait_ns % 1000000000u) };
    pthread_mutex_unlock(&timers->lock);
    int ready = ppoll(looks->fds, looks->count, &timeout, NULL);
    uint64_t wakes;
    if (ready > 0 && looks->fds[0].revents)
        while (read(timers->wake, &wakes, sizeof(wakes)) > 0) {}
    pthread_mutex_lock(&timers->lock);
    if (ready > 0)
        run_ready(timers, looks);
}

static void *timer_thread(void *arg) {
    struct upcall_host *host = arg;
    struct uh_timers *timers = &host->timers;
    struct looks looks = { 0 };
    prctl(PR_SET_NAME, "upcall-timers");
    uh_current_host = host;
    pthread_mutex_lock(&timers->lock);
    while (!timers->stop) {
        run_due(timers, uh_now_ns());
        if (!timers->stop)
            look(timers, &looks, uh_now_ns());
    }
    pthread_mutex_unlock(&timers->lock);
    free(looks.fds);
    free(looks.ids);
    return NULL;
}

/* With the lock. */
static bool start_thread(struct upcall_host *host) {
    struct uh_timers *timers = &host->timers;
    if (!timers->started && !timers->stop)
        timers->started = uh_thread_start(&timers->thread, timer_thread, host) == 0;
    return timers->started;
}

/* With the lock: unlinked already; frees @what when its callback does not run. */
static void retire(struct uh_timers *timers, void *what) {
    bool within = timers->started && pthread_equal(pthread_self(), timers->thread);
    if (timers->running == what && within) {
        timers->running_stopped = true;
        return;
    }
    while (timers->running == what)
        pthread_cond_wait(&timers->idle, &timers->lock);
    free(what);
}

/* ---- services ---- */

struct upcall_timer *uh_timer_start(struct upcall_instance *inst, uint64_t delay_ms,
                                    uint64_t period_ms, void (*fn)(void *arg), void *arg) {
    struct uh_timers *timers = &inst->host->timers;
    struct upcall_timer *timer = calloc(1, sizeof(*timer));
    if (!timer || !fn) {
        free(timer);
        return NULL;
    }
    timer->instance = inst;
    timer->due_ns = uh_now_ns() + (delay_ms < MS_MAX ? delay_ms : MS_MAX) * NS_PER_MS;
    timer->period_ns = (period_ms < MS_MAX ? period_ms : MS_MAX) * NS_PER_MS;
    timer->fn = fn;
    timer->arg = arg;
    pthread_mutex_lock(&timers->lock);
    bool started = start_thread(inst->host);
    if (started)
        insert(timers, timer);
    pthread_mutex_unlock(&timers->lock);
    if (!started) {
        free(timer);
        return NULL;
    }
    wake(timers);
    return timer;
}

void uh_timer_stop(struct upcall_timer *timer) {
    if (!timer)
        return;
    struct uh_timers *timers = &timer->instance->host->timers;
    pthread_mutex_lock(&timers->lock);
    unlink_timer(timers, timer);
    retire(timers, timer);
    pthread_mutex_unlock(&timers->lock);
}

struct upcall_watch *uh_watch_start(struct upcall_instance *inst, int fd, uint32_t events,
                                    void (*fn)(void *arg, uint32_t revents), void *arg) {
    struct uh_timers *timers = &inst->host->timers;
    struct upcall_watch *watch = calloc(1, sizeof(*watch));
    if (!watch || !fn || fd < 0) {
        free(watch);
        return NULL;
    }
    *watch = (struct upcall_watch){ .instance = inst, .fd = fd, .events = events, .fn = fn,
                                    .arg = arg };
    pthread_mutex_lock(&timers->lock);
    bool started = start_thread(inst->host);
    if (started) {
        watch->id = ++timers->next_id;
        watch->next = timers->watches;
        timers->watches = watch;
        timers->watch_count++;
    }
    pthread_mutex_unlock(&timers->lock);
    if (!started) {
        free(watch);
        return NULL;
    }
    wake(timers);
    return watch;
}

void uh_watch_stop(struct upcall_watch *watch) {
    if (!watch)
        return;
    struct uh_timers *timers = &watch->instance->host->timers;
    pthread_mutex_lock(&timers->lock);
    unlink_watch(timers, watch);
    retire(timers, watch);
    pthread_mutex_unlock(&timers->lock);
    wake(timers); /* so that it lets go of the descriptor */
}

/* ---- ends ---- */

/*
 * Stops what a closed instance left. A timer that has fired for the last time and was not
 * stopped is in no list: its memory is lost, once.
 */
uint32_t uh_timers_reclaim(struct upcall_instance *inst) {
    struct uh_timers *timers = &inst->host->timers;
    uint32_t left = 0;
    pthread_mutex_lock(&timers->lock);
    for (struct upcall_timer *t = timers->timers, *next; t; t = next) {
        next = t->next;
        if (t->instance == inst) {
            unlink_timer(timers, t);
            retire(timers, t);
            next = timers->timers; /* the lock was given up */
            left++;
        }
    }
    for (struct upcall_watch *w = timers->watches, *next; w; w = next) {
        next = w->next;
        if (w->instance == inst) {
            unlink_watch(timers, w);
            retire(timers, w);
            next = timers->watches;
            left++;
        }
    }
    pthread_mutex_unlock(&timers->lock);
    return left;
}

void uh_timers_end(struct upcall_host *host) {
    struct uh_timers *timers = &host->timers;
    pthread_mutex_lock(&timers->lock);
    timers->stop = true;
    bool started = timers->started;
    pthread_mutex_unlock(&timers->lock);
    if (started) {
        wake(timers);
        pthread_join(timers->thread, NULL);
        timers->started = false;
    }
    for (struct upcall_timer *next; timers->timers; timers->timers = next) {
        next = timers->timers->next;
        free(timers->timers);
    }
    for (struct upcall_watch *next; timers->watches; timers->watches = next) {
        next = timers->watches->next;
        free(timers->watches);
    }
}
