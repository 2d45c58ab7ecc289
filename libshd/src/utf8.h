/* The check of UTF-8. */
#ifndef SHD_UTF8_H
#define SHD_UTF8_H

#include "internal.h"

SHDI_BEGIN

int shdi_valid_utf8(const uint8_t *text, uint64_t size);

SHDI_END

#endif
