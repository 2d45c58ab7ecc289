/* SHA-256 (FIPS 180-4). */
#ifndef SHD_SHA256_H
#define SHD_SHA256_H

#include "internal.h"

SHDI_BEGIN

typedef struct shdi_sha256 {
    uint32_t state[8];
    uint64_t size;
    uint8_t block[64];
} shdi_sha256;

void shdi_sha256_start(shdi_sha256 *hash);
void shdi_sha256_add(shdi_sha256 *hash, const void *data, size_t size);
void shdi_sha256_end(shdi_sha256 *hash, uint8_t digest[32]);

SHDI_END

#endif
