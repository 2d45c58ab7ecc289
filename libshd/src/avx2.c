/* The AVX2 kernels. The library chooses them at run time. Each computes what its namesake in scalar.c does, bit for
 * bit. */
#include "avx2.h"
#include "bytes.h"
#include "floats.h"
#include "scalar.h"

#if SHDI_AVX2

#include "ones_table.h"

/* Writes the indices of the ones in byte `byte` of a word that starts at bit `start`. Returns how many there are. */
AVX2 static inline uint32_t ones_in_byte(uint64_t word, uint32_t byte, __m256i start, uint32_t *index) {
    uint32_t b = (uint32_t)(word >> (8 * byte)) & 0xFF;
    __m128i packed = _mm_loadl_epi64((const __m128i *)(const void *)&ones_of_byte[b]);
    __m256i first = _mm256_add_epi32(start, _mm256_set1_epi32((int)(8 * byte)));
    _mm256_storeu_si256((__m256i *)(void *)index, _mm256_add_epi32(_mm256_cvtepu8_epi32(packed), first));
    return (uint32_t)__builtin_popcount(b);
}

AVX2 static uint32_t ones(const uint8_t *bitmap, uint32_t bits, uint32_t *index) {
    uint32_t *to = index;
    for (uint32_t bit = 0; bit < bits; bit += 64) {
        uint64_t word = shdi_load64(bitmap + bit / 8);
        if (bits - bit < 64) {
            word &= (UINT64_C(1) << (bits - bit)) - 1;
        }
        SHDI_PIN(word);
        __m256i start = _mm256_set1_epi32((int)bit);
        to += ones_in_byte(word, 0, start, to);
        to += ones_in_byte(word, 1, start, to);
        to += ones_in_byte(word, 2, start, to);
        to += ones_in_byte(word, 3, start, to);
        to += ones_in_byte(word, 4, start, to);
        to += ones_in_byte(word, 5, start, to);
        to += ones_in_byte(word, 6, start, to);
        to += ones_in_byte(word, 7, start, to);
    }
    return (uint32_t)(to - index);
}

AVX2 static inline uint32_t zero_words(const uint8_t *words) {
    const __m256i four = _mm256_loadu_si256((const __m256i *)(const void *)words);
    return (uint32_t)_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(four, _mm256_setzero_si256())));
}

AVX2 static uint32_t words(const uint8_t *bitmap, uint32_t count, uint32_t *index) {
    uint32_t *to = index;
    for (uint32_t i = 0; i < count; i += 8, bitmap += 64) {
        const uint32_t zeros = zero_words(bitmap) | zero_words(bitmap + 32) << 4;
        to += ones_in_byte(~zeros, 0, _mm256_set1_epi32((int)i), to);
    }
    return (uint32_t)(to - index);
}

/* The sum of the lanes up to and with each, on top of *carry. Adds the sum of all to every lane of *carry. */
AVX2 static inline __m256i prefix_sum(__m256i v, __m256i *carry) {
    v = shdi_sums(v);
    const __m256i sums = _mm256_add_epi32(v, *carry);
    *carry = _mm256_add_epi32(*carry, _mm256_permutevar8x32_epi32(v, _mm256_set1_epi32(7)));
    return sums;
}

/* Eight fields of k bits are k bytes. So all groups of eight start at the same bit of a byte, and one shuffle serves
 * all. It brings the four bytes that hold field j to lane j. A shift and a mask do the rest. */
typedef struct fields {
    __m256i to_lanes;
    __m256i down;
    __m256i masks;
    uint32_t upper; /* fields 4 to 7 are loaded from this byte on */
} fields;

