/* TILED: what loading needs of it. */
#ifndef SHD_TILED_H
#define SHD_TILED_H

#include "errors.h"

#define SHDI_MAX_TILE 131072u
#define SHDI_MAX_TILE_FIELD 19u
#define SHDI_MAX_KS (SHDI_MAX_RICE_K + 1u) /* the most different k */

SHDI_BEGIN

/* The bytes that shdi_tiled_load() needs for this tensor; 0 for other codecs. */
uint64_t shdi_tiled_room(const shd_tensor *tensor);

/* Decodes the section at delta->index, with every check but that of padding, which `check_padding` adds, and encodes it
 * as RICE in `room`. From then on the delta is one of RICE. */
shdi_fault shdi_tiled_load(shd_delta *delta, int check_padding, uint8_t *room);

SHDI_END

#endif
