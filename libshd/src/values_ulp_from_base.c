/* The value codec ULP_FROM_BASE: shifts as ULP has them, listed by classes of the base's elements (FORMAT.md, 5.2). */
#include "from_base.h"
#include "section.h"
#include "values_ulp.h"
#include "weights.h"

#define HEAD 16u
#define MAX_COUNT_BITS 14u
#define NEVER UINT32_MAX /* no block has so many shifts */

/* A section taken apart. */
typedef struct shifts {
    const uint8_t *elements;
    uint64_t count;
    uint64_t blocks;
    uint64_t bits; /* of the stream */
    uint64_t most; /* the largest magnitude */
    const uint8_t *directory, *signs, *stream;
    uint32_t size; /* of an element */
    uint32_t word;
    uint32_t classes;
    int unused; /* a bit before the directory that has to be zero is not */
    uint8_t k[SHDI_MAX_BASE_CLASSES], j[SHDI_MAX_BASE_CLASSES];
    shdi_fields counts[SHDI_MAX_BASE_CLASSES];
    uint8_t class_of[SHDI_KEYS];
} shifts;

uint64_t shdi_ulp_from_base_size(uint64_t count) {
    return HEAD + 4 + 4 * shdi_ceil_div(count, SHDI_ULP_BLOCK) + 4 * shdi_ceil_div(count, 32) + SHDI_SLACK;
}

/* Where a block's stream starts; of the one behind the last, where the last one ends. */
static uint64_t start_of(const shifts *s, uint64_t block) {
    return block < s->blocks ? shdi_load_word(s->directory + block * s->word, s->word) : s->bits;
}

SHDI_ONCE static int take_apart(shifts *s, const uint8_t *section, uint64_t size) {
    shdi_parts from = {section, size, HEAD, 0};
    uint64_t head = shdi_load64(section);
    SHDI_PIN(head);
    s->bits = shdi_load64(section + 8);
    s->classes = (uint32_t)(head & 0xFF);
    const uint32_t width = (uint32_t)(head >> 8 & 0xFF);
    if (s->classes - 1 >= SHDI_MAX_BASE_CLASSES || width > MAX_COUNT_BITS || head >> 16 != 0) {
        return SHD_BAD_VALUE;
    }
    const uint8_t *thresholds = shdi_take(&from, 16 * (uint64_t)(s->classes - 1));
    if (thresholds == NULL) {
        return SHD_BAD_SIZE;
    }
    uint16_t copy[SHDI_MAX_BASE_CLASSES];
    memcpy(copy, thresholds, 2 * (s->classes - 1));
    if (!shdi_classes_of_keys(copy, s->classes - 1, s->class_of)) {
        return SHD_BAD_VALUE;
    }
    const uint8_t *parameters = shdi_take(&from, 16 * (uint64_t)s->classes);
    if (parameters == NULL) {
        return SHD_BAD_SIZE;
    }
    for (uint32_t i = 0; i < s->classes; i++) {
        s->k[i] = parameters[2 * i];
        s->j[i] = parameters[2 * i + 1];
        if (s->k[i] > SHDI_ULP_MAX_K || s->j[i] > SHDI_ULP_MAX_J) {
            return SHD_BAD_VALUE;
        }
    }
    for (uint32_t i = 0; i < s->classes; i++) {
        if (!shdi_take_fields(&from, s->blocks, width, &s->counts[i])) {
            return SHD_BAD_SIZE;
        }
    }
    s->word = shdi_word(s->bits);
    s->unused = from.unused;
    const uint64_t signs = from.at + s->blocks * s->word, stream = signs + 4 * shdi_ceil_div(s->count, 32);
    if (s->bits / 8 > size || stream + 4 * shdi_ceil_div(s->bits, 32) + SHDI_SLACK != size) {
        return SHD_BAD_SIZE;
    }
    s->directory = section + from.at;
    s->signs = section + signs;
    s->stream = section + stream;
    uint64_t last = 0;
    for (uint64_t block = 0; block <= s->blocks; block++) {
        const uint64_t start = start_of(s, block);
        if (start < last || (block == 0 && start != 0)) {
            return SHD_BAD_DIRECTORY;
        }
        last = start;
    }
    return SHD_OK;
}

static inline uint32_t class_at(const shifts *s, uint64_t rank) {
    return s->class_of[shdi_key_at(s->elements, rank, s->size)];
}

/* No block lists more shifts of a class than it has. */
static int has_enough(const shifts *s) {
    for (uint64_t block = 0; block < s->blocks; block++) {
        uint32_t found[SHDI_MAX_BASE_CLASSES] = {0};
        const uint64_t end = shdi_min((block + 1) * SHDI_ULP_BLOCK, s->count);
        for (uint64_t rank = block * SHDI_ULP_BLOCK; rank < end; rank++) {
            found[class_at(s, rank)]++;
        }
        for (uint32_t i = 0; i < s->classes; i++) {
            if (shdi_field(&s->counts[i], block) > found[i]) {
                return 0;
            }
        }
    }
    return 1;
}

/* What a block lists of one class. */
typedef struct list {
    shdi_unary gaps, widths;
    uint64_t low, field; /* the next of each */
    uint64_t left;       /* that were not read */
    uint64_t beyond;     /* of the one that was read, its magnitude less 2 */
    uint32_t k, j;
    uint32_t waits; /* one was read, and did not come yet */
} list;