/* The groups of fields of k bits that start at bit `phase` of a byte. */
AVX2 static inline fields locate_fields(uint32_t phase, uint32_t k) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const uint32_t upper = (phase + 4 * k) / 8;
    __m256i bit = _mm256_add_epi32(_mm256_mullo_epi32(lane, _mm256_set1_epi32((int)k)), _mm256_set1_epi32((int)phase));
    bit = _mm256_sub_epi32(bit, _mm256_and_si256(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(3)),
                                                 _mm256_set1_epi32((int)(8 * upper))));
    const __m256i byte = _mm256_mullo_epi32(_mm256_srli_epi32(bit, 3), _mm256_set1_epi32(0x01010101));
    const fields f = {_mm256_add_epi32(byte, _mm256_set1_epi32(0x03020100)),
                      _mm256_and_si256(bit, _mm256_set1_epi32(7)), _mm256_set1_epi32((1 << k) - 1), upper};
    return f;
}

/* How many groups of fields of k bits can be taken: loads must not reach beyond `low_size` bytes. */
static inline uint64_t groups_in(const fields *f, uint32_t k, uint64_t low_size) {
    return low_size >= f->upper + 16 ? (low_size - f->upper - 16) / (k + (k == 0)) + 1 : 0;
}

AVX2 static inline __m256i take_fields(const uint8_t *low, const fields *f) {
    __m256i bytes = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)low)),
        _mm_loadu_si128((const __m128i *)(const void *)(low + f->upper)), 1);
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, f->to_lanes), f->down), f->masks);
}

AVX2 static uint64_t count_ones(const uint8_t *bitmap, uint64_t bits) {
    uint64_t ones = 0, bit = 0;
    for (; bit + 64 <= bits; bit += 64) {
        ones += (uint64_t)__builtin_popcountll(shdi_load64(bitmap + bit / 8));
    }
    return ones + shdi_scalar_count_ones(bitmap + bit / 8, bits - bit);
}

AVX2 static uint32_t sum_fields(const uint8_t *low, uint64_t low_size, uint64_t low_bit, uint32_t k, uint32_t count) {
    const fields f = locate_fields((uint32_t)low_bit, k);
    const uint32_t grouped = 8 * (uint32_t)shdi_min(count / 8, groups_in(&f, k, low_size));
    __m256i sums = _mm256_setzero_si256();
    for (uint32_t i = 0; i < grouped; i += 8, low += k) {
        sums = _mm256_add_epi32(sums, take_fields(low, &f));
    }
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const __m128i two = _mm_add_epi32(four, _mm_srli_si128(four, 8));
    const uint32_t sum = (uint32_t)_mm_cvtsi128_si32(_mm_add_epi32(two, _mm_srli_si128(two, 4)));
    return sum + shdi_scalar_sum_fields(low, low_size, low_bit, k, count - grouped);
}

/* The offset is (t << k) + base + sum - i (2^k - 1). The part that depends on i alone goes into the carry of the sum. */
AVX2 static uint64_t rice_offsets(uint32_t *t, uint32_t count, uint32_t k, uint32_t base, const uint8_t *low,
                                  uint64_t low_size, uint64_t low_bit) {
    const uint32_t mask = (1u << k) - 1;
    const fields f = locate_fields((uint32_t)low_bit, k);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i step = _mm256_slli_epi32(f.masks, 3), up = _mm256_set1_epi32((int)k);
    __m256i carry = _mm256_sub_epi32(_mm256_set1_epi32((int)base), _mm256_mullo_epi32(lanes, f.masks));
    const uint64_t groups = groups_in(&f, k, low_size);
    const uint32_t grouped = 8 * (uint32_t)shdi_min(count / 8, groups);
    uint32_t i = 0;
    for (; i < grouped; i += 8, low += k) {
        const __m256i sums = prefix_sum(take_fields(low, &f), &carry);
        carry = _mm256_sub_epi32(carry, step);
        __m256i bits = _mm256_sllv_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(t + i)), up);
        _mm256_storeu_si256((__m256i *)(void *)(t + i), _mm256_add_epi32(bits, sums));
    }
    if (i < count && i / 8 < groups) { /* and these are fewer than eight */
        const __m256i valid = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(count - i)), lanes);
        const __m256i sums = prefix_sum(_mm256_and_si256(take_fields(low, &f), valid), &carry);
        const __m256i bits = _mm256_sllv_epi32(_mm256_maskload_epi32((const int *)(const void *)(t + i), valid), up);
        _mm256_maskstore_epi32((int *)(void *)(t + i), valid, _mm256_add_epi32(bits, sums));
        count = i;
    }
    uint32_t sum = (uint32_t)_mm256_cvtsi256_si32(carry) - base + i * mask;
    for (uint64_t bit_of = low_bit; i < count; i++, bit_of += k) {
        sum += (uint32_t)(shdi_load64(low + bit_of / 8) >> (bit_of % 8)) & mask;
        t[i] = base + ((t[i] - i) << k) + sum + i;
    }
    return sum;
}

