/* The table of operations. */
#include "operations.h"

const shdi_operation *shdi_operation_of(uint32_t id) {
    static const shdi_operation operations[] = {
        [SHD_OP_ADD] = {.is_known = 1, .adds = 1},
        [SHD_OP_SET] = {.is_known = 1},
        [SHD_OP_ULP] = {.is_known = 1, .shifts = 1},
        [SHD_OP_NEW] = {.is_known = 1, .creates = 1},
        [SHD_OP_DROP] = {.is_known = 1, .removes = 1},
        [SHD_OP_REPLACE] = {.is_known = 1, .creates = 1, .removes = 1},
    };
    return id < sizeof operations / sizeof operations[0] && operations[id].is_known ? &operations[id] : NULL;
}
