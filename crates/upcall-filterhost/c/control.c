/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The control socket: one message in, one result out, until QUIT or the end.
 *
 * Always true: every message but QUIT is answered once; a descriptor that came with a
 * message is owned by the part that asked for it, or is closed before the next
 * message; a message of a wrong size, or with too many or too few descriptors, changes
 * nothing.
 */
#include "host.h"

#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

bool uh_read(struct uh_reader *reader, void *into, size_t length) {
    if (reader->left < length)
        return false;
    memcpy(into, reader->at, length);
    reader->at += length;
    reader->left -= length;
    return true;
}

int uh_fail(struct upcall_host *host, int error, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(host->text, sizeof(host->text), format, args);
    va_end(args);
    return error;
}

/* Sends one message; blocks while the worker is slow to read. */
static void send_message(struct upcall_host *host, uint32_t kind, uint32_t id, uint32_t value,
                         const void *payload, size_t length) {
    struct wire_header header = { .kind = kind, .version = WIRE_VERSION, .id = id,
                                  .value = value };
    struct iovec parts[2] = { { &header, sizeof(header) }, { (void *)payload, length } };
    struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };
    while (sendmsg(host->control_fd, &message, MSG_NOSIGNAL) < 0 && errno == EINTR) {}
}

bool uh_control_hung_up(struct upcall_host *host, int timeout_ms) {
    struct pollfd fd = { .fd = host->control_fd };
    return poll(&fd, 1, timeout_ms) > 0 && (fd.revents & (POLLHUP | POLLERR | POLLNVAL));
}

static void close_descriptors(struct uh_message *message) {
    for (uint32_t i = 0; i < message->fd_count; i++)
        if (message->fds[i] >= 0)
            close(message->fds[i]);
    message->fd_count = 0;
}

static void take_descriptors(struct msghdr *header, struct uh_message *message) {
    message->fd_count = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c; c = CMSG_NXTHDR(header, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
            if (message->fd_count < WIRE_DESCRIPTORS_MAX)
                message->fds[message->fd_count++] = fd;
            else
                close(fd);
        }
    }
}

/* Bytes received, 0 at the end; -EBADMSG: something came that is not a message. */
static ssize_t receive(struct upcall_host *host, unsigned char *buffer, struct uh_message *message) {
    _Alignas(struct cmsghdr) unsigned char control[CMSG_SPACE(WIRE_DESCRIPTORS_MAX * sizeof(int))];
    struct iovec part = { buffer, WIRE_MESSAGE_MAX };
    struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof(control) };
    ssize_t length;
    do {
        length = recvmsg(host->control_fd, &header, MSG_CMSG_CLOEXEC);
    } while (length < 0 && errno == EINTR);
    if (length < 0)
        return 0;
    take_descriptors(&header, message);
    if (length == 0)
        return 0;
    if ((header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) ||
        (size_t)length < sizeof(message->header))
        return uh_fail(host, -EBADMSG, "a message was cut: %zd bytes, %u descriptors", length,
                       message->fd_count);
    memcpy(&message->header, buffer, sizeof(message->header));
    message->payload = buffer + sizeof(message->header);
    message->length = (size_t)length - sizeof(message->header);
    return length;
}

static int load(struct upcall_host *host) {
    int error = uh_library_open(host);
    if (error)
        return error;
    if (host->loaded)
        return uh_fail(host, -EALREADY, "the filter is loaded already");
    if (!host->inline_mode)
        prctl(PR_SET_NAME, host->table.name);
    error = host->table.load ? host->table.load(&host->services) : 0;
    if (error)
        return uh_fail(host, error < 0 ? error : -EINVAL, "load() of filter %s gave %d (%s)",
                       host->table.name, error, strerror(error < 0 ? -error : EINVAL));
    host->loaded = true;
    uh_point(UH_POINT_LOADED, 0, 0);
    return 0;
}

static int start(struct upcall_host *host) {
    if (!host->loaded)
        return uh_fail(host, -EPROTO, "START before LOAD");
    int error = uh_channels_start(host);
    uh_point(UH_POINT_SERVING, 0, 0);
    return error;
}

