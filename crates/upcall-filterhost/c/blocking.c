/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Blocking work: a queue and up to UH_POOL_THREADS threads, started when there is more
 * work than idle threads.
 *
 * Always true: what was put in runs once, also when the host ends; an instance's
 * close() is called when none of its work is left, and none can come any more.
 */
#include "host.h"

#include <stdlib.h>
#include <sys/prctl.h>

void uh_pool_init(struct uh_pool *pool) {
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pool->last = &pool->first;
}

/* With the lock; NULL when the pool ends and is empty. */
static struct uh_job *next_job(struct uh_pool *pool) {
    pool->idle++;
    while (!pool->first && !pool->stop)
        pthread_cond_wait(&pool->work, &pool->lock);
    pool->idle--;
    struct uh_job *job = pool->first;
    if (job) {
        pool->first = job->next;
        if (!pool->first)
            pool->last = &pool->first;
    }
    return job;
}

static void *pool_thread(void *arg) {
    struct upcall_host *host = arg;
    struct uh_pool *pool = &host->pool;
    prctl(PR_SET_NAME, "upcall-blocking");
    uh_current_host = host;
    pthread_mutex_lock(&pool->lock);
    for (struct uh_job *job; (job = next_job(pool));) {
        struct upcall_instance *inst = job->instance;
        pthread_mutex_unlock(&pool->lock);
        job->run(job);
        pthread_mutex_lock(&pool->lock);
        if (inst)
            inst->jobs--;
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* With the lock. */
static int put(struct upcall_host *host, struct uh_job *job) {
    struct uh_pool *pool = &host->pool;
    uint32_t waiting = 1;
    for (struct uh_job *j = pool->first; j; j = j->next)
        waiting++;
    if (waiting > pool->idle && pool->thread_count < UH_POOL_THREADS) {
        pthread_t *thread = &pool->threads[pool->thread_count];
        if (uh_thread_start(thread, pool_thread, host) == 0)
            pool->thread_count++;
    }
    if (pool->thread_count == 0)
        return -EAGAIN;
    job->next = NULL;
    *pool->last = job;
    pool->last = &job->next;
    pthread_cond_signal(&pool->work);
    return 0;
}

int uh_pool_put(struct upcall_host *host, struct uh_job *job) {
    pthread_mutex_lock(&host->pool.lock);
    int error = put(host, job);
    pthread_mutex_unlock(&host->pool.lock);
    return error;
}

static void run_and_free(struct uh_job *job) {
    void (*fn)(void *) = job->fn;
    void *arg = job->arg;
    free(job);
    fn(arg);
}

int32_t uh_run_blocking(struct upcall_instance *inst, void (*fn)(void *arg), void *arg) {
    struct uh_job *job = malloc(sizeof(*job));
    if (!job)
        return -ENOMEM;
    *job = (struct uh_job){ .run = run_and_free, .instance = inst, .fn = fn, .arg = arg };
    struct uh_pool *pool = &inst->host->pool;
    pthread_mutex_lock(&pool->lock);
    uint32_t state = atomic_load(&inst->state);
    int error = state == UH_INSTANCE_NONE || state == UH_INSTANCE_CLOSED ? -ESHUTDOWN
                : put(inst->host, job) != 0                              ? -ENOMEM
                                                                         : 0;
    if (error == 0)
        inst->jobs++;
    pthread_mutex_unlock(&pool->lock);
    if (error)
        free(job);
    return error;
}

bool uh_pool_close(struct upcall_instance *inst) {
    struct uh_pool *pool = &inst->host->pool;
    pthread_mutex_lock(&pool->lock);
    bool none = inst->jobs == 0;
    if (none)
        atomic_store_explicit(&inst->state, UH_INSTANCE_CLOSED, memory_order_release);
    pthread_mutex_unlock(&pool->lock);
    return none;
}

void uh_pool_end(struct upcall_host *host) {
    struct uh_pool *pool = &host->pool;
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->thread_count; i++)
        pthread_join(pool->threads[i], NULL);
    pool->thread_count = 0;
}
