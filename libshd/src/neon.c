/* The NEON kernels. The build for AArch64 chooses them. Each computes what its namesake in scalar.c does, bit for bit.
 * The others are the scalar ones, which the compiler vectorizes. */
#include "bytes.h"
#include "scalar.h"

#if SHDI_NEON

#include <arm_neon.h>

#include "ones_table.h"

static uint32_t ones(const uint8_t *bitmap, uint32_t bits, uint32_t *index) {
    uint32_t *to = index;
    for (uint32_t bit = 0; bit < bits; bit += 64) {
        uint64_t word = shdi_load64(bitmap + bit / 8);
        if (bits - bit < 64) {
            word &= (UINT64_C(1) << (bits - bit)) - 1;
        }
        SHDI_PIN(word);
        const uint8x8_t ones_of_bytes = vcnt_u8(vcreate_u8(word));
        uint64_t counts = vget_lane_u64(vreinterpret_u64_u8(ones_of_bytes), 0);
        for (uint32_t byte = 0; byte < 8; byte++, word >>= 8, counts >>= 8) {
            uint16x8_t packed = vmovl_u8(vcreate_u8(ones_of_byte[word & 0xFF]));
            uint32x4_t start = vdupq_n_u32(bit + 8 * byte);
            vst1q_u32(to, vaddw_u16(start, vget_low_u16(packed)));
            vst1q_u32(to + 4, vaddw_u16(start, vget_high_u16(packed)));
            to += counts & 0xFF;
        }
    }
    return (uint32_t)(to - index);
}

/* The sum of the lanes up to and with each, on top of *carry. Adds the sum of all to every lane of *carry. */
static inline uint32x4_t prefix_sum(uint32x4_t v, uint32x4_t *carry) {
    const uint32x4_t zero = vdupq_n_u32(0);
    v = vaddq_u32(v, vextq_u32(zero, v, 3));
    v = vaddq_u32(v, vextq_u32(zero, v, 2));
    uint32x4_t sums = vaddq_u32(v, *carry);
    *carry = vaddq_u32(*carry, vdupq_laneq_u32(v, 3));
    return sums;
}

/* Brings four fields of k bits to the four lanes. The first starts `phase` bits into a byte. */
typedef struct fields {
    uint8x16_t to_lanes;
    int32x4_t down;
} fields;

static fields locate_fields(uint32_t phase, uint32_t k) {
    uint8_t shuffle[16];
    int32_t shift[4];
    for (uint32_t j = 0; j < 4; j++) {
        uint32_t bit = phase + j * k;
        shift[j] = -(int32_t)(bit % 8);
        for (uint32_t b = 0; b < 4; b++) {
            shuffle[4 * j + b] = (uint8_t)(bit / 8 + b);
        }
    }
    fields f = {vld1q_u8(shuffle), vld1q_s32(shift)};
    return f;
}

static inline uint32x4_t take_fields(const uint8_t *low, const fields *f, uint32x4_t masks) {
    uint32x4_t bytes = vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(low), f->to_lanes));
    return vandq_u32(vshlq_u32(bytes, f->down), masks);
}

/* As in avx2.c, eight fields are k bytes, and the offset is (t << k) + carry. */
static uint64_t rice_offsets(uint32_t *t, uint32_t count, uint32_t k, uint32_t base, const uint8_t *low,
                             uint64_t low_size, uint64_t low_bit) {
    const uint32_t mask = (1u << k) - 1;
    const uint32_t phase = (uint32_t)low_bit, upper = (phase + 4 * k) / 8;
    const uint32_t start[4] = {base, base - mask, base - 2 * mask, base - 3 * mask};
    const fields lower_four = locate_fields(phase, k), upper_four = locate_fields(phase + 4 * k - 8 * upper, k);
    const uint32x4_t masks = vdupq_n_u32(mask), step = vdupq_n_u32(4 * mask);
    const int32x4_t up = vdupq_n_s32((int32_t)k);
    uint32x4_t carry = vld1q_u32(start);
    uint32_t i = 0;
    /* Loads must not reach beyond the section. */
    const uint64_t room = low_size >= upper + 16 ? (low_size - upper - 16) / (k + (k == 0)) + 1 : 0;
    const uint32_t grouped = 8 * (uint32_t)shdi_min(count / 8, room);
    for (; i < grouped; i += 8, low += k) {
        uint32x4_t first = prefix_sum(take_fields(low, &lower_four, masks), &carry);
        carry = vsubq_u32(carry, step);
        uint32x4_t second = prefix_sum(take_fields(low + upper, &upper_four, masks), &carry);
        carry = vsubq_u32(carry, step);
        vst1q_u32(t + i, vaddq_u32(vshlq_u32(vld1q_u32(t + i), up), first));
        vst1q_u32(t + i + 4, vaddq_u32(vshlq_u32(vld1q_u32(t + i + 4), up), second));
    }
    uint32_t sum = vgetq_lane_u32(carry, 0) - base + i * mask;
    for (uint64_t bit = phase; i < count; i++, bit += k) {
        sum += (uint32_t)(shdi_load64(low + bit / 8) >> (bit % 8)) & mask;
        t[i] = base + ((t[i] - i) << k) + sum + i;
    }
    return sum;
}

const shdi_kernels shdi_neon = {
    .name = "neon",
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

#else

typedef int shdi_no_neon; /* C has no empty file */

#endif
