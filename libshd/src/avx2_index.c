/* The AVX2 kernels for positions that become RICE when they are loaded. */
#include "avx2.h"
#include "draw.h"
#include "rice_writer.h"
#include "scalar.h"

#if SHDI_AVX2

AVX2 static inline uint64_t first_word(__m256i v) { return (uint64_t)_mm_cvtsi128_si64(_mm256_castsi256_si128(v)); }

/* ---- Tiles ---- */

/* The lines of up to eight orders of a cell. Orders behind it give anything. */
AVX2 static inline void lines_of(__m256i orders, const shdi_cell *c, uint32_t *rows, uint32_t *columns) {
    const __m256i shift = _mm256_set1_epi64x(c->shift);
    const __m256i reciprocal = _mm256_set1_epi32((int)c->reciprocal);
    const __m256i place = _mm256_sub_epi32(orders, _mm256_set1_epi32((int)c->start));
    const __m256i even = _mm256_srlv_epi64(_mm256_mul_epu32(place, reciprocal), shift);
    const __m256i odd = _mm256_srlv_epi64(_mm256_mul_epu32(_mm256_srli_epi64(place, 32), reciprocal), shift);
    const __m256i row = _mm256_or_si256(even, _mm256_slli_epi64(odd, 32));
    const __m256i column = _mm256_sub_epi32(place, _mm256_mullo_epi32(row, _mm256_set1_epi32((int)c->width)));
    _mm256_storeu_si256((__m256i *)(void *)rows, _mm256_add_epi32(row, _mm256_set1_epi32((int)c->rows)));
    _mm256_storeu_si256((__m256i *)(void *)columns, _mm256_add_epi32(column, _mm256_set1_epi32((int)c->columns)));
}

/* Orders are taken so many vectors at a time, and compared with where each cell ends that they are in. */
#define VECTORS 4u

AVX2 void shdi_avx2_lines(const uint32_t *order, uint32_t count, const shdi_cell **at, uint32_t *row,
                          uint32_t *column) {
    const shdi_cell *c = *at;
    uint32_t i = 0;
    for (uint32_t first = 0; first < count; first += 8 * VECTORS) {
        const uint32_t end = (uint32_t)shdi_min(count, first + 8 * VECTORS);
        __m256i orders[VECTORS];
        for (uint32_t j = 0; j < VECTORS; j++) {
            orders[j] = _mm256_loadu_si256((const __m256i *)(const void *)(order + first + 8 * j));
        }
        for (;; c++) {
            const __m256i last = _mm256_set1_epi32((int)(c->start + c->last));
            __m256i behind[VECTORS];
            for (uint32_t j = 0; j < VECTORS; j++) {
                behind[j] = _mm256_cmpgt_epi32(orders[j], last);
            }
            const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(behind[0], behind[1]),
                                                     _mm256_packs_epi32(behind[2], behind[3]));
            const uint32_t ones = (uint32_t)_mm256_movemask_epi8(bytes);
            const uint32_t stop = first + 8 * VECTORS - (uint32_t)__builtin_popcount(ones);
            do { /* most often once */
                const __m256i some = _mm256_loadu_si256((const __m256i *)(const void *)(order + i));
                lines_of(some, c, row + i, column + i);
                i += 8;
            } while (i < stop);
            i = stop;
            if (stop == end) {
                break;
            }
        }
    }
    *at = c;
}

/* Four at a time, which most often are enough; where there is no one is written what the next word overwrites. */
AVX2 uint32_t shdi_avx2_take_ones(uint8_t *bitmap, const uint32_t *index, uint32_t *at, uint32_t count, uint32_t *one) {
    uint32_t *to = one;
    uint32_t i = *at;
    for (; i < count && to <= one + SHDI_BLOCK - 64; i++) {
        const uint32_t start = 64 * index[i];
        uint64_t word = shdi_load64(bitmap + start / 8);
        shdi_store64(bitmap + start / 8, 0);
        uint32_t *const end = to + (uint32_t)__builtin_popcountll(word);
        do {
            for (uint32_t j = 0; j < 4; j++) {
                uint32_t place = start + (uint32_t)_tzcnt_u64(word);
                SHDI_PIN(place); /* stores of each are faster than a vector of them */
                to[j] = place;
                word = _blsr_u64(word);
            }
            to += 4;
        } while (to < end);
        to = end;
    }
    *at = i;
    return (uint32_t)(to - one);
}

/* ---- Draws ---- */

