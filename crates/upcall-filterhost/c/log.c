/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Lines to the worker's log, through the control socket.
 *
 * A filter that logs without end costs itself its lines and nobody else anything: a
 * line never waits, and beyond LINES_PER_SECOND lines are dropped and their
 * number is said when there is room again.
 */
#include "host.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define LINE_MAX_BYTES 500u
#define LINES_PER_SECOND 100u

/* Whether this line may go; *missed is how many before it did not. */
static bool admit(struct uh_log *log, uint32_t *missed) {
    uint64_t second = uh_now_ns() / 1000000000u;
    pthread_mutex_lock(&log->lock);
    if (second != log->second) {
        log->second = second;
        log->lines = 0;
    }
    bool admitted = log->lines < LINES_PER_SECOND;
    if (admitted)
        log->lines++;
    else
        log->dropped++;
    *missed = admitted ? log->dropped : 0;
    if (admitted)
        log->dropped = 0;
    pthread_mutex_unlock(&log->lock);
    return admitted;
}

static bool send_line(struct upcall_host *host, uint32_t number, uint32_t level, const char *text) {
    struct wire_header header = { WIRE_MSG_LOG, WIRE_VERSION, number, level };
    struct iovec parts[2] = { { &header, sizeof(header) },
                              { (void *)text, strnlen(text, LINE_MAX_BYTES) } };
    struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };
    return sendmsg(host->control_fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0;
}

static void add_dropped(struct uh_log *log, uint32_t lines) {
    pthread_mutex_lock(&log->lock);
    log->dropped += lines;
    pthread_mutex_unlock(&log->lock);
}

static void line(struct upcall_host *host, const struct upcall_instance *inst, uint32_t level,
                 const char *text) {
    uint32_t missed;
    if (!admit(&host->log, &missed))
        return;
    if (missed) {
        char note[64];
        snprintf(note, sizeof(note), "%u lines of the log were dropped", missed);
        if (!send_line(host, UINT32_MAX, UPCALL_LOG_WARN, note))
            add_dropped(&host->log, missed);
    }
    if (!send_line(host, inst ? inst->number : UINT32_MAX, level, text))
        add_dropped(&host->log, 1);
}

void uh_logf(struct upcall_host *host, const struct upcall_instance *inst, uint32_t level,
             const char *format, ...) {
    char text[LINE_MAX_BYTES + 1];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    line(host, inst, level, text);
}

/* Without an instance, and on a thread that the filter made, only stderr is known to be there. */
void uh_log(struct upcall_instance *inst, uint32_t level, const char *text) {
    struct upcall_host *host = inst ? inst->host : uh_current_host;
    if (!text)
        return;
    if (host)
        line(host, inst, level, text);
    else
        fprintf(stderr, "filter: %.*s\n", (int)LINE_MAX_BYTES, text);
}
