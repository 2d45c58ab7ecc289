/* The header and the four sections of the whole file. */
#ifndef SHD_CONTAINER_H
#define SHD_CONTAINER_H

#include "errors.h"

SHDI_BEGIN

/* Offsets of the header's fields. */
enum {
    AT_MAJOR = 8,
    AT_MINOR = 10,
    AT_TENSOR_COUNT = 12,
    AT_INCOMPATIBLE = 16,
    AT_COMPATIBLE = 24,
    AT_FILE_SIZE = 32,
    AT_NAMES_SIZE = 40,
    AT_METADATA_SIZE = 48,
    AT_EXTENSION_SIZE = 56,
    AT_TABLE_CRC = 64,
    AT_NAMES_CRC = 68,
    AT_METADATA_CRC = 72,
    AT_EXTENSION_CRC = 76,
    AT_DIGEST = 80,
    AT_CONTROL_STORED = 112,
    AT_CONTROL_DECODED = 116,
    AT_ZERO = 120,
    AT_HEADER_CRC = 124
};

/* Makes the checks of section 2.1, where `header` has the first bytes of the file. */
int shdi_check_header(const shd_file *file, const uint8_t *header, uint64_t available, shd_status *status);

/* One of TABLE, NAMES, METADATA and EXTENSION. */
typedef struct shdi_part {
    uint64_t offset;
    uint64_t size;
    uint32_t crc;
} shdi_part;

/* Lays the four out, and returns the aligned end of the last. The limits keep the sums far from an overflow. */
uint64_t shdi_lay_out(const uint8_t *header, shdi_part parts[4]);

SHDI_END

#endif
