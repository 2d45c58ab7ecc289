/* The scalar kernels. They define the results. */
#include "bytes.h"
#include "draw.h"
#include "floats.h"
#include "rice_writer.h"
#include "scalar.h"

/* The loop takes four ones at a time, beyond the last of a word. So it has fewer branches, and they are easier to
 * predict. */
static uint32_t ones(const uint8_t *bitmap, uint32_t bits, uint32_t *index) {
    const uint64_t top = UINT64_C(1) << 63; /* so there is always a one */
    uint32_t count = 0;
    for (uint32_t start = 0; start < bits; start += 64) {
        uint64_t word = shdi_load64(bitmap + start / 8);
        if (bits - start < 64) {
            word &= (UINT64_C(1) << (bits - start)) - 1;
        }
        SHDI_PIN(word);
        uint32_t in_word = shdi_ones(word);
        for (uint32_t *to = index + count, *end = to + in_word; to < end; to += 4) {
            to[0] = start + shdi_lowest_one(word | top);
            word &= word - 1;
            to[1] = start + shdi_lowest_one(word | top);
            word &= word - 1;
            to[2] = start + shdi_lowest_one(word | top);
            word &= word - 1;
            to[3] = start + shdi_lowest_one(word | top);
            word &= word - 1;
        }
        count += in_word;
    }
    return count;
}

/* The offset is (t << k) + carry, where carry is base + r[0] + ... + r[i] - i (2^k - 1). */
static uint64_t rice_offsets(uint32_t *t, uint32_t count, uint32_t k, uint32_t base, const uint8_t *low,
                             uint64_t low_size, uint64_t low_bit) {
    const uint32_t mask = (1u << k) - 1;
    uint32_t carry = base + mask, i = 0;
    (void)low_size;
    if (4 * k <= 64 - 7) { /* four fields in one load */
        for (; i + 4 <= count; i += 4, low_bit += 4 * k) {
            uint64_t word = shdi_load64(low + low_bit / 8) >> (low_bit % 8);
            uint32_t carry0 = carry + ((uint32_t)word & mask) - mask;
            uint32_t carry1 = carry0 + ((uint32_t)(word >>= k) & mask) - mask;
            uint32_t carry2 = carry1 + ((uint32_t)(word >>= k) & mask) - mask;
            carry = carry2 + ((uint32_t)(word >> k) & mask) - mask;
            t[i] = (t[i] << k) + carry0;
            t[i + 1] = (t[i + 1] << k) + carry1;
            t[i + 2] = (t[i + 2] << k) + carry2;
            t[i + 3] = (t[i + 3] << k) + carry;
        }
    }
    for (; i < count; i++, low_bit += k) {
        carry += ((uint32_t)(shdi_load64(low + low_bit / 8) >> (low_bit % 8)) & mask) - mask;
        t[i] = (t[i] << k) + carry;
    }
    return (uint32_t)(carry - base - mask + count * mask);
}

void shdi_scalar_lines(const uint32_t *order, uint32_t count, const shdi_cell **at, uint32_t *row, uint32_t *column) {
    const shdi_cell *c = *at;
    for (uint32_t i = 0;; c++) {
        const shdi_cell in = *c;
        for (; i < count && order[i] - in.start <= in.last; i++) {
            const uint32_t place = order[i] - in.start, below = (uint32_t)((uint64_t)place * in.reciprocal >> in.shift);
            row[i] = in.rows + below;
            column[i] = in.columns + place - below * in.width;
        }
        if (i == count) {
            break;
        }
    }
    *at = c;
}

uint32_t shdi_scalar_words(const uint8_t *bitmap, uint32_t count, uint32_t *index) {
    uint32_t found = 0;
    for (uint32_t i = 0; i < count; i++) {
        index[found] = i;
        found += shdi_load64(bitmap + 8 * i) != 0;
    }
    return found;
}

uint32_t shdi_scalar_take_ones(uint8_t *bitmap, const uint32_t *index, uint32_t *at, uint32_t count, uint32_t *one) {
    const uint64_t top = UINT64_C(1) << 63; /* so there is always a one */
    uint32_t ones = 0, i = *at;
    for (; i < count && ones <= SHDI_BLOCK - 64; i++) {
        const uint32_t start = 64 * index[i];
        uint64_t word = shdi_load64(bitmap + start / 8);
        shdi_store64(bitmap + start / 8, 0);
        const uint32_t in_word = shdi_ones(word);
        for (uint32_t *to = one + ones, *end = to + in_word; to < end; to += 4) {
            for (uint32_t j = 0; j < 4; j++) {
                uint32_t place = start + shdi_lowest_one(word | top);
                SHDI_PIN(place);
                to[j] = place;
                word &= word - 1;
            }
        }
        ones += in_word;
    }
    *at = i;
    return ones;
}

/* Four at a time. */
uint32_t shdi_scalar_rice_gaps(shdi_rice_writer *w, const uint32_t *offset, uint32_t count) {
    const uint64_t limit = w->block * SHDI_BLOCK;
    const uint32_t k = w->k, mask = (1u << k) - 1;
    uint8_t *const unary = w->unary;
    shdi_packer low = w->low;
    uint64_t last = w->bit - 1, word = shdi_load64(unary + last / 64 * 8);
    uint32_t i = 0;
    for (; count - i >= 4; i += 4) {
        uint32_t gap[4];
        uint64_t one[4], packed = 0;
        for (uint32_t j = 0; j < 4; j++) {
            gap[j] = offset[i + j] - (offset + i)[(int)j - 1] - 1;
            one[j] = (j == 0 ? last : one[j - 1]) + 1 + (gap[j] >> k);
        }
        if (one[3] >= limit) {
            break;
        }
        for (uint32_t j = 0; j < 4; j++) {
            word = (one[j] / 64 == last / 64 ? word : 0) | UINT64_C(1) << (one[j] % 64);
            last = one[j];
            shdi_store64(unary + last / 64 * 8, word);
            packed |= (uint64_t)(gap[j] & mask) << (j * k);
        }
        shdi_pack_bytes(&low, packed, 4 * k);
    }
    w->low = low;
    w->bit = last + 1;
    w->rank += i;
    return i;
}