AVX2 static void widen(const uint32_t *offset, uint32_t count, uint64_t base, int64_t *positions) {
    const __m256i start = _mm256_set1_epi64x((int64_t)base);
    uint32_t i = 0;
    for (; i + 4 <= count; i += 4) {
        __m256i wide = _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i *)(const void *)(offset + i)));
        _mm256_storeu_si256((__m256i *)(void *)(positions + i), _mm256_add_epi64(wide, start));
    }
    for (; i < count; i++) {
        positions[i] = (int64_t)(base + offset[i]);
    }
}

AVX2 static void scale_i8(const uint8_t *q, uint32_t count, float scale, float *values) {
    const __m256 by = _mm256_set1_ps(scale);
    uint32_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(q + i)));
        _mm256_storeu_ps(values + i, _mm256_mul_ps(by, _mm256_cvtepi32_ps(wide)));
    }
    for (; i < count; i++) {
        values[i] = scale * (float)(int8_t)q[i];
    }
}

AVX2 static void look_up_i4(const uint8_t *nibbles, uint64_t first, uint32_t count, const float magnitude[8],
                            float *values) {
    const __m256 table = _mm256_loadu_ps(magnitude);
    const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i sign = _mm256_set1_epi32((int)0x80000000u);
    uint32_t i = 0;
    for (; first % 2 == 0 && i + 8 <= count; i += 8) {
        __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32((int)shdi_load32(nibbles + (first + i) / 2)), shift);
        __m256 size = _mm256_permutevar8x32_ps(table, codes); /* uses the three lowest bits of a lane only */
        __m256i minus = _mm256_and_si256(_mm256_slli_epi32(codes, 28), sign);
        _mm256_storeu_ps(values + i, _mm256_or_ps(size, _mm256_castsi256_ps(minus)));
    }
    for (; i < count; i++) {
        uint32_t nibble = (uint32_t)nibbles[(first + i) / 2] >> ((first + i) % 2 * 4) & 0xFu;
        values[i] = shdi_float(shdi_bits(magnitude[nibble & 7]) | (nibble & 8) << 28);
    }
}

/* ---- Adding ---- */

/* `w` and `y` are the weight and the sum as floats. Functions return the result's bits. */

AVX2 static inline __m256 sum_of(__m256 w, const float *value, __m256 alpha) {
    return _mm256_add_ps(w, _mm256_mul_ps(alpha, _mm256_loadu_ps(value)));
}

AVX2 static inline __m256i is_nan(__m256 v) { return _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)); }

AVX2 static inline __m256i choose(__m256i rounded, __m256i nan, __m256i weight, __m256 w, __m256 y) {
    return _mm256_blendv_epi8(_mm256_blendv_epi8(rounded, nan, is_nan(y)), weight, is_nan(w));
}

AVX2 static inline __m256i load_u16(const uint16_t *p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
}

AVX2 static inline void store_u16(uint16_t *p, __m256i v) {
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08);
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_castsi256_si128(packed));
}

