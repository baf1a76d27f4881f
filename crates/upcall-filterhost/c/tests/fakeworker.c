/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "fakeworker.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../inline.h"
#include "testfilter.h"

const char *fake_host_path;
static pthread_t inline_thread;

uint64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

void sleep_ms(uint32_t ms) {
    usleep(ms * 1000);
}

int memfd_of(size_t size) {
    int fd = memfd_create("test", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

static void *map(int fd, size_t size) {
    void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(base != MAP_FAILED);
    return base;
}

static void *run_inline(void *host) {
    return (void *)(intptr_t)upcall_host_run(host);
}

static void exec_host(const char *host, int socket, int filter) {
    int control = fcntl(socket, F_DUPFD, 10), object = fcntl(filter, F_DUPFD, 10);
    dup2(control, WIRE_SOCKET_FD);
    dup2(object, WIRE_FILTER_FD);
    close(control);
    close(object);
    for (int fd = 5; fd < 64; fd++)
        close(fd);
    execl(host, host, (char *)NULL);
    _exit(127);
}

struct fake_worker *worker_start(const char *filter) {
    static struct fake_worker only; /* a test has one, and a process of its own */
    struct fake_worker *w = &only;
    w->host_path = fake_host_path;
    int pair[2], object = open(filter, O_RDONLY | O_CLOEXEC);
    CHECK(object >= 0);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    w->socket = pair[0];
    if (w->host_path) {
        w->pid = fork();
        CHECK(w->pid >= 0);
        if (w->pid == 0)
            exec_host(w->host_path, pair[1], object);
        close(pair[1]);
        close(object);
    } else {
        w->inline_host = upcall_host_new(pair[1], object, NULL, 1);
        CHECK(w->inline_host);
        CHECK(pthread_create(&inline_thread, NULL, run_inline, w->inline_host) == 0);
    }
    return w;
}

/* ---- messages ---- */

void worker_send_raw(struct fake_worker *w, const void *bytes, size_t length, const int *fds,
                     uint32_t fd_count) {
    _Alignas(struct cmsghdr) unsigned char control[CMSG_SPACE(64 * sizeof(int))] = { 0 };
    struct iovec part = { (void *)bytes, length };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
    if (fd_count) {
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
        memcpy(CMSG_DATA(c), fds, fd_count * sizeof(int));
    }
    CHECK_IS(sendmsg(w->socket, &message, MSG_NOSIGNAL), length);
}

static void add_log(struct fake_worker *w, size_t length) {
    size_t have = strlen(w->logs);
    w->log_lines++;
    if (have + length + 2 < sizeof(w->logs))
        snprintf(w->logs + have, sizeof(w->logs) - have, "%.*s\n", (int)length, w->text);
}

bool worker_hear(struct fake_worker *w) {
    for (;;) {
        struct wire_header header;
        struct iovec parts[2] = { { &header, sizeof(header) }, { w->text, WIRE_MESSAGE_MAX } };
        struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };
        ssize_t length = recvmsg(w->socket, &message, 0);
        if (length <= 0)
            return false;
        CHECK(length >= 16 && header.version == WIRE_VERSION);
        w->text[length - 16] = 0;
        if (header.kind == WIRE_MSG_LOG) {
            add_log(w, (size_t)length - 16);
            continue;
        }
        w->answer = header.kind;
        CHECK(header.kind == WIRE_MSG_RESULT || header.kind == WIRE_MSG_DESCRIPTION);
        w->result = (int)header.id;
        return true;
    }
}

int worker_say(struct fake_worker *w, uint32_t kind, uint32_t id, uint32_t value,
               const void *payload, size_t length, const int *fds, uint32_t fd_count) {
    static unsigned char buffer[2 * WIRE_MESSAGE_MAX];
    struct wire_header header = { kind, WIRE_VERSION, id, value };
    memcpy(buffer, &header, 16);
    if (length)
        memcpy(buffer + 16, payload, length);
    worker_send_raw(w, buffer, 16 + length, fds, fd_count);
    CHECK(worker_hear(w));
    return w->result;
}

/* ---- set-up ---- */

static void make_channel(struct fake_worker *w, uint32_t number, uint32_t entries) {
    struct fake_channel *c = &w->channels[number];
    size_t size = WIRE_RINGS_OFFSET + 2 * 64 * (size_t)entries;
    c->memfd = memfd_of(size);
    c->base = map(c->memfd, size);
    c->entries = entries;
    c->host_bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    c->worker_bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    memcpy(c->base, "UPCLRING", 8);
    uint32_t words[2] = { WIRE_VERSION, entries };
    memcpy(c->base + 8, words, 8);
    int fds[3] = { c->memfd, c->host_bell, c->worker_bell };
    CHECK_IS(worker_say(w, WIRE_MSG_CHANNEL, number, 0, NULL, 0, fds, 3), 0);
}

void worker_prepare(struct fake_worker *w, uint32_t entries, bool writable) {
    w->arena_fd = memfd_of(ARENA_SIZE);
    w->issue_arena_fd = memfd_of(ISSUE_ARENA_SIZE);
    w->arena = map(w->arena_fd, ARENA_SIZE);
    w->issue_arena = map(w->issue_arena_fd, ISSUE_ARENA_SIZE);
    struct wire_arena arena = { ARENA_SIZE, writable, 0 };
    uint64_t size = ISSUE_ARENA_SIZE;
    CHECK_IS(worker_say(w, WIRE_MSG_ARENA, 0, 0, &arena, 16, &w->arena_fd, 1), 0);
    CHECK_IS(worker_say(w, WIRE_MSG_ISSUE_ARENA, 0, 0, &size, 8, &w->issue_arena_fd, 1), 0);
    for (uint32_t i = 0; i < CHANNELS; i++)
        make_channel(w, i, entries);
    CHECK_IS(worker_say(w, WIRE_MSG_LOAD, 0, 0, NULL, 0, NULL, 0), 0);
}

static size_t parameter(unsigned char *into, const char *name, const char *value, uint32_t file) {
    uint16_t lengths[2] = { (uint16_t)strlen(name), (uint16_t)strlen(value) };
    memcpy(into, lengths, 4);
    memcpy(into + 4, &file, 4);
    memcpy(into + 8, name, lengths[0]);
    memcpy(into + 8 + lengths[0], value, lengths[1]);
    return 8u + lengths[0] + lengths[1];
}

size_t worker_open_payload(unsigned char *into, const char *text) {
    struct wire_open open = { 0, 2, 6, 0 };
    struct wire_disk disks[2] = { { 1 << 20, 512, 0 }, { 2 << 20, 4096, 1 } };
    memcpy(into, &open, 16);
    memcpy(into + 16, disks, 32);
    size_t at = 48;
    at += parameter(into + at, "number", "-42", WIRE_NO_FILE);
    at += parameter(into + at, "size", "3M", WIRE_NO_FILE);
    at += parameter(into + at, "time", "1500ms", WIRE_NO_FILE);
    at += parameter(into + at, "flag", "yes", WIRE_NO_FILE);
    at += parameter(into + at, "text", text, WIRE_NO_FILE);
    at += parameter(into + at, "file", "/some/file", 0);
    return at;
}

int worker_open(struct fake_worker *w, uint32_t instance, const char *text) {
    unsigned char payload[1024];
    size_t length = worker_open_payload(payload, text);
    if (!w->counters) {
        w->counters_fd = memfd_of(WIRE_COUNTERS_SIZE);
        w->counters = map(w->counters_fd, WIRE_COUNTERS_SIZE);
        w->file_fd = memfd_of(0);
    }
    int fds[2] = { w->counters_fd, w->file_fd };
    return worker_say(w, WIRE_MSG_OPEN, instance, 0, payload, length, fds, 2);
}

struct fake_worker *worker_ready(const char *filter) {
    struct fake_worker *w = worker_start(filter);
    worker_prepare(w, 64, true);
    CHECK_IS(worker_open(w, 0, "a b\xc3\xa9"), 0);
    CHECK_IS(worker_say(w, WIRE_MSG_START, 0, 0, NULL, 0, NULL, 0), 0);
    return w;
}

void worker_expect_end(struct fake_worker *w, int status) {
    if (w->host_path) {
        int seen;
        CHECK_IS(waitpid(w->pid, &seen, 0), w->pid);
        CHECK_IS(seen, status);
        w->pid = 0;
    } else {
        void *result;
        CHECK(pthread_join(inline_thread, &result) == 0);
        CHECK_IS((intptr_t)result, status ? -EBUSY : 0);
        upcall_host_free(w->inline_host);
    }
}

void worker_quit(struct fake_worker *w) {
    struct wire_header header = { WIRE_MSG_QUIT, WIRE_VERSION, 0, 0 };
    worker_send_raw(w, &header, 16, NULL, 0);
    if (w->host_path)
        while (worker_hear(w)) {} /* until the socket ends: all that it logged is read */
    worker_expect_end(w, 0);
}

/* ---- rings ---- */

static _Atomic uint32_t *word(struct fake_channel *c, size_t offset) {
    return (_Atomic uint32_t *)(void *)(c->base + offset);
}

static void put(struct fake_channel *c, const struct wire_submission *entry) {
    unsigned char *slot = c->base + WIRE_RINGS_OFFSET + 64 * (size_t)(c->put % c->entries);
    uint64_t end = now_ms() + 10000;
    while (c->put - atomic_load(word(c, WIRE_SUBMISSION_HEAD_OFFSET)) >= c->entries)
        CHECK(now_ms() < end);
    memcpy(slot + 4, (const unsigned char *)entry + 4, 60);
    atomic_store_explicit((_Atomic uint32_t *)(void *)slot, ++c->put, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load(word(c, WIRE_SUBMISSION_SLEEPING_OFFSET)) == 1 &&
        atomic_exchange(word(c, WIRE_SUBMISSION_SLEEPING_OFFSET), 0) == 1) {
        uint64_t one = 1;
        CHECK(write(c->host_bell, &one, 8) == 8);
    }
}

uint64_t submit(struct fake_worker *w, uint32_t channel, struct wire_submission entry) {
    struct fake_channel *c = &w->channels[channel];
    if (!entry.token)
        entry.token = ++w->token | UINT64_C(0xabcd) << 48;
    if (w->host_path) {
        put(c, &entry);
        return entry.token;
    }
    CHECK(c->returned_count < 256);
    uint32_t at = (c->returned_first + c->returned_count) % 256;
    int result = upcall_host_deliver(w->inline_host, channel, &entry, &c->returned[at]);
    CHECK(result >= 0);
    CHECK(result == 0 || c->returned[at].kind == (result == 1 ? WIRE_VERDICT : WIRE_HELD));
    c->returned_count += result != 0;
    return entry.token;
}

static bool take(struct fake_channel *c, struct wire_completion *out) {
    if (c->returned_count) {
        *out = c->returned[c->returned_first];
        c->returned_first = (c->returned_first + 1) % 256;
        c->returned_count--;
        return true;
    }
    unsigned char *slot = c->base + WIRE_RINGS_OFFSET + 64 * (size_t)c->entries +
                          64 * (size_t)(c->taken % c->entries);
    if (atomic_load_explicit((_Atomic uint32_t *)(void *)slot, memory_order_acquire) !=
        c->taken + 1)
        return false;
    memcpy(out, slot, 64);
    atomic_store_explicit(word(c, WIRE_COMPLETION_HEAD_OFFSET), ++c->taken, memory_order_release);
    return true;
}

bool reap(struct fake_worker *w, uint32_t channel, uint32_t timeout_ms,
          struct wire_completion *out) {
    uint64_t end = now_ms() + timeout_ms;
    do {
        if (take(&w->channels[channel], out))
            return true;
        usleep(100);
    } while (now_ms() < end);
    return false;
}

struct wire_completion expect(struct fake_worker *w, uint32_t channel, uint32_t kind,
                              uint64_t token) {
    struct wire_completion out;
    CHECK(reap(w, channel, 5000, &out));
    CHECK_IS(out.kind, kind);
    CHECK(out.token == token);
    CHECK_IS(out.instance, 0);
    return out;
}

struct wire_submission start_of(uint32_t block, uint8_t op) {
    return (struct wire_submission){ .kind = WIRE_START, .op = op, .offset = block * UINT64_C(4096),
                                     .length = 512, .data = WIRE_NO_DATA };
}
