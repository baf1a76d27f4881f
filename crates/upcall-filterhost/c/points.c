/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Points at which tests let a filter host die; see host.h. In what is shipped there are none.
 */
#include "host.h"

#ifdef UPCALL_HOST_POINTS
#include <dlfcn.h>

/* Found where the filter is loaded: before, nobody can have asked for a point. */
static _Atomic(void (*)(uint32_t point, uint32_t kind, uint32_t op)) reached;

void uh_points_find(void *library) {
    *(void **)(void *)&reached = dlsym(library, "upcall_test_point");
}

void uh_point(uint32_t point, uint32_t kind, uint32_t op) {
    void (*fn)(uint32_t, uint32_t, uint32_t) = reached;
    if (fn)
        fn(point, kind, op);
}
#else
/* No translation unit is empty in ISO C. */
extern struct upcall_host *uh_points_are_off;
#endif
