/* Value codecs: the worked example, and encoding and decoding against plain formulas. */
#include "arithmetic.h"
#include "check.h"
#include "support.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* A tensor with this VALUES section, at all positions. */
static bytes file_of_values(int codec, int dtype, int op, bytes values, uint64_t nnz) {
    tensor_spec t = {.name = "w", .rank = 1, .dims = {nnz}, .dtype = (uint8_t)dtype, .op = (uint8_t)op,
                     .index_codec = SHD_INDEX_ALL, .value_codec = (uint8_t)codec, .nnz = nnz,
                     .values = values.data, .values_size = values.size};
    return build_file(&t, 1, 0, NULL, 0);
}

static int load(bytes f, int flags, shd_file *file, shd_delta *delta) {
    int code = shd_open(file, f.data, f.size, NULL);
    return code != SHD_OK ? code : shd_load(file, 0, SHD_CHECK_ALL | flags, NULL, 0, delta, NULL);
}

static void check_section(int codec, const void *section, uint64_t size, uint64_t nnz, int expected) {
    bytes values = {take(size), size};
    memcpy(values.data, section, size);
    bytes f = file_of_values(codec, SHD_F32, codec == SHD_VALUES_BITS ? SHD_OP_SET : SHD_OP_ADD, values, nnz);
    shd_file file;
    shd_delta delta;
    CHECK_CODE(load(f, 0, &file, &delta), expected);
    give(f.data);
    give(values.data);
}

/* FORMAT.md, section 9.2 */
static void test_worked_example(void) {
    static const float values[3] = {0.5f, -1.0f, 2.25f};
    static const uint8_t expected[16] = {0x00, 0x3F, 0x80, 0x3E, 0xA0, 0x07};
    uint8_t section[16];
    float decoded[3];
    CHECK(shd_values_size(SHD_VALUES_I4, 0, 3) == 16);
    CHECK_CODE(shd_values_encode(SHD_VALUES_I4, values, 3, section, 15), SHD_BUFFER_TOO_SMALL);
    CHECK_CODE(shd_values_encode(SHD_VALUES_I4, values, 3, section, 16), SHD_OK);
    CHECK(memcmp(section, expected, 16) == 0);
    bytes stored = {section, 16};
    bytes f = file_of_values(SHD_VALUES_I4, SHD_F32, SHD_OP_ADD, stored, 3);
    shd_file file;
    shd_delta delta;
    CHECK_CODE(load(f, 0, &file, &delta), SHD_OK);
    CHECK_CODE(shd_values(&delta, 0, 3, decoded, NULL), SHD_OK);
    CHECK(memcmp(decoded, values, sizeof values) == 0);
    CHECK_CODE(shd_values(&delta, 1, 3, decoded, NULL), SHD_INVALID_ARGUMENT);
    CHECK_CODE(shd_elements(&delta, 0, 3, decoded, NULL), SHD_WRONG_OPERATION);
    give(f.data);
}

static void test_refusals(void) {
    static const uint8_t pad_nibble[16] = {0x00, 0x3F, 0x80, 0x3E, 0xA0, 0x17};
    static const uint8_t negative_step[16] = {0x00, 0x3F, 0x80, 0xBE, 0xA0, 0x07};
    static const uint8_t infinite_lo[16] = {0x80, 0x7F, 0x80, 0x3E, 0xA0, 0x07};
    static const uint8_t too_large[16] = {0x7F, 0x7F, 0x7F, 0x7F};
    static const uint8_t i8[16] = {0x80, 0x3F, 0, 0, 5}, i8_large[16] = {0x7F, 0x7F, 0, 0, 5};
    static const uint8_t i8_pad[16] = {0x80, 0x3F, 1, 0, 5}, i8_slack[16] = {0x80, 0x3F, 0, 0, 5, 0, 0, 0, 0, 1};
    static const uint8_t sign_pad[16] = {0x80, 0x3F, 0, 0, 0xF};
    static const uint8_t f32_nan[12] = {0, 0, 0xC0, 0x7F};
    check_section(SHD_VALUES_I4, pad_nibble, 16, 3, SHD_PADDING_NOT_ZERO);
    check_section(SHD_VALUES_I4, negative_step, 16, 3, SHD_BAD_VALUE);
    check_section(SHD_VALUES_I4, infinite_lo, 16, 3, SHD_BAD_VALUE);
    check_section(SHD_VALUES_I4, too_large, 16, 3, SHD_BAD_VALUE);
    check_section(SHD_VALUES_I8, i8, 16, 1, SHD_OK);
    check_section(SHD_VALUES_I8, i8, 16, 5, SHD_BAD_SIZE);
    check_section(SHD_VALUES_I8, i8_large, 16, 1, SHD_BAD_VALUE);
    check_section(SHD_VALUES_I8, i8_pad, 16, 1, SHD_PADDING_NOT_ZERO);
    check_section(SHD_VALUES_I8, i8_slack, 16, 1, SHD_PADDING_NOT_ZERO);
    check_section(SHD_VALUES_SIGN, sign_pad, 16, 3, SHD_PADDING_NOT_ZERO);
    check_section(SHD_VALUES_F32, f32_nan, 12, 1, SHD_BAD_VALUE);
    check_section(SHD_VALUES_BITS, f32_nan, 12, 1, SHD_OK);
}

