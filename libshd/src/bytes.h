/* Integers in bytes, little-endian and at any alignment, and the bits of a word. */
#ifndef SHD_BYTES_H
#define SHD_BYTES_H

#include "internal.h"

/* ---- Loads and stores ---- */

static inline uint16_t shdi_load16(const uint8_t *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint32_t shdi_load32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint64_t shdi_load64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void shdi_store16(uint8_t *p, uint16_t v) { memcpy(p, &v, sizeof v); }
static inline void shdi_store32(uint8_t *p, uint32_t v) { memcpy(p, &v, sizeof v); }
static inline void shdi_store64(uint8_t *p, uint64_t v) { memcpy(p, &v, sizeof v); }

/* The compiler keeps a pinned value and does not load it again. A value that was checked must not be loaded twice,
 * because the file may change. */
#if defined(__GNUC__)
#define SHDI_PIN(value) __asm__ volatile("" : "+r"(value))
#else
#define SHDI_PIN(value) ((void)(value))
#endif

/* `word` is 4 or 8, as shdi_word() gives it. */
static inline uint64_t shdi_load_word(const uint8_t *p, uint32_t word) {
    uint64_t v = word == 4 ? shdi_load32(p) : shdi_load64(p);
    SHDI_PIN(v);
    return v;
}

static inline void shdi_store_word(uint8_t *p, uint32_t word, uint64_t v) {
    if (word == 4) {
        shdi_store32(p, (uint32_t)v);
    } else {
        shdi_store64(p, v);
    }
}

/* ---- Bits ---- */

#if defined(__GNUC__)
static inline uint32_t shdi_lowest_one(uint64_t v) { return (uint32_t)__builtin_ctzll(v); }
#else
static inline uint32_t shdi_lowest_one(uint64_t v) {
    uint32_t n = 0;
    for (uint32_t half = 32; half != 0; half /= 2) {
        if ((v & ((UINT64_C(1) << half) - 1)) == 0) {
            v >>= half;
            n += half;
        }
    }
    return n;
}
#endif

/* This is no builtin: without the instruction, a builtin would call libgcc. */
static inline uint32_t shdi_ones(uint64_t v) {
    v = v - ((v >> 1) & UINT64_C(0x5555555555555555));
    v = (v & UINT64_C(0x3333333333333333)) + ((v >> 2) & UINT64_C(0x3333333333333333));
    v = (v + (v >> 4)) & UINT64_C(0x0F0F0F0F0F0F0F0F);
    return (uint32_t)((v * UINT64_C(0x0101010101010101)) >> 56);
}

/* FORMAT.md, section 6.3. */
#define SHDI_MIX_POSITION UINT64_C(0x9E3779B97F4A7C15)
#define SHDI_MIX_BITS UINT64_C(0xD1B54A32D192ED03)
#define SHDI_MIX_AGAIN UINT64_C(0xD6E8FEB86659FD93)

static inline uint64_t shdi_mix(uint64_t position, uint64_t bits) {
    uint64_t x = position * SHDI_MIX_POSITION + (bits + 1) * SHDI_MIX_BITS;
    x = (x ^ x >> 32) * SHDI_MIX_AGAIN;
    return x ^ x >> 32;
}

/* The place of the one that `before` others precede; there is such a one. */
static inline uint32_t shdi_select(uint64_t v, uint32_t before) {
    const uint64_t each = UINT64_C(0x0101010101010101);
    uint64_t s = v - ((v >> 1) & UINT64_C(0x5555555555555555));
    s = (s & UINT64_C(0x3333333333333333)) + ((s >> 2) & UINT64_C(0x3333333333333333));
    s = ((s + (s >> 4)) & UINT64_C(0x0F0F0F0F0F0F0F0F)) * each; /* ones up to and with each byte */
    const uint64_t passed = (((before * each) | 0x80 * each) - s) & 0x80 * each; /* a bit for each byte with too few */
    const uint32_t byte = 8 * (uint32_t)(((passed >> 7) * each) >> 56);
    before -= (uint32_t)(s << 8 >> byte) & 0xFF;
    for (v >>= byte; before > 0; before--) {
        v &= v - 1;
    }
    return byte + shdi_lowest_one(v);
}

#endif
