/* The bytes of a section: where they are, and that those that stand for nothing are zero. */
#ifndef SHD_SECTION_H
#define SHD_SECTION_H

#include "errors.h"

SHDI_BEGIN

/* The bytes [offset, offset + size) of the file. Returns where they are in memory, or reads them into `buffer` and
 * returns that. NULL if reading failed. */
const uint8_t *shdi_view(const shd_file *file, uint64_t offset, uint64_t size, void *buffer);

/* Checks the padding of a section of the file that ends at `end`: the bytes up to the next multiple of 64. */
int shdi_check_padding(const shd_file *file, uint64_t end, uint32_t tensor, shd_status *status);

/* Checks the bits of a decoded section from bit `first_bit` up to byte `end`. */
shdi_fault shdi_check_zeros(const uint8_t *section, uint64_t first_bit, uint64_t end);

SHDI_END

#endif