AVX2 static void add_f32(uint32_t *result, const uint32_t *weight, const float *value, float alpha, uint32_t count) {
    const __m256 by = _mm256_set1_ps(alpha);
    const __m256i nan = _mm256_set1_epi32(0x7FC00000);
    uint32_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256i bits = _mm256_loadu_si256((const __m256i *)(const void *)(weight + i));
        __m256 w = _mm256_castsi256_ps(bits);
        __m256 y = sum_of(w, value + i, by);
        _mm256_storeu_si256((__m256i *)(void *)(result + i), choose(_mm256_castps_si256(y), nan, bits, w, y));
    }
    shdi_scalar_add_f32(result + i, weight + i, value + i, alpha, count - i);
}

AVX2 static void add_bf16(uint16_t *result, const uint16_t *weight, const float *value, float alpha, uint32_t count) {
    const __m256 by = _mm256_set1_ps(alpha);
    const __m256i nan = _mm256_set1_epi32(0x7FC0), one = _mm256_set1_epi32(1), bias = _mm256_set1_epi32(0x7FFF);
    uint32_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256i bits = load_u16(weight + i);
        __m256 w = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
        __m256 y = sum_of(w, value + i, by);
        __m256i u = _mm256_castps_si256(y);
        __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), one);
        __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, bias), even), 16);
        store_u16(result + i, choose(rounded, nan, bits, w, y));
    }
    shdi_scalar_add_bf16(result + i, weight + i, value + i, alpha, count - i);
}

/* As shdi_from_f16(). A product puts the exponent right. It is exact, for denormals too. */
AVX2 static inline __m256 from_f16(__m256i halves) {
    __m256i magnitude = _mm256_and_si256(halves, _mm256_set1_epi32(0x7FFF));
    __m256i sign = _mm256_slli_epi32(_mm256_xor_si256(halves, magnitude), 16);
    __m256 finite = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 13)), _mm256_set1_ps(0x1p112f));
    __m256i is_special = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7BFF)); /* infinity, NaN */
    __m256i special = _mm256_and_si256(is_special, _mm256_set1_epi32(0x7F800000));
    return _mm256_or_ps(finite, _mm256_castsi256_ps(_mm256_or_si256(sign, special)));
}

/* As shdi_to_f16(). */
AVX2 static inline __m256i to_f16(__m256 f) {
    __m256i bits = _mm256_castps_si256(f);
    __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
    __m256i sign = _mm256_srli_epi32(_mm256_xor_si256(bits, magnitude), 16);
    __m256i even = _mm256_and_si256(_mm256_srli_epi32(magnitude, 13), _mm256_set1_epi32(1));
    __m256i bias = _mm256_set1_epi32(0xFFF - (112 << 23));
    __m256i normal = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(magnitude, bias), even), 13);
    __m256 half = _mm256_set1_ps(0.5f);
    __m256i denormal = _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(magnitude), half)),
                                        _mm256_castps_si256(half));
    __m256i is_denormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x38800000), magnitude);
    __m256i is_large = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x477FFFFF));
    __m256i rounded = _mm256_blendv_epi8(normal, denormal, is_denormal);
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7C00), is_large);
    return _mm256_or_si256(sign, rounded);
}

AVX2 static void add_f16(uint16_t *result, const uint16_t *weight, const float *value, float alpha, uint32_t count) {
    const __m256 by = _mm256_set1_ps(alpha);
    const __m256i nan = _mm256_set1_epi32(0x7E00);
    uint32_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256i bits = load_u16(weight + i);
        __m256 w = from_f16(bits);
        __m256 y = sum_of(w, value + i, by);
        store_u16(result + i, choose(to_f16(y), nan, bits, w, y));
    }
    shdi_scalar_add_f16(result + i, weight + i, value + i, alpha, count - i);
}

AVX2 static uint32_t at_least(const float *x, uint32_t count, float threshold, uint32_t *index) {
    const __m256 least = _mm256_set1_ps(threshold);
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    uint32_t found = 0, i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256 size = _mm256_and_ps(_mm256_loadu_ps(x + i), magnitude);
        uint32_t mask = (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(size, least, _CMP_GE_OQ));
        if (mask != 0) { /* rarely so */
            __m128i packed = _mm_loadl_epi64((const __m128i *)(const void *)&ones_of_byte[mask]);
            __m256i at = _mm256_add_epi32(_mm256_cvtepu8_epi32(packed), _mm256_set1_epi32((int)i));
            _mm256_storeu_si256((__m256i *)(void *)(index + found), at);
            found += (uint32_t)__builtin_popcount(mask);
        }
    }
    for (; i < count; i++) {
        index[found] = i;
        found += shdi_magnitude(x[i]) >= threshold;
    }
    return found;
}