/* Reads the next shift of a list, and how many of the class come before it: NEVER if there is none. */
static int read_next(const shifts *s, list *l, uint32_t *next) {
    *next = NEVER;
    l->waits = l->left != 0;
    if (l->left == 0) {
        return SHD_OK;
    }
    l->left--;
    const uint64_t gap = (shdi_read_zeros(&l->gaps) << l->k) + shdi_ulp_field(s->stream, l->low, l->k);
    const uint64_t width = shdi_read_zeros(&l->widths) + l->j;
    if (width > SHDI_ULP_MAX_WIDTH || l->field > s->bits || width > s->bits - l->field) {
        return SHD_BAD_VALUE;
    }
    l->beyond = (UINT64_C(1) << width) - (UINT64_C(1) << l->j) + shdi_ulp_field(s->stream, l->field, (uint32_t)width);
    l->low += l->k;
    l->field += width;
    *next = (uint32_t)shdi_min(gap, NEVER);
    return SHD_OK;
}

/* Finds the lists of a block. Its stream has exactly the bits of its four parts. */
static int open_block(const shifts *s, uint64_t block, list *lists) {
    uint64_t at = start_of(s, block), end = start_of(s, block + 1), all = 0, low_bits = 0;
    if (at > end || end > s->bits) {
        return SHD_BAD_DIRECTORY; /* the section has changed */
    }
    for (uint32_t i = 0; i < s->classes; i++) {
        list *l = &lists[i];
        l->k = s->k[i];
        l->j = s->j[i];
        l->left = shdi_field(&s->counts[i], block);
        l->gaps.bitmap = l->widths.bitmap = s->stream;
        l->gaps.bit = at;
        if (!shdi_skip_ones(s->stream, &at, end, l->left)) {
            return SHD_BAD_VALUE;
        }
        l->gaps.end = at;
        l->low = low_bits; /* from the first one's */
        low_bits += l->left * l->k;
        all += l->left;
    }
    if (low_bits > end - at) {
        return SHD_BAD_VALUE;
    }
    uint64_t unary = at + low_bits;
    for (uint32_t i = 0; i < s->classes; i++) {
        list *l = &lists[i];
        l->low += at;
        l->widths.bit = unary;
        if (!shdi_skip_ones(s->stream, &unary, end, l->left)) {
            return SHD_BAD_VALUE;
        }
        l->widths.end = unary;
    }
    uint64_t field = unary;
    for (uint32_t i = 0; i < s->classes; i++) {
        list *l = &lists[i];
        l->field = field;
        field += l->widths.end - l->widths.bit - l->left + l->left * l->j;
    }
    return field == end && (all != 0 || start_of(s, block) == end) ? SHD_OK : SHD_BAD_VALUE;
}

/* What was found to be wrong behind what is refused at once. */
typedef struct faults {
    int base;
    int value;
} faults;

static int decode_block(const shifts *s, uint64_t block, uint8_t *to, faults *found) {
    list lists[SHDI_MAX_BASE_CLASSES];
    uint32_t next[SHDI_MAX_BASE_CLASSES];
    int code = open_block(s, block, lists);
    for (uint32_t i = 0; code == SHD_OK && i < s->classes; i++) {
        code = read_next(s, &lists[i], &next[i]);
    }
    const uint64_t end = shdi_min((block + 1) * SHDI_ULP_BLOCK, s->count);
    for (uint64_t rank = block * SHDI_ULP_BLOCK; rank < end && code == SHD_OK; rank++) {
        const uint32_t class = class_at(s, rank);
        uint64_t magnitude = 1;
        if (next[class]-- == 0) {
            found->value |= lists[class].beyond > s->most - 2;
            magnitude = lists[class].beyond + 2;
            code = read_next(s, &lists[class], &next[class]);
        }
        const uint64_t minus = 0 - (uint64_t)(s->signs[rank / 8] >> (rank % 8) & 1);
        shdi_put_shift(to + rank * s->size, s->size, (magnitude ^ minus) - minus);
    }
    for (uint32_t i = 0; i < s->classes; i++) {
        while (code == SHD_OK && lists[i].waits) { /* what is left has to be whole, too */
            found->base = 1;
            code = read_next(s, &lists[i], &next[i]);
        }
    }
    return code;
}

int shd_ulp_from_base_decode(const void *section, uint64_t size, const void *elements, uint32_t element_size,
                             uint64_t count, void *to) {
    if (section == NULL || elements == NULL || to == NULL || count == 0 || count > SHDI_MAX_NUMEL ||
        !shdi_size_is_known(element_size)) {
        return SHD_INVALID_ARGUMENT;
    }
    if (size < shdi_ulp_from_base_size(count)) {
        return SHD_BAD_SIZE;
    }
    shifts s;
    memset(&s, 0, sizeof s);
    s.elements = elements;
    s.count = count;
    s.blocks = shdi_ceil_div(count, SHDI_ULP_BLOCK);
    s.size = element_size;
    s.most = (UINT64_C(1) << (8 * element_size - 1)) - 1;
    faults found = {0, 0};
    int code = take_apart(&s, section, size);
    if (code == SHD_OK && !has_enough(&s)) {
        code = SHD_WRONG_BASE;
    }
    for (uint64_t block = 0; block < s.blocks && code == SHD_OK; block++) {
        code = decode_block(&s, block, to, &found);
    }
    if (code == SHD_OK && (found.base || found.value)) {
        code = found.base ? SHD_WRONG_BASE : SHD_BAD_VALUE;
    }
    if (code != SHD_OK) {
        return code;
    }
    const uint64_t signs = (uint64_t)(s.signs - (const uint8_t *)section);
    const uint64_t stream = (uint64_t)(s.stream - (const uint8_t *)section);
    return s.unused || shdi_check_zeros(section, 8 * signs + count, stream).code != SHD_OK
               ? SHD_PADDING_NOT_ZERO
               : shdi_check_zeros(section, 8 * stream + s.bits, size).code;
}
