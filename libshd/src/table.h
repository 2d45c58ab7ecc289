/* The tensor table. */
#ifndef SHD_TABLE_H
#define SHD_TABLE_H

#include "internal.h"

SHDI_BEGIN

/* Offsets of a record's fields. */
enum {
    AT_NAME_OFFSET = 0,
    AT_NAME_SIZE = 4,
    AT_RANK = 6,
    AT_DTYPE = 7,
    AT_OP = 8,
    AT_INDEX_CODEC = 9,
    AT_VALUE_CODEC = 10,
    AT_FLAGS = 11,
    AT_RECORD_ZERO = 12,
    AT_NNZ = 16,
    AT_BASE_FINGERPRINT = 24,
    AT_RESULT_FINGERPRINT = 32,
    AT_INDEX = 40,
    AT_VALUES = 64,
    AT_INDEX_CRC = 88,
    AT_VALUES_CRC = 92,
    AT_DIMS = 96
};

/* Checks every record. The tensors' sections start at `sections_offset`. */
int shdi_check_table(const shd_file *file, uint64_t sections_offset, shd_status *status);

SHDI_END

#endif
