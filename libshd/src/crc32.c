/* CRC-32 as in zlib: by tables, or by carry-less multiplication where the machine has it. */
#include "bytes.h"
#include "cpu.h"

#include "crc32_table.h"

#if SHDI_AVX2
#include <immintrin.h>
#endif

/* ---- By tables, eight bytes a step ---- */

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

#if SHDI_AVX2

/* ---- By carry-less multiplication ---- */

#define CLMUL __attribute__((target("pclmul,sse4.1")))

CLMUL static inline __m128i fold(__m128i v, __m128i by, __m128i next) {
    __m128i low = _mm_clmulepi64_si128(v, by, 0x00), high = _mm_clmulepi64_si128(v, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* Continues a CRC-32, inverted before and after, over `size` bytes: a multiple of 16, at least 64.
 *
 * After V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", with the
 * constants for the bit-reflected 0xEDB88320. */
CLMUL static uint32_t crc32_fold(uint32_t crc, const uint8_t *data, size_t size) {
    const __m128i by_512 = _mm_set_epi64x(0x01C6E41596, 0x0154442BD4);
    const __m128i by_128 = _mm_set_epi64x(0x00CCAA009E, 0x01751997D0);
    const __m128i by_64 = _mm_set_epi64x(0, 0x0163CD6124);
    const __m128i barrett = _mm_set_epi64x(0x01F7011641, 0x01DB710641);
    const __m128i *in = (const __m128i *)(const void *)data;
    const __m128i *end = in + size / 16;
    __m128i v[4];
    for (int i = 0; i < 4; i++) {
        v[i] = _mm_loadu_si128(in++);
    }
    v[0] = _mm_xor_si128(v[0], _mm_cvtsi32_si128((int)crc));
    for (; end - in >= 4; in += 4) {
        for (int i = 0; i < 4; i++) {
            v[i] = fold(v[i], by_512, _mm_loadu_si128(in + i));
        }
    }
    __m128i x = fold(fold(fold(v[0], by_128, v[1]), by_128, v[2]), by_128, v[3]);
    for (; in < end; in++) {
        x = fold(x, by_128, _mm_loadu_si128(in));
    }
    const __m128i low_words = _mm_setr_epi32(-1, 0, -1, 0);
    x = _mm_xor_si128(_mm_srli_si128(x, 8), _mm_clmulepi64_si128(x, by_128, 0x10));
    x = _mm_xor_si128(_mm_srli_si128(x, 4), _mm_clmulepi64_si128(_mm_and_si128(x, low_words), by_64, 0x00));
    __m128i y = _mm_clmulepi64_si128(_mm_and_si128(x, low_words), barrett, 0x10);
    y = _mm_clmulepi64_si128(_mm_and_si128(y, low_words), barrett, 0x00);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(x, y), 1);
}

#endif

uint32_t shd_crc32(uint32_t crc, const void *data, size_t size) {
    const uint8_t *bytes = data;
    crc = ~crc;
#if SHDI_AVX2
    if (size >= 64 && (shdi_cpu & SHDI_HAS_CLMUL) != 0) {
        size_t folded = size & ~(size_t)15;
        crc = crc32_fold(crc, bytes, folded);
        bytes += folded;
        size -= folded;
    }
#endif
    return ~crc32_by_table(crc, bytes, size);
}
