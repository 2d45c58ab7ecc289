/* Writing the canonical RICE section (FORMAT.md, sections 4.2 and 8). */
#include "bytes.h"
#include "kernels.h"

/* The gaps of a run of this many positions stay in the L1 cache. */
#define RUN 512u

/* ---- Choosing k ---- */

/* cost(k) = sum of floor(gap / 2^k) + n k lies between these two. `total` is the sum of the gaps. */
static uint64_t most_cost(uint64_t total, uint64_t n, uint32_t k) { return (total >> k) + n * k; }

static uint64_t least_cost(uint64_t total, uint64_t n, uint32_t k) {
    /* Every floor loses less than 1: sum >= (total - n (2^k - 1)) / 2^k. */
    uint64_t quotients = total >> k;
    return (quotients > n ? quotients - n : 0) + n * k;
}

/* Finds the k that can be the best by the bounds alone. They are few, and next to each other. */
static void find_candidates(uint64_t total, uint64_t n, uint32_t *first, uint32_t *last) {
    uint64_t best = UINT64_MAX;
    for (uint32_t k = 0; k <= SHDI_MAX_RICE_K; k++) {
        best = shdi_min(best, most_cost(total, n, k));
    }
    *first = SHDI_MAX_RICE_K + 1;
    for (uint32_t k = 0; k <= SHDI_MAX_RICE_K; k++) {
        if (least_cost(total, n, k) <= best) {
            *first = *first > k ? k : *first;
            *last = k;
        }
    }
}

/* Takes the gaps, less one, of positions[start .. start + count - 1]. Returns the bitwise or of them. A position that
 * is not larger than the one before makes it reach 2^63. */
static uint64_t take_gaps(const int64_t *positions, uint64_t start, uint32_t count, uint64_t *gap) {
    uint64_t all = 0;
    uint32_t i = 0;
    if (start == 0) {
        gap[i++] = (uint64_t)positions[0];
        all = gap[0];
    }
    for (; i < count; i++) {
        gap[i] = (uint64_t)positions[start + i] - (uint64_t)positions[start + i - 1] - 1;
        all |= gap[i];
    }
    return all;
}

int shd_rice_plan(const int64_t *positions, uint64_t count, uint64_t numel, shd_rice *plan) {
    if (positions == NULL || plan == NULL || count == 0 || numel > SHDI_MAX_NUMEL) {
        return SHD_INVALID_ARGUMENT;
    }
    if (positions[0] < 0 || (uint64_t)positions[count - 1] >= numel) {
        return SHD_POSITION_RANGE;
    }
    uint64_t end = (uint64_t)positions[count - 1] + 1;
    if (end < count) {
        return SHD_POSITION_ORDER;
    }
    uint32_t first = 0, last = 0;
    find_candidates(end - count, count, &first, &last);
    const shdi_kernels *kernels = shdi_kernels_best();
    uint64_t quotients[SHDI_MAX_RICE_K + 1] = {0};
    for (uint64_t start = 0; start < count; start += RUN) {
        uint64_t gap[RUN];
        uint32_t size = (uint32_t)shdi_min(count - start, RUN);
        if (take_gaps(positions, start, size, gap) >> 63 != 0) {
            return SHD_POSITION_ORDER;
        }
        for (uint32_t k = first; k <= last; k++) {
            quotients[k] += kernels->sum_shifted(gap, size, k);
        }
    }
    uint32_t best = first;
    for (uint32_t k = first + 1; k <= last; k++) {
        if (quotients[k] + count * k < quotients[best] + count * best) {
            best = k;
        }
    }
    plan->numel = numel;
    plan->count = count;
    plan->k = best;
    plan->word = shdi_word(numel);
    plan->unary_bits = quotients[best] + count;
    plan->size = 16 + shdi_ceil_div(plan->unary_bits, SHDI_BLOCK) * 2 * plan->word +
                 4 * shdi_ceil_div(count * best, 32) + 4 * shdi_ceil_div(plan->unary_bits, 32) + SHDI_SLACK;
    return SHD_OK;
}

/* ---- Writing ---- */

/* Packs the low bits into 32-bit words. */
typedef struct packer {
    uint8_t *next;
    uint64_t bits;
    uint32_t count;
} packer;

static inline void pack(packer *p, uint64_t value, uint32_t bits) {
    p->bits |= value << p->count;
    p->count += bits;
    if (p->count >= 32) {
        shdi_store32(p->next, (uint32_t)p->bits);
        p->next += 4;
        p->bits >>= 32;
        p->count -= 32;
    }
}

/* A place in the section: at unary bit `bit`, after `rank` nonzeros, the last of which is at `position` - 1. */
typedef struct writer {
    uint8_t *directory;
    uint32_t word;
    uint32_t k;
    uint64_t block; /* the next that needs an entry */
    uint64_t bit;
    uint64_t rank;
    uint64_t position;
} writer;

/* Writes the entries of the blocks that start at or before unary bit `bit`. That bit is the next one, or a zero before
 * it. */
static void write_entries(writer *w, uint64_t bit) {
    for (; w->block * SHDI_BLOCK <= bit; w->block++) {
        uint64_t zeros = w->block * SHDI_BLOCK - w->bit;
        shdi_store_word(w->directory, w->word, w->position + (zeros << w->k));
        shdi_store_word(w->directory + w->word, w->word, w->rank);
        w->directory += 2 * w->word;
    }
}

int shd_rice_encode(const shd_rice *plan, const int64_t *positions, void *section, uint64_t capacity) {
    if (plan == NULL || positions == NULL || section == NULL) {
        return SHD_INVALID_ARGUMENT;
    }
    if (capacity < plan->size || plan->size > (uint64_t)PTRDIFF_MAX) {
        return SHD_BUFFER_TOO_SMALL;
    }
    const uint32_t k = plan->k;
    const uint64_t mask = (UINT64_C(1) << k) - 1;
    uint8_t *start = section;
    memset(start, 0, (size_t)plan->size);
    shdi_store64(start, k);
    shdi_store64(start + 8, plan->unary_bits);
    uint64_t blocks = shdi_ceil_div(plan->unary_bits, SHDI_BLOCK);
    packer low = {start + 16 + blocks * 2 * plan->word, 0, 0};
    uint8_t *unary = low.next + 4 * shdi_ceil_div(plan->count * k, 32);
    writer w = {start + 16, plan->word, k, 0, 0, 0, 0};
    for (; w.rank < plan->count; w.rank++) {
        uint64_t gap = (uint64_t)positions[w.rank] - w.position;
        /* The nonzeros to come need bits. This fails only if the positions are not those of the plan. */
        if (gap >> k > plan->unary_bits - w.bit - (plan->count - w.rank)) {
            return SHD_INVALID_ARGUMENT;
        }
        uint64_t one = w.bit + (gap >> k);
        if (w.block * SHDI_BLOCK <= one) {
            write_entries(&w, one);
        }
        unary[one / 8] |= (uint8_t)(1u << (one % 8));
        pack(&low, gap & mask, k);
        w.bit = one + 1;
        w.position = (uint64_t)positions[w.rank] + 1;
    }
    if (low.count > 0) {
        shdi_store32(low.next, (uint32_t)low.bits);
    }
    return w.bit == plan->unary_bits ? SHD_OK : SHD_INVALID_ARGUMENT;
}
