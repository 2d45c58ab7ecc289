/* Value codecs. */
#ifndef SHD_VALUES_H
#define SHD_VALUES_H

#include "errors.h"

SHDI_BEGIN

/* The size of a decoded section. */
uint64_t shdi_values_size(uint32_t value_codec, uint32_t dtype, uint64_t count);

/* Values of ranks [rank, rank + count), which exist, as binary32. Refuses those that section 5 does. */
shdi_fault shdi_values_decode(const shd_delta *delta, uint64_t rank, uint64_t count, float *values);

/* Makes every check of section 5. */
shdi_fault shdi_values_check(const shd_delta *delta);

SHDI_END

#endif