void shdi_scalar_drawn(const shdi_draw *draw, uint32_t base, uint32_t *number, uint32_t count) {
    const shdi_draw d = *draw;
    for (uint32_t i = 0; i < count; i++) {
        number[i] = (uint32_t)shdi_drawn(&d, number[i]) - base;
    }
}

uint64_t shdi_scalar_count_ones(const uint8_t *bitmap, uint64_t bits) {
    uint64_t ones = 0, bit = 0;
    for (; bit + 64 <= bits; bit += 64) {
        ones += shdi_ones(shdi_load64(bitmap + bit / 8));
    }
    if (bit < bits) {
        ones += shdi_ones(shdi_load64(bitmap + bit / 8) << (64 - (bits - bit)));
    }
    return ones;
}

uint32_t shdi_scalar_sum_fields(const uint8_t *low, uint64_t low_size, uint64_t low_bit, uint32_t k, uint32_t count) {
    const uint32_t mask = (1u << k) - 1;
    uint32_t sum = 0;
    (void)low_size;
    for (uint32_t i = 0; i < count; i++, low_bit += k) {
        sum += (uint32_t)(shdi_load64(low + low_bit / 8) >> (low_bit % 8)) & mask;
    }
    return sum;
}

void shdi_scalar_widen(const uint32_t *offset, uint32_t count, uint64_t base, int64_t *positions) {
    uint32_t i = 0;
    for (; i + 4 <= count; i += 4) {
        positions[i] = (int64_t)(base + offset[i]);
        positions[i + 1] = (int64_t)(base + offset[i + 1]);
        positions[i + 2] = (int64_t)(base + offset[i + 2]);
        positions[i + 3] = (int64_t)(base + offset[i + 3]);
    }
    for (; i < count; i++) {
        positions[i] = (int64_t)(base + offset[i]);
    }
}

void shdi_scalar_scale_i8(const uint8_t *q, uint32_t count, float scale, float *values) {
    for (uint32_t i = 0; i < count; i++) {
        values[i] = scale * (float)(int8_t)q[i];
    }
}

void shdi_scalar_look_up_i4(const uint8_t *nibbles, uint64_t first, uint32_t count, const float magnitude[8],
                       float *values) {
    for (uint32_t i = 0; i < count; i++) {
        uint32_t nibble = (uint32_t)nibbles[(first + i) / 2] >> ((first + i) % 2 * 4) & 0xFu;
        values[i] = shdi_float(shdi_bits(magnitude[nibble & 7]) | (nibble & 8) << 28);
    }
}

void shdi_scalar_add_f32(uint32_t *result, const uint32_t *weight, const float *value, float alpha, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        float w = shdi_float(weight[i]);
        float s = alpha * value[i];
        float y = w + s;
        uint32_t rounded = shdi_is_nan(y) ? 0x7FC00000u : shdi_bits(y);
        result[i] = shdi_is_nan(w) ? weight[i] : rounded;
    }
}

void shdi_scalar_add_bf16(uint16_t *result, const uint16_t *weight, const float *value, float alpha, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        float w = shdi_from_bf16(weight[i]);
        float s = alpha * value[i];
        float y = w + s;
        uint16_t rounded = shdi_is_nan(y) ? 0x7FC0u : shdi_to_bf16(y);
        result[i] = shdi_is_nan(w) ? weight[i] : rounded;
    }
}

void shdi_scalar_add_f16(uint16_t *result, const uint16_t *weight, const float *value, float alpha, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        float w = shdi_from_f16(weight[i]);
        float s = alpha * value[i];
        float y = w + s;
        uint16_t rounded = shdi_is_nan(y) ? 0x7E00u : shdi_to_f16(y);
        result[i] = shdi_is_nan(w) ? weight[i] : rounded;
    }
}

uint32_t shdi_scalar_at_least(const float *x, uint32_t count, float threshold, uint32_t *index) {
    uint32_t found = 0;
    for (uint32_t i = 0; i < count; i++) {
        index[found] = i;
        found += shdi_magnitude(x[i]) >= threshold;
    }
    return found;
}

uint64_t shdi_scalar_sum_shifted(const uint64_t *gap, uint32_t count, uint32_t k) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < count; i++) {
        sum += gap[i] >> k;
    }
    return sum;
}

const shdi_kernels shdi_scalar = {
    .name = "scalar",
    .ones = ones,
    .rice_offsets = rice_offsets,
    .count_ones = shdi_scalar_count_ones,
    .sum_fields = shdi_scalar_sum_fields,
    .lines = shdi_scalar_lines,
    .words = shdi_scalar_words,
    .take_ones = shdi_scalar_take_ones,
    .rice_gaps = shdi_scalar_rice_gaps,
    .drawn = shdi_scalar_drawn,
    .widen = shdi_scalar_widen,
    .scale_i8 = shdi_scalar_scale_i8,
    .look_up_i4 = shdi_scalar_look_up_i4,
    .add_f32 = shdi_scalar_add_f32,
    .add_f16 = shdi_scalar_add_f16,
    .add_bf16 = shdi_scalar_add_bf16,
    .at_least = shdi_scalar_at_least,
    .sum_shifted = shdi_scalar_sum_shifted,
    .class_masks = NULL,
};
