/* TILED: what recoding needs of it. */
#ifndef SHD_TILED_H
#define SHD_TILED_H

#include "errors.h"
#include "rice_writer.h"

#define SHDI_MAX_TILE 131072u
#define SHDI_MAX_TILE_FIELD 19u
#define SHDI_MAX_KS (SHDI_MAX_RICE_K + 1u) /* the most different k */

SHDI_BEGIN

/* The bytes that shdi_tiled_decode() needs for this tensor, the first `rice` of which it leaves alone. */
uint64_t shdi_tiled_room(const shd_tensor *tensor, uint64_t rice);

/* Decodes the section at delta->index, with every check but that of padding, which `check_padding` adds. `memory` starts
 * at a multiple of 64. */
shdi_fault shdi_tiled_decode(const shd_delta *delta, int check_padding, uint8_t *memory, uint64_t rice,
                             shdi_rice_writer *writer);

SHDI_END

#endif
