/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Prints the layout of wire.h and upcall/filter.h as this compiler sees it, for a
 * test to compare with the Rust types. One line per struct, "NAME SIZE ALIGN", then one
 * per field, "NAME.FIELD OFFSET SIZE".
 */
#include <stdio.h>

#include <upcall/filter.h>

#include "wire.h"

#define STRUCT(type) printf("%s %zu %zu\n", #type, sizeof(struct type), _Alignof(struct type))
#define FIELD(type, field)                                                     \
    printf("%s.%s %zu %zu\n", #type, #field, offsetof(struct type, field),     \
           sizeof(((struct type *)0)->field))

int main(void) {
    printf("pointer %zu %zu\n", sizeof(void *), _Alignof(void *));

#define ENTRY(type, code)                                                             \
    STRUCT(type), FIELD(type, seq), FIELD(type, kind), FIELD(type, code),             \
    FIELD(type, flags), FIELD(type, token), FIELD(type, offset), FIELD(type, length), \
    FIELD(type, status), FIELD(type, data), FIELD(type, cookie),                      \
    FIELD(type, instance), FIELD(type, disk), FIELD(type, reserved)
    ENTRY(wire_submission, op);
    ENTRY(wire_completion, code);

    STRUCT(wire_header);
    FIELD(wire_header, kind);
    FIELD(wire_header, version);
    FIELD(wire_header, id);
    FIELD(wire_header, value);
    STRUCT(wire_arena);
    FIELD(wire_arena, size);
    FIELD(wire_arena, writable);
    FIELD(wire_arena, reserved);
    STRUCT(wire_open);
    FIELD(wire_open, arena);
    FIELD(wire_open, disks);
    FIELD(wire_open, parameters);
    FIELD(wire_open, files);
    STRUCT(wire_disk);
    FIELD(wire_disk, capacity);
    FIELD(wire_disk, block_size);
    FIELD(wire_disk, read_only);
    STRUCT(wire_counter);
    FIELD(wire_counter, name);
    FIELD(wire_counter, value);
    FIELD(wire_counter, reserved);

    STRUCT(upcall_request);
    FIELD(upcall_request, size);
    FIELD(upcall_request, op);
    FIELD(upcall_request, reserved0);
    FIELD(upcall_request, flags);
    FIELD(upcall_request, offset);
    FIELD(upcall_request, length);
    FIELD(upcall_request, status);
    FIELD(upcall_request, data);
    FIELD(upcall_request, context);
    STRUCT(upcall_disk);
    FIELD(upcall_disk, size);
    FIELD(upcall_disk, block_size);
    FIELD(upcall_disk, capacity);
    FIELD(upcall_disk, read_only);
    FIELD(upcall_disk, reserved0);
    STRUCT(upcall_issue);
    FIELD(upcall_issue, size);
    FIELD(upcall_issue, op);
    FIELD(upcall_issue, reserved0);
    FIELD(upcall_issue, flags);
    FIELD(upcall_issue, offset);
    FIELD(upcall_issue, length);
    FIELD(upcall_issue, disk);
    FIELD(upcall_issue, data);
    FIELD(upcall_issue, done);
    FIELD(upcall_issue, arg);
    STRUCT(upcall_extent);
    FIELD(upcall_extent, length);
    FIELD(upcall_extent, kind);
    FIELD(upcall_extent, reserved0);
    STRUCT(upcall_param);
    FIELD(upcall_param, size);
    FIELD(upcall_param, type);
    FIELD(upcall_param, name);
    FIELD(upcall_param, doc);
    FIELD(upcall_param, default_value);
    FIELD(upcall_param, choices);
    FIELD(upcall_param, min);
    FIELD(upcall_param, max);
    STRUCT(upcall_services);
    FIELD(upcall_services, size);
    FIELD(upcall_services, abi_version);
    FIELD(upcall_services, answer);
    FIELD(upcall_services, issue);
    FIELD(upcall_services, buffer_alloc);
    FIELD(upcall_services, buffer_free);
    FIELD(upcall_services, disk);
    FIELD(upcall_services, param_int);
    FIELD(upcall_services, param_string);
    FIELD(upcall_services, param_fd);
    FIELD(upcall_services, timer_start);
    FIELD(upcall_services, timer_stop);
    FIELD(upcall_services, watch_start);
    FIELD(upcall_services, watch_stop);
    FIELD(upcall_services, run_blocking);
    FIELD(upcall_services, counter);
    FIELD(upcall_services, counter_add);
    FIELD(upcall_services, log);
    FIELD(upcall_services, sidecar_read);
    FIELD(upcall_services, sidecar_write);
    FIELD(upcall_services, sidecar_sync);
    FIELD(upcall_services, extents);
    STRUCT(upcall_filter);
    FIELD(upcall_filter, size);
    FIELD(upcall_filter, abi_version);
    FIELD(upcall_filter, name);
    FIELD(upcall_filter, version);
    FIELD(upcall_filter, vendor);
    FIELD(upcall_filter, summary);
    FIELD(upcall_filter, filter_class);
    FIELD(upcall_filter, flags);
    FIELD(upcall_filter, ops);
    FIELD(upcall_filter, sees);
    FIELD(upcall_filter, changes);
    FIELD(upcall_filter, answers);
    FIELD(upcall_filter, param_count);
    FIELD(upcall_filter, params);
    FIELD(upcall_filter, load);
    FIELD(upcall_filter, unload);
    FIELD(upcall_filter, open);
    FIELD(upcall_filter, close);
    FIELD(upcall_filter, start_io);
    FIELD(upcall_filter, io_done);
    FIELD(upcall_filter, cancel);
    FIELD(upcall_filter, event);
    FIELD(upcall_filter, save_state);
    FIELD(upcall_filter, load_state);
    return 0;
}
