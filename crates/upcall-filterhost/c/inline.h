/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A filter host as a library.
 *
 * The executable (main.c) is a few lines around this; a worker that places a trusted
 * filter *inline* links the same code and calls upcall_host_deliver() instead of
 * using the submission ring. Everything else is as in a process of its own: the
 * same control messages on a socket pair, the same completion ring for what comes
 * later. Several hosts may live in one process; nothing is global.
 */
#ifndef UPCALL_INLINE_H
#define UPCALL_INLINE_H

#include "wire.h"

struct upcall_host;

/*
 * Makes a host that will load the shared object open at @filter_fd; with a
 * @filter_path (may be NULL, is copied), from there. Nothing is loaded yet: DESCRIBE or
 * LOAD does that. @inline_mode: 0 or 1; with 1, START starts no channel threads,
 * and submissions come by upcall_host_deliver().
 *
 * The host owns both descriptors from now on, also when this fails; @filter_fd may be
 * -1 if there is a path. NULL if out of memory.
 */
struct upcall_host *upcall_host_new(int control_fd, int filter_fd, const char *filter_path,
                                    int inline_mode);

/*
 * Serves the control socket until QUIT or its end, then stops threads, closes
 * what is still open and unloads the filter. Blocks: an inline worker gives
 * it a thread. Returns 0; or -EBUSY if instances were still open whose requests the
 * filter did not give back within a second: then close() and unload() were
 * not called, and the filter stays in memory.
 *
 * Call once. When the control socket ends, the worker is taken for dead: issued
 * requests end with -ESHUTDOWN, held ones are cancelled, and their answers go nowhere.
 */
int upcall_host_run(struct upcall_host *host);

/*
 * Frees a host whose upcall_host_run() has returned (or was never called), and
 * which no other thread uses. After -EBUSY it frees nothing, on purpose: the
 * filter may still refer to it.
 */
void upcall_host_free(struct upcall_host *host);

/*
 * Inline only: executes one submission on the caller's thread, which is the one that
 * consumes the completion ring of @channel (the number given in CHANNEL). Call
 * between the RESULT of START and the sending of QUIT. @in->seq is ignored.
 *
 * Returns
 *   1  *out is the verdict
 *   2  *out is the HELD entry; the verdict comes later, on the completion ring
 *   0  nothing: cancel, issued, or a verdict that went on the completion ring already
 *  -1  there is no such channel
 * and treats *out as if it had been taken off the ring. During the call, the filter
 * may have put entries (issued requests, answers to others) on the completion
 * ring of @channel; no doorbell is rung for these, so look at it before sleeping.
 *
 * Threads: one at a time per channel; different channels at once. Must not be called
 * from within a callback of the filter.
 */
int upcall_host_deliver(struct upcall_host *host, uint32_t channel,
                        const struct wire_submission *in, struct wire_completion *out);

#endif