/* a * b of even lanes, and of odd ones. */
typedef struct products {
    __m256i even;
    __m256i odd;
} products;

AVX2 static inline products multiply(__m256i a, __m256i b) {
    return (products){_mm256_mul_epu32(a, b), _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32))};
}

/* The upper halves of products. */
AVX2 static inline __m256i upper_halves(products p) {
    return _mm256_blend_epi32(_mm256_srli_epi64(p.even, 32), p.odd, 0xAA);
}

/* What shdi_mix() adds and multiplies by, in each lane. */
typedef struct mixer {
    __m256i start;
    __m256i first;
    __m256i second;
} mixer;

AVX2 static inline mixer mixer_of(uint64_t seed) {
    uint64_t first = SHDI_MIX_POSITION, second = SHDI_MIX_AGAIN;
    SHDI_PIN(first); /* so that no vectors of constants take up room */
    SHDI_PIN(second);
    return (mixer){_mm256_set1_epi64x((int64_t)((seed + 1) * SHDI_MIX_BITS)), _mm256_set1_epi64x((int64_t)first),
                   _mm256_set1_epi64x((int64_t)second)};
}

/* The upper half of shdi_mix(), for four numbers in the lower halves of lanes; it is the upper half of each. */
AVX2 static inline __m256i mix(__m256i number, const mixer *m) {
    __m256i upper = _mm256_mul_epu32(number, _mm256_srli_epi64(m->first, 32));
    __m256i x = _mm256_add_epi64(_mm256_add_epi64(_mm256_mul_epu32(number, m->first), m->start),
                                 _mm256_slli_epi64(upper, 32));
    x = _mm256_xor_si256(x, _mm256_srli_epi64(x, 32));
    upper = _mm256_mul_epu32(x, _mm256_srli_epi64(m->second, 32));
    upper = _mm256_add_epi64(upper, _mm256_mul_epu32(_mm256_srli_epi64(x, 32), m->second));
    return _mm256_add_epi64(_mm256_mul_epu32(x, m->second), _mm256_slli_epi64(upper, 32));
}

AVX2 void shdi_avx2_drawn(const shdi_draw *draw, uint32_t base, uint32_t *number, uint32_t count) {
    if (draw->cells > INT32_MAX || draw->size >= UINT32_MAX) { /* places and sizes take 32 bits here */
        shdi_scalar_drawn(draw, base, number, count);
        return;
    }
    const mixer m = mixer_of(draw->seed);
    const __m256i cells = _mm256_set1_epi32((int)draw->cells), rest = _mm256_set1_epi32((int)draw->rest);
    const __m256i least = _mm256_set1_epi32((int)draw->size), fraction = _mm256_set1_epi32((int)draw->fraction);
    const __m256i small = _mm256_sub_epi32(cells, rest), from = _mm256_set1_epi32((int)base);
    for (uint32_t i = 0; i < count; i += 8) {
        const __m256i n = _mm256_loadu_si256((const __m256i *)(const void *)(number + i));
        __m256i larger = upper_halves(multiply(n, fraction));
        __m256i place = _mm256_sub_epi32(_mm256_mullo_epi32(n, rest), _mm256_mullo_epi32(larger, cells));
        const __m256i one = _mm256_cmpeq_epi32(_mm256_max_epu32(place, cells), place);
        larger = _mm256_sub_epi32(larger, one);
        place = _mm256_sub_epi32(place, _mm256_and_si256(one, cells));
        const __m256i size = _mm256_sub_epi32(least, _mm256_cmpeq_epi32(_mm256_max_epu32(place, small), place));
        const products drawn = {mix(n, &m), mix(_mm256_srli_epi64(n, 32), &m)};
        const __m256i begin = _mm256_add_epi32(_mm256_mullo_epi32(n, least), larger);
        const __m256i within = upper_halves(multiply(upper_halves(drawn), size));
        _mm256_storeu_si256((__m256i *)(void *)(number + i), _mm256_sub_epi32(_mm256_add_epi32(begin, within), from));
    }
}

/* ---- Writing RICE ---- */

/* The most bits that shdi_pack_bytes() takes. */
#define MOST_BITS 56u

