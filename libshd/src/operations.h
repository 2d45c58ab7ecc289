/* The operations of REGISTRY.md. */
#ifndef SHD_OPERATIONS_H
#define SHD_OPERATIONS_H

#include "internal.h"

SHDI_BEGIN

/* What an operation does to a tensor. The flags are 0 or 1; an operation without any replaces elements. */
typedef struct shdi_operation {
    uint8_t is_known;
    uint8_t adds;    /* floats are added to elements, with a strength */
    uint8_t shifts;  /* integers are added to elements seen as ordered integers */
    uint8_t creates; /* the file has a whole tensor, which comes */
    uint8_t removes; /* the base's tensor goes */
} shdi_operation;

/* Whether the base has the tensor; whether the result has it, without which there are no nonzeros. */
static inline int shdi_is_in_base(const shdi_operation *operation) { return operation->removes || !operation->creates; }
static inline int shdi_is_in_result(const shdi_operation *operation) {
    return operation->creates || !operation->removes;
}

/* The operation of an id. NULL for an unknown id. */
const shdi_operation *shdi_operation_of(uint32_t id);

SHDI_END

#endif