/* Decodes with and without SIMD, whole and in parts, and compares with `expected`. */
static void check_decoding(int codec, bytes section, const float *expected, uint64_t n) {
    bytes f = file_of_values(codec, SHD_F32, SHD_OP_ADD, section, n);
    float *decoded = take(n * sizeof *decoded);
    for (int flags = 0; flags <= SHD_SCALAR; flags += SHD_SCALAR) {
        shd_file file;
        shd_delta delta;
        CHECK_CODE(load(f, flags, &file, &delta), SHD_OK);
        CHECK_CODE(shd_values(&delta, 0, n, decoded, NULL), SHD_OK);
        CHECK(memcmp(decoded, expected, n * sizeof *decoded) == 0);
        for (uint64_t first = 0; first < n; first += 1 + n / 13) {
            uint64_t count = (n - first) / 2;
            CHECK_CODE(shd_values(&delta, first, count, decoded, NULL), SHD_OK);
            CHECK(memcmp(decoded, expected + first, count * sizeof *decoded) == 0);
        }
    }
    give(decoded);
    give(f.data);
}

/* What a codec without a formula below is compared with; the conformance vectors check its values. */
static void decode_scalar(int codec, bytes section, float *values, uint64_t n) {
    bytes f = file_of_values(codec, SHD_F32, SHD_OP_ADD, section, n);
    shd_file file;
    shd_delta delta;
    CHECK_CODE(load(f, SHD_SCALAR, &file, &delta), SHD_OK);
    CHECK_CODE(shd_values(&delta, 0, n, values, NULL), SHD_OK);
    give(f.data);
}

static float bf16_of(const uint8_t *p) { return float_of((uint32_t)(p[0] | p[1] << 8) << 16); }

static void expect_i8(const uint8_t *section, uint64_t n, float *expected) {
    const uint8_t *q = section + (2 * ((n + 127) / 128) + 3) / 4 * 4;
    for (uint64_t i = 0; i < n; i++) {
        expected[i] = bf16_of(section + i / 128 * 2) * (float)(int8_t)q[i];
    }
}

static void expect_i4(const uint8_t *section, uint64_t n, float *expected) {
    const uint8_t *nibbles = section + 4 * ((n + 127) / 128);
    for (uint64_t i = 0; i < n; i++) {
        int nibble = nibbles[i / 2] >> (i % 2 * 4) & 15;
        volatile float product = bf16_of(section + i / 128 * 4 + 2) * (float)(nibble & 7);
        float magnitude = bf16_of(section + i / 128 * 4) + product;
        expected[i] = nibble & 8 ? -magnitude : magnitude;
    }
}

static void expect_sign(const uint8_t *section, uint64_t n, float *expected) {
    const uint8_t *signs = section + (2 * ((n + 127) / 128) + 3) / 4 * 4;
    for (uint64_t i = 0; i < n; i++) {
        float lo = bf16_of(section + i / 128 * 2);
        expected[i] = signs[i / 8] >> (i % 8) & 1 ? -lo : lo;
    }
}

static void expect_bf16(const uint8_t *section, uint64_t n, float *expected) {
    for (uint64_t i = 0; i < n; i++) {
        expected[i] = bf16_of(section + 2 * i);
    }
}

static void expect_f16(const uint8_t *section, uint64_t n, float *expected) {
    for (uint64_t i = 0; i < n; i++) {
        int bits = section[2 * i] | section[2 * i + 1] << 8;
        int exponent = bits >> 10 & 31, fraction = bits & 1023;
        double magnitude = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
        expected[i] = (float)(bits & 0x8000 ? -magnitude : magnitude);
    }
}

static void expect_f32(const uint8_t *section, uint64_t n, float *expected) { memcpy(expected, section, 4 * n); }

static void test_codecs(void) {
    static const struct {
        void (*expect)(const uint8_t *, uint64_t, float *);
        float most_relative_error;
    } formulas[] = {
        [SHD_VALUES_F32] = {expect_f32, 0},        [SHD_VALUES_F16] = {expect_f16, 0x1p-10f},
        [SHD_VALUES_BF16] = {expect_bf16, 0x1p-8f}, [SHD_VALUES_I8] = {expect_i8, 0.6f},
        [SHD_VALUES_I4] = {expect_i4, 0.6f},       [SHD_VALUES_SIGN] = {expect_sign, 1e9f},
    };
    static const uint64_t counts[] = {1, 2, 31, 127, 128, 129, 1000, 4096};
    random_state r = {9};
    const codec_list codecs = float_codecs();
    CHECK(codecs.count >= SHD_VALUES_SIGN);
    for (int j = 0; j < codecs.count; j++) {
        const int codec = codecs.ids[j];
        const int has_formula = codec < (int)(sizeof formulas / sizeof formulas[0]) && formulas[codec].expect != NULL;
        for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
            uint64_t n = counts[i];
            float *values = take(n * sizeof *values), *expected = take(n * sizeof *expected);
            random_values(&r, values, n);
            bytes section = encode_values(codec, values, n);
            if (has_formula) {
                formulas[codec].expect(section.data, n, expected);
            } else {
                decode_scalar(codec, section, expected, n);
            }
            check_decoding(codec, section, expected, n);
            for (uint64_t k = 0; k < n; k++) {
                CHECK(!has_formula ||
                      fabsf(expected[k] - values[k]) <= formulas[codec].most_relative_error * fabsf(values[k]));
                CHECK(signbit(expected[k]) == signbit(values[k]));
            }
            give(section.data);
            give(values);
            give(expected);
        }
    }
}

