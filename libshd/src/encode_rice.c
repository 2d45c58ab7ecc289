/* Writing the canonical RICE section (FORMAT.md, sections 4.2 and 8). */
#include "rice_writer.h"
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

int shd_rice_encode(const shd_rice *plan, const int64_t *positions, void *section, uint64_t capacity) {
    if (plan == NULL || positions == NULL || section == NULL) {
        return SHD_INVALID_ARGUMENT;
    }
    if (capacity < plan->size || plan->size > (uint64_t)PTRDIFF_MAX) {
        return SHD_BUFFER_TOO_SMALL;
    }
    const uint32_t k = plan->k;
    uint8_t *start = section;
    memset(start, 0, (size_t)plan->size);
    shdi_store64(start, k);
    shdi_store64(start + 8, plan->unary_bits);
    uint8_t *low = start + 16 + shdi_ceil_div(plan->unary_bits, SHDI_BLOCK) * 2 * plan->word;
    shdi_rice_writer w = {.directory = start + 16, .low = {low, 0, 0}, .word = plan->word, .k = k};
    w.unary = low + 4 * shdi_ceil_div(plan->count * k, 32);
    while (w.rank < plan->count) {
        uint64_t gap = (uint64_t)positions[w.rank] - w.position;
        /* The nonzeros to come need bits. This fails only if the positions are not those of the plan. */
        if (gap >> k > plan->unary_bits - w.bit - (plan->count - w.rank)) {
            return SHD_INVALID_ARGUMENT;
        }
        shdi_rice_write(&w, (uint64_t)positions[w.rank]);
    }
    shdi_pack_rest(&w.low);
    return w.bit == plan->unary_bits ? SHD_OK : SHD_INVALID_ARGUMENT;
}
