/* How an error reaches the caller. */
#ifndef SHD_ERRORS_H
#define SHD_ERRORS_H

#include "internal.h"

SHDI_BEGIN

/* Fills in `status`, which may be NULL, and returns `code`. */
int shdi_fail(shd_status *status, int code, uint32_t tensor, uint64_t offset);

/* What a section is refused for: the code, and the offset in the decoded section. */
typedef struct shdi_fault {
    int code;
    uint64_t offset;
} shdi_fault;

static inline shdi_fault shdi_fault_at(int code, uint64_t offset) {
    shdi_fault fault = {code, offset};
    return fault;
}

static inline shdi_fault shdi_ok(void) { return shdi_fault_at(SHD_OK, 0); }

/* The same for a fault in a section of `tensor`. */
int shdi_fail_in(shd_status *status, shdi_fault fault, const shd_tensor *tensor, const shd_section *section);

SHDI_END

#endif
