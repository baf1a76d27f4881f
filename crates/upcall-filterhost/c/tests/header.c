/* The header alone, with every warning; compiled as C11 and as C++11, for 32 and 64 bits. */
#include <upcall/filter.h>

static int32_t load(const struct upcall_services *services) { return services ? 0 : -1; }
static uint32_t start_io(void *self, struct upcall_request *req) {
    return self && req->length ? (uint32_t)UPCALL_PASS : (uint32_t)UPCALL_DONE;
}

#ifdef __cplusplus
/* C++11 has no designated initializers: everything up to start_io, in order. */
extern "C" UPCALL_EXPORT_FILTER = {
    sizeof(struct upcall_filter), UPCALL_ABI_VERSION, "header", "1", "none", "compiles",
    UPCALL_CLASS_INSPECTION, 0, UPCALL_OP_BIT(UPCALL_READ), 0, 0, 0, 0, nullptr, load, nullptr,
    nullptr, nullptr, start_io, nullptr, nullptr, nullptr, nullptr, nullptr,
};
#define CHECK_LAYOUT static_assert
#else
UPCALL_EXPORT_FILTER = {
    .size = sizeof(struct upcall_filter), .abi_version = UPCALL_ABI_VERSION, .name = "header",
    .filter_class = UPCALL_CLASS_INSPECTION, .ops = UPCALL_OP_BIT(UPCALL_READ), .load = load,
    .start_io = start_io,
};
#define CHECK_LAYOUT _Static_assert
#endif

/* The same on both widths: numbers first, naturally aligned; then pointers. */
CHECK_LAYOUT(offsetof(struct upcall_request, offset) == 8, "request");
CHECK_LAYOUT(offsetof(struct upcall_request, data) == 24, "request");
CHECK_LAYOUT(sizeof(struct upcall_request) == (sizeof(void *) == 8 ? 40 : 32), "request");
CHECK_LAYOUT(sizeof(struct upcall_disk) == 24, "disk");
CHECK_LAYOUT(offsetof(struct upcall_issue, data) == 24, "issue");
CHECK_LAYOUT(sizeof(struct upcall_issue) == (sizeof(void *) == 8 ? 48 : 40), "issue");
CHECK_LAYOUT(sizeof(struct upcall_param) == (sizeof(void *) == 8 ? 56 : 40), "param");
