/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What a filter is, as JSON, for the worker and `upcall info`.
 *
 * The text is valid JSON in valid UTF-8 whatever strings the filter's author wrote:
 * bytes that are no UTF-8 become U+FFFD.
 */
#include "host.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct text {
    char *bytes;
    size_t length, room;
    bool failed;
};

static void put(struct text *text, const char *bytes, size_t length) {
    if (text->failed)
        return;
    if (text->room - text->length < length) {
        size_t room = 2 * text->room + length + 1024;
        char *more = room > 2 * WIRE_MESSAGE_MAX + 4096 ? NULL : realloc(text->bytes, room);
        if (!more) {
            text->failed = true;
            return;
        }
        text->bytes = more;
        text->room = room;
    }
    memcpy(text->bytes + text->length, bytes, length);
    text->length += length;
}

__attribute__((format(printf, 2, 3)))
static void putf(struct text *text, const char *format, ...) {
    char line[256];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    put(text, line, (size_t)length < sizeof(line) ? (size_t)length : sizeof(line) - 1);
}

/* Bytes of the UTF-8 character at @s, which ends with a zero byte; 0 if it is none. */
static size_t utf8_length(const unsigned char *s) {
    size_t length = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3
                  : s[0] < 0xf5 ? 4 : 0;
    for (size_t i = 1; i < length; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    bool overlong = (s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xf0 && s[1] < 0x90);
    bool beyond = (s[0] == 0xed && s[1] > 0x9f) || (s[0] == 0xf4 && s[1] > 0x8f);
    return overlong || beyond ? 0 : length;
}

static void put_string(struct text *text, const char *string) {
    if (!string) {
        put(text, "null", 4);
        return;
    }
    put(text, "\"", 1);
    for (const unsigned char *s = (const unsigned char *)string; *s && !text->failed;) {
        size_t length = utf8_length(s);
        if (length == 0)
            put(text, "\\ufffd", 6);
        else if (*s == '"' || *s == '\\')
            putf(text, "\\%c", *s);
        else if (*s < 0x20 || *s == 0x7f)
            putf(text, "\\u%04x", *s);
        else
            put(text, (const char *)s, length);
        s += length ? length : 1;
    }
    put(text, "\"", 1);
}

static void put_member(struct text *text, const char *name, const char *value) {
    putf(text, ",\"%s\":", name);
    put_string(text, value ? value : "");
}

static void put_functions(struct text *text, const struct upcall_filter *t) {
    const char *names[] = { t->io_done ? "io_done" : NULL, t->cancel ? "cancel" : NULL,
                            t->event ? "event" : NULL, t->save_state ? "save_state" : NULL,
                            t->load_state ? "load_state" : NULL };
    const char *comma = "";
    put(text, ",\"functions\":[", 14);
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
        if (names[i]) {
            putf(text, "%s\"%s\"", comma, names[i]);
            comma = ",";
        }
    put(text, "]", 1);
}

static void put_param(struct text *text, const struct upcall_param *p) {
    put(text, "{\"name\":", 8);
    put_string(text, p->name);
    putf(text, ",\"type\":%" PRIu32 ",\"doc\":", p->type);
    put_string(text, p->doc ? p->doc : "");
    put(text, ",\"default\":", 11);
    put_string(text, p->default_value);
    put(text, ",\"choices\":", 11);
    put_string(text, p->choices);
    putf(text, ",\"min\":%" PRId64 ",\"max\":%" PRId64 "}", p->min, p->max);
}

int uh_describe(struct upcall_host *host, char **json, size_t *length) {
    const struct upcall_filter *t = &host->table;
    struct text text = { 0 };
    putf(&text, "{\"wire\":%u,\"abi\":%" PRIu32 ",\"width\":%zu", WIRE_VERSION, t->abi_version,
         8 * sizeof(void *));
    put_member(&text, "name", t->name);
    put_member(&text, "version", t->version);
    put_member(&text, "vendor", t->vendor);
    put_member(&text, "summary", t->summary);
    putf(&text, ",\"class\":%" PRIu32 ",\"flags\":%" PRIu32 ",\"ops\":%" PRIu32 ",\"sees\":%" PRIu32
         ",\"changes\":%" PRIu32 ",\"answers\":%" PRIu32, t->filter_class, t->flags, t->ops,
         t->sees, t->changes, t->answers);
    put_functions(&text, t);
    put(&text, ",\"params\":[", 11);
    for (uint32_t i = 0; i < t->param_count; i++) {
        if (i)
            put(&text, ",", 1);
        put_param(&text, &host->params[i]);
    }
    put(&text, "]}", 2);
    if (text.failed || text.length > WIRE_MESSAGE_MAX - sizeof(struct wire_header)) {
        free(text.bytes);
        return uh_fail(host, -E2BIG, "the description of filter %s is longer than a message",
                       t->name);
    }
    *json = text.bytes;
    *length = text.length;
    return 0;
}