AVX2 static uint64_t sum_shifted(const uint64_t *gap, uint32_t count, uint32_t k) {
    const __m128i by = _mm_cvtsi32_si128((int)k);
    __m256i sums = _mm256_setzero_si256();
    uint32_t i = 0;
    for (; i + 4 <= count; i += 4) {
        sums = _mm256_add_epi64(
            sums, _mm256_srl_epi64(_mm256_loadu_si256((const __m256i *)(const void *)(gap + i)), by));
    }
    uint64_t lanes[4];
    _mm256_storeu_si256((__m256i *)(void *)lanes, sums);
    uint64_t sum = lanes[0] + lanes[1] + lanes[2] + lanes[3];
    for (; i < count; i++) {
        sum += gap[i] >> k;
    }
    return sum;
}

/* Sixteen elements, eight of them from 32 bytes on: packing what two of these are compared to brings all into order. */
AVX2 static inline __m256i keys_at(const uint8_t *from) {
    const __m128i low = _mm_loadu_si128((const __m128i *)(const void *)from);
    const __m128i high = _mm_loadu_si128((const __m128i *)(const void *)(from + 32));
    return _mm256_and_si256(_mm256_set_m128i(high, low), _mm256_set1_epi16(0x7FFF));
}

AVX2 static inline uint32_t keys_above(__m256i a, __m256i b, __m256i most) {
    return (uint32_t)_mm256_movemask_epi8(_mm256_packs_epi16(_mm256_cmpgt_epi16(a, most), _mm256_cmpgt_epi16(b, most)));
}

AVX2 static void class_masks(const uint8_t *elements, uint32_t blocks, const uint16_t *thresholds, uint32_t count,
                             uint64_t *masks, uint8_t *counts) {
    __m256i most[16]; /* of the keys below each threshold */
    for (uint32_t j = 0; j < count; j++) {
        most[j] = _mm256_set1_epi16((short)(shdi_min(thresholds[j], 0x8000) - 1));
    }
    for (; blocks > 0; blocks--, elements += 128, masks += 16, counts += 16) {
        const __m256i a = keys_at(elements), b = keys_at(elements + 16);
        const __m256i c = keys_at(elements + 64), d = keys_at(elements + 80);
        uint64_t rest = ~UINT64_C(0);
        for (uint32_t j = 0; j < count; j++) {
            const uint64_t above = keys_above(a, b, most[j]) | (uint64_t)keys_above(c, d, most[j]) << 32;
            masks[j] = rest & ~above;
            counts[j] = (uint8_t)__builtin_popcountll(rest & ~above);
            rest = above;
        }
        masks[count] = rest;
        counts[count] = (uint8_t)__builtin_popcountll(rest);
    }
}

const shdi_kernels shdi_avx2 = {
    .name = "avx2",
    .ones = ones,
    .rice_offsets = rice_offsets,
    .count_ones = count_ones,
    .sum_fields = sum_fields,
    .lines = shdi_avx2_lines,
    .words = words,
    .take_ones = shdi_avx2_take_ones,
    .rice_gaps = shdi_avx2_rice_gaps,
    .drawn = shdi_avx2_drawn,
    .widen = widen,
    .scale_i8 = scale_i8,
    .look_up_i4 = look_up_i4,
    .add_f32 = add_f32,
    .add_f16 = add_f16,
    .add_bf16 = add_bf16,
    .at_least = at_least,
    .sum_shifted = sum_shifted,
    .class_masks = class_masks,
};

#else

typedef int shdi_no_avx2; /* C has no empty file */

#endif
