/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What a filter host says to filters that are right or wrong in one thing (variants.c).
 *
 *   table_test HOST FOLDER    with FOLDER/NAME.so for each name below
 */
#define _GNU_SOURCE
#include "fakeworker.h"

#include <errno.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const struct {
    const char *name;
    int describe; /* 0: a DESCRIPTION comes */
    const char *says; /* part of the answer to DESCRIBE */
    int load;
} variants[] = {
    { "good", 0, "\"functions\":[\"io_done\"]", 0 },
    { "good", 0, "Quotes \\\" back\\\\slash, \\u000a line, \\u0001, caf\xc3\xa9, "
                 "bad \\ufffd\\ufffd( \\ufffd\\ufffd\\ufffd.\"", 0 },
    { "good", 0, "\"default\":\"\\u0009\",\"choices\":null,\"min\":-9223372036854775808,"
                 "\"max\":9223372036854775807}", 0 },
    { "good", 0, "{\"name\":\"other\",\"type\":6,\"doc\":\"\",\"default\":\"a\",\"choices\":\"a|b\"", 0 },
    { "short", 0, "\"functions\":[]", 0 },
    { "too_short", -EINVAL, "table says size", -EINVAL },
    { "too_long", -EINVAL, "table says size", -EINVAL },
    { "newer", -ENOTSUP, "use a newer Upcall", -ENOTSUP },
    { "other_major", -ENOTSUP, "built for ABI 2.0", -ENOTSUP },
    { "no_symbol", -ENOENT, "upcall_filter", -ENOENT },
    { "name", -EINVAL, "no good name", -EINVAL },
    { "no_start", -EINVAL, "no start_io", -EINVAL },
    { "class", -EINVAL, "filter_class", -EINVAL },
    { "flags", -EINVAL, "flags", -EINVAL },
    { "ops", -EINVAL, "unknown operations", -EINVAL },
    { "sees_more", -EINVAL, "must be parts of ops", -EINVAL },
    { "answers_without_flush", -EINVAL, "must declare flush", -EINVAL },
    { "param_name", -EINVAL, "no good name", -EINVAL },
    { "param_twice", -EINVAL, "declares parameter text twice", -EINVAL },
    { "param_type", -EINVAL, "unknown type 99", -EINVAL },
    { "no_params", -EINVAL, "no table of them", -EINVAL },
    { "load_fails", 0, "\"name\":\"variant\"", -EPERM },
    { "other_width", -ENOEXEC, "bits, this filter host for", -ENOEXEC },
    { "no_elf", -ENOEXEC, "not a shared object", -ENOEXEC },
    { "cut_elf", -ENOEXEC, "is cut", -ENOEXEC },
    { "half_elf", -ENOEXEC, "is cut", -ENOEXEC },
    { "head_elf", -ENOEXEC, "is cut", -ENOEXEC },
    { "no_library", -ENOEXEC, "cannot be loaded", -ENOEXEC },
};

static void check(size_t i, const char *folder) {
    char path[4096];
    snprintf(path, sizeof(path), "%s/%s.so", folder, variants[i].name);
    struct fake_worker *w = worker_start(path);
    for (int again = 0; again < 2; again++) { /* a refusal is no state: the same twice */
        CHECK_IS(worker_say(w, WIRE_MSG_DESCRIBE, 0, 0, NULL, 0, NULL, 0), variants[i].describe);
        CHECK_IS(w->answer, variants[i].describe ? WIRE_MSG_RESULT : WIRE_MSG_DESCRIPTION);
        if (!strstr(w->text, variants[i].says))
            fprintf(stderr, "%s\n", w->text);
        CHECK(strstr(w->text, variants[i].says));
    }
    CHECK_IS(worker_say(w, WIRE_MSG_LOAD, 0, 0, NULL, 0, NULL, 0), variants[i].load);
    worker_quit(w);
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    fake_host_path = argv[1];
    size_t count = sizeof(variants) / sizeof(*variants), passed = 0;
    for (size_t i = 0; i < count; i++) {
        pid_t child = fork();
        if (child == 0) {
            alarm(20);
            check(i, argv[2]);
            exit(0);
        }
        int status;
        waitpid(child, &status, 0);
        if (status)
            fprintf(stderr, "FAILED: variant %s\n", variants[i].name);
        passed += status == 0;
    }
    printf("tables, %zu bits: %zu of %zu variants as expected\n", 8 * sizeof(void *), passed, count);
    return passed == count ? 0 : 1;
}