/* bf16 and fp16 by search: the nearest of all, the even one of two that are equally near. */
static uint16_t nearest(double value, double (*to_double)(uint16_t), uint16_t infinity) {
    uint16_t low = 0, high = infinity; /* as bits; the value of infinity is where the next power of two would be */
    double magnitude = fabs(value);
    while (high - low > 1) {
        uint16_t middle = (uint16_t)((low + high) / 2);
        if (to_double(middle) <= magnitude) {
            low = middle;
        } else {
            high = middle;
        }
    }
    double below = magnitude - to_double(low), above = to_double(high) - magnitude;
    uint16_t chosen = below < above || (below == above && low % 2 == 0) ? low : high;
    return (uint16_t)(chosen | (signbit(value) ? 0x8000 : 0));
}

static double widen_bf16(uint16_t bits) {
    int exponent = bits >> 7, fraction = bits & 127;
    return exponent == 0 ? ldexp(fraction, -133) : ldexp(128 + fraction, exponent - 134);
}

static double widen_f16(uint16_t bits) {
    int exponent = bits >> 10, fraction = bits & 1023;
    return exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
}

static void test_rounding(void) {
    random_state r = {12};
    for (int i = 0; i < 200000; i++) {
        uint32_t bits = (uint32_t)random_bits(&r);
        if (i % 2 != 0) { /* near ties, and in the range of fp16 */
            bits = (bits & 0x80000000u) | (0x32800000u + (bits & 0x7FFFFFFFu) % 0x15800000u);
            bits = (bits & ~0x1FFFu) | (uint32_t)(random_bits(&r) % 3 * 0x1000 + random_bits(&r) % 3 - 1);
        }
        float value = float_of(bits);
        if (!isfinite(value)) {
            continue;
        }
        uint8_t section[12];
        int code = shd_values_encode(SHD_VALUES_F16, &value, 1, section, sizeof section);
        uint16_t expected = nearest(value, widen_f16, 0x7C00), got = (uint16_t)(section[0] | section[1] << 8);
        CHECK_CODE(code, (expected & 0x7FFF) == 0x7C00 ? SHD_VALUES_DO_NOT_FIT : SHD_OK);
        CHECK(got == expected);
        code = shd_values_encode(SHD_VALUES_BF16, &value, 1, section, sizeof section);
        expected = nearest(value, widen_bf16, 0x7F80);
        got = (uint16_t)(section[0] | section[1] << 8);
        CHECK_CODE(code, (expected & 0x7FFF) == 0x7F80 ? SHD_VALUES_DO_NOT_FIT : SHD_OK);
        CHECK(got == expected);
    }
}

static void test_extremes(void) {
    static uint8_t section[64];
    static const float infinite[2] = {1, INFINITY}, largest[2] = {1, FLT_MAX}, zeros[2] = {0.0f, -0.0f};
    static const float denormal[2] = {0x1p-149f, -0x1p-140f}, alone[1] = {0.3f};
    const codec_list codecs = float_codecs();
    for (int i = 0; i < codecs.count; i++) {
        const int codec = codecs.ids[i];
        CHECK_CODE(shd_values_encode(codec, infinite, 2, section, sizeof section), SHD_VALUES_DO_NOT_FIT);
        CHECK_CODE(shd_values_encode(codec, zeros, 2, section, sizeof section), SHD_OK);
        CHECK_CODE(shd_values_encode(codec, denormal, 2, section, sizeof section), SHD_OK);
        CHECK_CODE(shd_values_encode(codec, alone, 1, section, sizeof section), SHD_OK); /* bf16(0.3) > 0.3 */
    }
    CHECK_CODE(shd_values_encode(SHD_VALUES_I8, largest, 2, section, sizeof section), SHD_VALUES_DO_NOT_FIT);
    CHECK_CODE(shd_values_encode(SHD_VALUES_BITS, zeros, 2, section, sizeof section), SHD_WRONG_OPERATION);
    CHECK(bits_of(zeros[1]) == 0x80000000u);
}

void test_values(void) {
    test_worked_example();
    test_refusals();
    test_codecs();
    test_rounding();
    test_extremes();
}
