/* The caller's weights: what a call may do with them, and reading, writing and adding to their elements. */
#include "weights.h"

#include "bytes.h"
#include "dtypes.h"
#include "floats.h"
#include "operations.h"

/* ---- What a call may do ---- */

static int dtypes_go_together(const shd_tensor *tensor, const shd_weights *weights) {
    if (tensor->dtype == SHD_UNSPECIFIED) {
        return shdi_dtype_is_addable(weights->dtype);
    }
    if (weights->any_dtype && tensor->op == SHD_OP_ADD && shdi_dtype_is_addable(tensor->dtype)) {
        return shdi_dtype_is_addable(weights->dtype);
    }
    return tensor->dtype == weights->dtype;
}

SHDI_ONCE int shdi_check_weights(const shd_delta *delta, const shd_weights *weights, const void *saved) {
    if (delta == NULL || weights == NULL || (weights->data == NULL && weights->count != 0)) {
        return SHD_INVALID_ARGUMENT;
    }
    const shd_tensor *tensor = &delta->tensor;
    const uint32_t size = shd_dtype_size(weights->dtype);
    if (!dtypes_go_together(tensor, weights) || !shdi_size_is_known(size)) {
        return SHD_WRONG_DTYPE;
    }
    if (weights->first_position > tensor->numel || weights->count > tensor->numel - weights->first_position) {
        return SHD_WRONG_SHAPE;
    }
    return shdi_is_aligned(weights->data, size) && shdi_is_aligned(saved, size) ? SHD_OK : SHD_MISALIGNED;
}

SHDI_ONCE int shdi_check_strength(const shd_tensor *tensor, double strength) {
    const shdi_operation *operation = shdi_operation_of(tensor->op);
    if (operation == NULL) {
        return SHD_UNKNOWN_OP;
    }
    if (!shdi_is_in_result(operation)) {
        return SHD_WRONG_OPERATION;
    }
    int allowed = operation->adds ? shdi_is_finite((float)strength) : strength == 1.0;
    return allowed ? SHD_OK : SHD_BAD_STRENGTH;
}

/* ---- Elements ---- */

/* A byte pointer may point to anything. So the loops work on copies of what they need, which their writes cannot
 * change. */
#define GATHER(type)                                                                       \
    do {                                                                                   \
        const type *from = (const type *)(const void *)weights;                            \
        for (uint32_t i = 0; i < count; i++) {                                             \
            SHDI_PREFETCH(&from[later[i] + later_shift]);                                  \
            memcpy(to + i * sizeof(type), &from[offset[i] + shift], sizeof(type));         \
        }                                                                                  \
    } while (0)

#define SCATTER(type)                                                                      \
    do {                                                                                   \
        type *to = (type *)(void *)weights;                                                \
        for (uint32_t i = 0; i < count; i++) {                                             \
            memcpy(&to[offset[i] + shift], from + i * sizeof(type), sizeof(type));         \
        }                                                                                  \
    } while (0)

void shdi_gather(const uint8_t *weights, uint32_t size, const shdi_run *r, const shdi_run *ahead, uint8_t *to) {
    const uint32_t *const offset = r->offset, *const later = ahead->offset;
    const uint64_t shift = r->shift, later_shift = ahead->shift;
    const uint32_t count = r->count;
    switch (size) {
    case 1: GATHER(uint8_t); break;
    case 2: GATHER(uint16_t); break;
    case 4: GATHER(uint32_t); break;
    case 8: GATHER(uint64_t); break;
    default: break; /* shdi_check_weights() refuses it */
    }
}

void shdi_scatter(uint8_t *weights, uint32_t size, const shdi_run *r, const uint8_t *from) {
    const uint32_t *const offset = r->offset;
    const uint64_t shift = r->shift;
    const uint32_t count = r->count;
    switch (size) {
    case 1: SCATTER(uint8_t); break;
    case 2: SCATTER(uint16_t); break;
    case 4: SCATTER(uint32_t); break;
    case 8: SCATTER(uint64_t); break;
    default: break; /* shdi_check_weights() refuses it */
    }
}

void shdi_prefetch(const uint8_t *weights, uint32_t size, const shdi_run *r) {
    for (uint32_t i = 0; i < r->count; i++) {
        SHDI_PREFETCH(weights + (r->shift + r->offset[i]) * size);
    }
}

int shdi_add(const shdi_kernels *kernels, int dtype, void *result, const void *weight, const float *value, float alpha,
             uint32_t count) {
    switch (dtype) {
    case SHD_F32: kernels->add_f32(result, weight, value, alpha, count); return SHD_OK;
    case SHD_F16: kernels->add_f16(result, weight, value, alpha, count); return SHD_OK;
    case SHD_BF16: kernels->add_bf16(result, weight, value, alpha, count); return SHD_OK;
    default: return SHD_WRONG_DTYPE;
    }
}

/* An element's bits, or a shift's, as the highest bits of a word. So one addition does for all sizes. */
static uint64_t load_high(const uint8_t *from, uint32_t size, uint32_t i) {
    switch (size) {
    case 1: return (uint64_t)from[i] << 56;
    case 2: return (uint64_t)shdi_load16(from + 2 * i) << 48;
    case 4: return (uint64_t)shdi_load32(from + 4 * i) << 32;
    default: return shdi_load64(from + 8 * i);
    }
}

static void store_high(uint8_t *to, uint32_t size, uint32_t i, uint64_t value) {
    switch (size) {
    case 1: to[i] = (uint8_t)(value >> 56); break;
    case 2: shdi_store16(to + 2 * i, (uint16_t)(value >> 48)); break;
    case 4: shdi_store32(to + 4 * i, (uint32_t)(value >> 32)); break;
    default: shdi_store64(to + 8 * i, value); break;
    }
}

int shdi_shift(int dtype, void *result, const void *weight, const uint8_t *shifts, uint32_t count) {
    const int order = shdi_dtype_order(dtype);
    const uint32_t size = shd_dtype_size(dtype);
    if (order == SHDI_NO_ORDER) {
        return SHD_WRONG_DTYPE;
    }
    /* The order is the bits xor `always`, and xor `if_negative` where the sign bit is set: its own inverse. */
    const uint64_t sign = UINT64_C(1) << 63, others = (~UINT64_C(0) << (64 - 8 * size)) & ~sign;
    const uint64_t always = order == SHDI_UNSIGNED ? sign : 0;
    const uint64_t if_negative = order == SHDI_SIGN_AND_MAGNITUDE ? others : 0;
    uint64_t overflow = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t from = load_high(weight, size, i), by = load_high(shifts, size, i);
        from ^= always ^ (if_negative & (0 - (from >> 63)));
        uint64_t to = from + by;
        overflow |= (from ^ to) & (by ^ to);
        store_high(result, size, i, to ^ always ^ (if_negative & (0 - (to >> 63))));
    }
    return overflow >> 63 != 0 ? SHD_OUT_OF_RANGE : SHD_OK;
}
