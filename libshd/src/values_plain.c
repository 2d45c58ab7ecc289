/* The value codecs without groups: F32, F16 and BF16. */
#include "bytes.h"
#include "floats.h"
#include "values.h"

/* Refuses values that are not finite: those of rank `rank` on, of `size` bytes each. */
static shdi_fault check_finite(const float *values, uint64_t count, uint64_t rank, uint32_t size) {
    uint32_t infinite = 0;
    for (uint64_t i = 0; i < count; i++) {
        infinite |= !shdi_is_finite(values[i]);
    }
    return infinite ? shdi_fault_at(SHD_BAD_VALUE, rank * size) : shdi_ok();
}

shdi_fault shdi_decode_f32(const shd_delta *delta, const uint8_t *elements, uint64_t rank, uint64_t count,
                           float *values) {
    (void)delta;
    memcpy(values, elements + 4 * rank, (size_t)(4 * count));
    return check_finite(values, count, rank, 4);
}

int shdi_encode_f32(const float *values, uint64_t rank, uint64_t count, uint8_t *parameters, uint8_t *elements) {
    (void)parameters;
    memcpy(elements + 4 * rank, values, (size_t)(4 * count));
    return 1;
}

shdi_fault shdi_decode_f16(const shd_delta *delta, const uint8_t *elements, uint64_t rank, uint64_t count,
                           float *values) {
    (void)delta;
    for (uint64_t i = 0; i < count; i++) {
        values[i] = shdi_from_f16(shdi_load16(elements + 2 * (rank + i)));
    }
    return check_finite(values, count, rank, 2);
}

int shdi_encode_f16(const float *values, uint64_t rank, uint64_t count, uint8_t *parameters, uint8_t *elements) {
    int fits = 1;
    (void)parameters;
    for (uint64_t i = 0; i < count; i++) {
        uint16_t bits = shdi_to_f16(values[i]);
        fits &= (bits & 0x7C00u) != 0x7C00u;
        shdi_store16(elements + 2 * (rank + i), bits);
    }
    return fits;
}

shdi_fault shdi_decode_bf16(const shd_delta *delta, const uint8_t *elements, uint64_t rank, uint64_t count,
                            float *values) {
    (void)delta;
    for (uint64_t i = 0; i < count; i++) {
        values[i] = shdi_from_bf16(shdi_load16(elements + 2 * (rank + i)));
    }
    return check_finite(values, count, rank, 2);
}

int shdi_encode_bf16(const float *values, uint64_t rank, uint64_t count, uint8_t *parameters, uint8_t *elements) {
    int fits = 1;
    (void)parameters;
    for (uint64_t i = 0; i < count; i++) {
        uint16_t bits = shdi_to_bf16(values[i]);
        fits &= (bits & 0x7F80u) != 0x7F80u;
        shdi_store16(elements + 2 * (rank + i), bits);
    }
    return fits;
}