/* Eight low parts of k bits each are joined two by two; `by` is k. */
AVX2 static inline void pack_low(shdi_packer *low, __m256i parts, uint32_t k, __m256i by) {
    const __m256i odd = _mm256_sllv_epi64(_mm256_srli_epi64(parts, 32), by);
    const __m256i two = _mm256_or_si256(_mm256_blend_epi32(parts, _mm256_setzero_si256(), 0xAA), odd);
    const __m256i upper = _mm256_sllv_epi64(_mm256_unpackhi_epi64(two, two), _mm256_add_epi64(by, by));
    const __m256i four = _mm256_or_si256(two, upper);
    const uint64_t first = first_word(four);
    const uint64_t second = (uint64_t)_mm_cvtsi128_si64(_mm256_extracti128_si256(four, 1));
    if (8 * k <= MOST_BITS) {
        shdi_pack_bytes(low, first | second << (4 * k), 8 * k);
    } else {
        shdi_pack_bytes(low, first, 4 * k);
        shdi_pack_bytes(low, second, 4 * k);
    }
}

/* A word with ones at eight places; those beyond it are left out. */
AVX2 static inline uint64_t ones_at(__m256i places) {
    const __m256i one = _mm256_set1_epi64x(1);
    const __m256i even = _mm256_sllv_epi64(one, _mm256_blend_epi32(places, _mm256_setzero_si256(), 0xAA));
    const __m256i ones = _mm256_or_si256(even, _mm256_sllv_epi64(one, _mm256_srli_epi64(places, 32)));
    const __m128i half = _mm_or_si128(_mm256_castsi256_si128(ones), _mm256_extracti128_si256(ones, 1));
    return (uint64_t)_mm_cvtsi128_si64(_mm_or_si128(half, _mm_unpackhi_epi64(half, half)));
}

/* A place among the unary bits. */
AVX2 static inline shdi_packer unary_at(const shdi_rice_writer *w, uint64_t bit) {
    return (shdi_packer){w->unary + bit / 8, w->unary[bit / 8], (uint32_t)(bit % 8)};
}

/* Sets ones at eight places from a bit on. Returns the bits up to the last, or 0 if that is not below `room`. */
AVX2 static uint32_t set_far(const shdi_rice_writer *w, __m256i places, uint64_t from, uint64_t room) {
    uint32_t place[8];
    _mm256_storeu_si256((__m256i *)(void *)place, places);
    if (place[7] >= room) {
        return 0;
    }
    for (uint32_t i = 0; i < 8; i++) {
        w->unary[(from + place[i]) / 8] |= (uint8_t)(1u << ((from + place[i]) % 8));
    }
    return place[7] + 1;
}

/* Eight at a time, whose ones are made in a word if they fit. */
AVX2 uint32_t shdi_avx2_rice_gaps(shdi_rice_writer *w, const uint32_t *offset, uint32_t count) {
    const uint32_t k = w->k;
    const uint64_t limit = w->block * SHDI_BLOCK; /* where a block starts */
    const __m256i all_k = _mm256_set1_epi32((int)k), by = _mm256_set1_epi64x(k);
    const __m256i masks = _mm256_set1_epi32((int)((1u << k) - 1));
    const __m256i one = _mm256_set1_epi32(1), most = _mm256_set1_epi32(SHDI_BLOCK); /* so that sums do not overflow */
    shdi_packer low = w->low, unary = unary_at(w, w->bit);
    uint64_t room = limit - w->bit;
    uint32_t i = 0;
    for (; count - i >= 8; i += 8) {
        const __m256i to = _mm256_loadu_si256((const __m256i *)(const void *)(offset + i));
        const __m256i from = _mm256_loadu_si256((const __m256i *)(const void *)(offset + i - 1));
        const __m256i gaps = _mm256_sub_epi32(_mm256_sub_epi32(to, from), one);
        const __m256i zeros = _mm256_min_epu32(_mm256_srlv_epi32(gaps, all_k), most);
        const __m256i places = _mm256_sub_epi32(shdi_sums(_mm256_add_epi32(zeros, one)), one);
        const uint64_t ones = ones_at(places);
        uint32_t bits = 64 - (uint32_t)__builtin_clzll(ones | 1);
        if (__builtin_popcountll(ones) == 8 && bits <= MOST_BITS) {
            if (bits > room) {
                break;
            }
            shdi_pack_bytes(&unary, ones, bits);
        } else {
            bits = set_far(w, places, limit - room, room);
            if (bits == 0) {
                break;
            }
            unary = unary_at(w, limit - room + bits);
        }
        pack_low(&low, _mm256_and_si256(gaps, masks), k, by);
        room -= bits;
    }
    w->low = low;
    w->bit = limit - room;
    w->rank += i;
    return i;
}

#else

typedef int shdi_no_avx2_index; /* C has no empty file */

#endif
