/* SEEDED: what recoding needs of it. */
#ifndef SHD_SEEDED_H
#define SHD_SEEDED_H

#include "errors.h"
#include "rice_writer.h"

SHDI_BEGIN

/* Decodes the section at delta->index, with every check but that of padding, which `check_all` adds. */
shdi_fault shdi_seeded_decode(const shd_delta *delta, int check_all, shdi_rice_writer *writer);

SHDI_END

#endif
