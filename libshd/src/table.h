/* The tensor table. */
#ifndef SHD_TABLE_H
#define SHD_TABLE_H

#include "internal.h"

SHDI_BEGIN

/* Checks every record. The tensors' sections start at `sections_offset`. */
int shdi_check_table(const shd_file *file, uint64_t sections_offset, shd_status *status);

SHDI_END

#endif
