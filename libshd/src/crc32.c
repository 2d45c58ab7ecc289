/* CRC-32 as in zlib, eight bytes a step. */
#include "internal.h"

#include "crc32_table.h"

static uint32_t crc32_by_table(uint32_t crc, const uint8_t *data, size_t size) {
    for (; size >= 8; data += 8, size -= 8) {
        uint32_t low = shdi_load32(data) ^ crc;
        uint32_t high = shdi_load32(data + 4);
        crc = crc_table[7][low & 0xFF] ^ crc_table[6][low >> 8 & 0xFF] ^ crc_table[5][low >> 16 & 0xFF] ^
              crc_table[4][low >> 24] ^ crc_table[3][high & 0xFF] ^ crc_table[2][high >> 8 & 0xFF] ^
              crc_table[1][high >> 16 & 0xFF] ^ crc_table[0][high >> 24];
    }
    for (; size > 0; data++, size--) {
        crc = crc >> 8 ^ crc_table[0][(crc ^ *data) & 0xFF];
    }
    return crc;
}

uint32_t shd_crc32(uint32_t crc, const void *data, size_t size) {
    const uint8_t *bytes = data;
    crc = ~crc;
#if SHDI_AVX2
    if (size >= 64 && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
        size_t folded = size & ~(size_t)15;
        crc = shdi_crc32_fold(crc, bytes, folded);
        bytes += folded;
        size -= folded;
    }
#endif
    return ~crc32_by_table(crc, bytes, size);
}
