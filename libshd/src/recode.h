/* Recoding: when a tensor is loaded, positions of codecs that nothing else knows become RICE, in the scratch buffer. */
#ifndef SHD_RECODE_H
#define SHD_RECODE_H

#include "errors.h"

SHDI_BEGIN

/* The bytes that shdi_recode() needs for this tensor; 0 for codecs that stay as they are. */
uint64_t shdi_recode_room(const shd_tensor *tensor);

/* Makes the section at delta->index ready. One that is recoded is decoded, with every check but that of padding, which
 * `check_all` adds, and is RICE in `room` from then on. Of the others, `check_all` makes all checks. */
shdi_fault shdi_recode(shd_delta *delta, int check_all, uint8_t *room);

SHDI_END

#endif