/* What a message must bring. Of OPEN, the parts are checked where they are read. */
static const struct { size_t payload; uint32_t fds; bool varies; } expected[] = {
    [WIRE_MSG_DESCRIBE] = { 0, 0, false },
    [WIRE_MSG_ARENA] = { sizeof(struct wire_arena), 1, false },
    [WIRE_MSG_ISSUE_ARENA] = { sizeof(uint64_t), 1, false },
    [WIRE_MSG_CHANNEL] = { 0, 3, false },
    [WIRE_MSG_LOAD] = { 0, 0, false },
    [WIRE_MSG_OPEN] = { sizeof(struct wire_open), 1, true },
    [WIRE_MSG_START] = { 0, 0, false },
    [WIRE_MSG_EVENT] = { sizeof(uint32_t), 0, false },
    [WIRE_MSG_CLOSE] = { 0, 0, false },
    [WIRE_MSG_QUIT] = { 0, 0, false },
    [WIRE_MSG_SAVE_STATE] = { 0, 1, false },
    [WIRE_MSG_LOAD_STATE] = { 0, 1, false },
};

static int check(struct upcall_host *host, const struct uh_message *message) {
    uint32_t kind = message->header.kind;
    if (message->header.version != WIRE_VERSION)
        return uh_fail(host, -EPROTO, "the worker speaks wire version %u, this filter host %u",
                       message->header.version, WIRE_VERSION);
    if (kind == 0 || kind >= sizeof(expected) / sizeof(*expected))
        return uh_fail(host, -EINVAL, "unknown message %u", kind);
    bool varies = expected[kind].varies;
    bool ok = varies ? message->length >= expected[kind].payload &&
                           message->fd_count >= expected[kind].fds
                     : message->length == expected[kind].payload &&
                           message->fd_count == expected[kind].fds;
    if (!ok)
        return uh_fail(host, -EINVAL, "message %u with %zu bytes and %u descriptors; expected "
                       "%s%zu and %u", kind, message->length, message->fd_count,
                       varies ? "at least " : "", expected[kind].payload, expected[kind].fds);
    return 0;
}

/* 0, a length if the message asks for one, or a negative errno. */
static int handle(struct upcall_host *host, struct uh_message *message) {
    int error = check(host, message);
    if (error)
        return error;
    switch (message->header.kind) {
    case WIRE_MSG_ARENA: return uh_memory_arena(host, message);
    case WIRE_MSG_ISSUE_ARENA: return uh_memory_issue_arena(host, message);
    case WIRE_MSG_CHANNEL: return uh_memory_channel(host, message);
    case WIRE_MSG_LOAD: return load(host);
    case WIRE_MSG_OPEN: return uh_instance_open(host, message);
    case WIRE_MSG_START: return start(host);
    case WIRE_MSG_EVENT: return uh_instance_event(host, message);
    case WIRE_MSG_CLOSE: return uh_instance_close(host, message);
    case WIRE_MSG_SAVE_STATE: return uh_instance_save(host, message);
    case WIRE_MSG_LOAD_STATE: return uh_instance_load(host, message);
    default: return uh_library_open(host); /* DESCRIBE; the rest is in answer() */
    }
}

/* The message's one answer. */
static void reply(struct upcall_host *host, const struct uh_message *message, int error) {
    char *json = NULL;
    size_t length = 0;
    if (error == 0 && message->header.kind == WIRE_MSG_DESCRIBE)
        error = uh_describe(host, &json, &length);
    if (json)
        send_message(host, WIRE_MSG_DESCRIPTION, 0, 0, json, length);
    else
        send_message(host, WIRE_MSG_RESULT, error < 0 ? (uint32_t)error : 0,
                     error > 0 ? (uint32_t)error : 0, host->text, strlen(host->text));
    free(json);
}

static int serve(struct upcall_host *host, unsigned char *buffer) {
    struct uh_message message = { 0 };
    for (;;) {
        host->text[0] = 0;
        ssize_t length = receive(host, buffer, &message);
        if (length == 0) {
            close_descriptors(&message);
            return 0;
        }
        if (length > 0 && message.header.kind == WIRE_MSG_QUIT &&
            message.header.version == WIRE_VERSION) {
            close_descriptors(&message);
            uh_point(UH_POINT_QUITTING, 0, 0);
            return 1;
        }
        if (length < 0)
            message.header.kind = 0;
        int error = length < 0 ? (int)length : handle(host, &message);
        close_descriptors(&message);
        reply(host, &message, error);
    }
}

int uh_control_serve(struct upcall_host *host) {
    unsigned char *buffer = malloc(WIRE_MESSAGE_MAX);
    if (!buffer)
        return 0;
    int result = serve(host, buffer);
    free(buffer);
    return result;
}
