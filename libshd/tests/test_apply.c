/* Applying and taking back, against a loop over positions and values. */
#include "arithmetic.h"
#include "check.h"
#include "support.h"

#include <math.h>
#include <string.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

/* ---- ADD ---- */

typedef struct case_ {
    const shd_delta *delta;
    const int64_t *positions;
    const float *values;
    uint64_t nnz, numel;
    uint32_t size;
} case_;

/* Applies in `parts` block ranges, compares with the loop, and takes it back. */
static void check_add(const case_ *c, shd_weights *weights, double strength, uint64_t parts) {
    uint8_t *before = take(c->numel * c->size), *expected = take(c->numel * c->size);
    uint8_t *saved = take(c->nnz * c->size);
    memcpy(before, weights->data, c->numel * c->size);
    memcpy(expected, weights->data, c->numel * c->size);
    for (uint64_t i = 0; i < c->nnz; i++) {
        uint64_t p = (uint64_t)c->positions[i];
        uint32_t bits = add_to(weights->dtype, element(before, c->size, p), c->values[i], (float)strength);
        memcpy(expected + p * c->size, &bits, c->size);
    }
    uint64_t blocks = c->delta->block_count;
    for (uint64_t i = 0; i < parts; i++) {
        CHECK_CODE(shd_apply(c->delta, weights, strength, blocks * i / parts, blocks * (i + 1) / parts, saved, NULL),
                   SHD_OK);
    }
    CHECK(memcmp(weights->data, expected, c->numel * c->size) == 0);
    int same = 1;
    for (uint64_t i = 0; i < c->nnz; i++) {
        same &= element(saved, c->size, i) == element(before, c->size, (uint64_t)c->positions[i]);
    }
    CHECK(same);
    CHECK_CODE(shd_revert(c->delta, weights, 0, blocks, saved, NULL), SHD_OK);
    CHECK(memcmp(weights->data, before, c->numel * c->size) == 0);
    give(before);
    give(expected);
    give(saved);
}

static void test_add_of(int dtype, int codec, double density, int flags) {
    sample s = build_sample(7, 97, 1031, density, codec, dtype);
    shd_file file;
    shd_delta delta;
    uint32_t size = shd_dtype_size(dtype);
    random_state r = {13};
    CHECK_CODE(shd_open(&file, s.file.data, s.file.size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL | flags, NULL, 0, &delta, NULL), SHD_OK);
    CHECK_CODE(shd_values(&delta, 0, s.nnz, s.values, NULL), SHD_OK);
    shd_weights weights = {take(s.numel * size), 0, s.numel, dtype, 0};
    fill_with_anything(&r, weights.data, s.numel, size, dtype);
    case_ c = {&delta, s.positions, s.values, s.nnz, s.numel, size};
    check_add(&c, &weights, 1.0, 1);
    check_add(&c, &weights, 0.7, 3);
    check_add(&c, &weights, -1e30, 2);
    check_add(&c, &weights, 3e38, 1);
    check_add(&c, &weights, 1e-42, 1);
    give(weights.data);
    give_sample(&s);
}

static void test_add(void) {
    static const int dtypes[] = {SHD_F32, SHD_F16, SHD_BF16};
    const codec_list codecs = float_codecs();
    for (int i = 0; i < 3; i++) {
        for (int j = 0; j < codecs.count; j++) {
            test_add_of(dtypes[i], codecs.ids[j], 0.02, 0);
            test_add_of(dtypes[i], codecs.ids[j], 0.02, SHD_SCALAR);
        }
        test_add_of(dtypes[i], SHD_VALUES_I8, 0.5, 0);
        test_add_of(dtypes[i], SHD_VALUES_I8, 0.0001, 0);
    }
}

/* ---- A shard: some rows of the tensor in a buffer of their own ---- */

static void test_shard(void) {
    sample s = build_sample(21, 64, 512, 0.05, SHD_VALUES_I8, SHD_BF16);
    shd_file file;
    shd_delta delta;
    CHECK_CODE(shd_open(&file, s.file.data, s.file.size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, NULL, 0, &delta, NULL), SHD_OK);
    uint16_t *whole = take(s.numel * 2), *parts = take(s.numel * 2), *saved = take(s.nnz * 2);
    shd_weights all = {whole, 0, s.numel, SHD_BF16, 0};
    CHECK_CODE(shd_apply(&delta, &all, 1.0, 0, delta.block_count, NULL, NULL), SHD_OK);
    uint64_t whole_print = 0, print = 0, sum = 0;
    CHECK_CODE(shd_fingerprint(&delta, &all, 0, delta.block_count, &whole_print, NULL), SHD_OK);
    for (uint64_t row = 0; row < 64; row += 16) {
        shd_weights shard = {take(16 * 512 * 2), row * 512, 16 * 512, SHD_BF16, 0};
        uint64_t first, last;
        CHECK_CODE(shd_find_blocks(&delta, row * 512, (row + 16) * 512, &first, &last), SHD_OK);
        CHECK_CODE(shd_apply(&delta, &shard, 1.0, first, last, saved, NULL), SHD_OK);
        CHECK_CODE(shd_fingerprint(&delta, &shard, first, last, &print, NULL), SHD_OK);
        sum += print;
        memcpy(parts + row * 512, shard.data, 16 * 512 * 2);
        give(shard.data);
    }
    CHECK(memcmp(whole, parts, s.numel * 2) == 0);
    CHECK(sum == whole_print);
    give(whole);
    give(parts);
    give(saved);
    give_sample(&s);
}

/* ---- SET, of every size of element ---- */

static void test_set(void) {
    static const int dtypes[] = {SHD_U8, SHD_F16, SHD_F32, SHD_F64, SHD_C64, SHD_F8_E4M3};
    enum { NUMEL = 5000, NNZ = 700 };
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        uint32_t size = shd_dtype_size(dtypes[i]);
        int64_t positions[NNZ];
        bytes values = {NULL, shd_values_size(SHD_VALUES_BITS, dtypes[i], NNZ)};
        values.data = take(values.size);
        random_state r = {i};
        for (int64_t j = 0; j < NNZ; j++) {
            positions[j] = 7 * j + (int64_t)(random_bits(&r) % 7);
        }
        for (uint64_t j = 0; j < (uint64_t)NNZ * size; j++) {
            values.data[j] = (uint8_t)random_bits(&r);
        }
        bytes index = encode_positions(positions, NNZ, NUMEL);
        tensor_spec t = {.name = "w", .rank = 1, .dims = {NUMEL}, .dtype = (uint8_t)dtypes[i], .op = SHD_OP_SET,
                         .index_codec = SHD_INDEX_RICE, .value_codec = SHD_VALUES_BITS, .nnz = NNZ,
                         .index = index.data, .index_size = index.size,
                         .values = values.data, .values_size = values.size};
        bytes f = build_file(&t, 1, 0, NULL, 0);
        shd_file file;
        shd_delta delta;
        CHECK_CODE(shd_open(&file, f.data, f.size, NULL), SHD_OK);
        CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, NULL, 0, &delta, NULL), SHD_OK);
        uint8_t *data = take((uint64_t)NUMEL * size), *saved = take((uint64_t)NNZ * size);
        uint8_t *expected = take((uint64_t)NUMEL * size), *stored = take((uint64_t)NNZ * size);
        for (int j = 0; j < NNZ; j++) {
            memcpy(expected + (uint64_t)positions[j] * size, values.data + (uint64_t)j * size, size);
        }
        shd_weights weights = {data, 0, NUMEL, dtypes[i], 0};
        CHECK_CODE(shd_apply(&delta, &weights, 0.5, 0, delta.block_count, saved, NULL), SHD_BAD_STRENGTH);
        CHECK_CODE(shd_apply(&delta, &weights, 1.0, 0, delta.block_count, saved, NULL), SHD_OK);
        CHECK(memcmp(data, expected, (uint64_t)NUMEL * size) == 0);
        CHECK_CODE(shd_elements(&delta, 0, NNZ, stored, NULL), SHD_OK);
        CHECK(memcmp(stored, values.data, (uint64_t)NNZ * size) == 0);
        CHECK_CODE(shd_revert(&delta, &weights, 0, delta.block_count, saved, NULL), SHD_OK);
        memset(expected, 0, (uint64_t)NUMEL * size);
        CHECK(memcmp(data, expected, (uint64_t)NUMEL * size) == 0);
        give(data);
        give(saved);
        give(expected);
        give(stored);
        give(index.data);
        give(values.data);
        give(f.data);
    }
}

/* ---- Misuse ---- */

static void test_misuse(void) {
    sample s = build_sample(3, 32, 64, 0.05, SHD_VALUES_I8, SHD_BF16);
    shd_file file;
    shd_delta delta;
    shd_status status;
    static uint16_t data[32 * 64 + 1], saved[2048];
    CHECK_CODE(shd_open(&file, s.file.data, s.file.size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, NULL, 0, &delta, NULL), SHD_OK);
    shd_weights good = {data, 0, s.numel, SHD_BF16, 0}, w = good;
    uint64_t n = delta.block_count;
    CHECK_CODE(shd_apply(NULL, &w, 1, 0, 0, saved, &status), SHD_INVALID_ARGUMENT);
    CHECK_CODE(shd_apply(&delta, NULL, 1, 0, n, saved, &status), SHD_INVALID_ARGUMENT);
    CHECK_CODE(shd_apply(&delta, &w, 1, 0, n + 1, saved, &status), SHD_INVALID_ARGUMENT);
    CHECK_CODE(shd_apply(&delta, &w, NAN, 0, n, saved, &status), SHD_BAD_STRENGTH);
    CHECK_CODE(shd_apply(&delta, &w, 1e39, 0, n, saved, &status), SHD_BAD_STRENGTH);
    CHECK_CODE(shd_apply(&delta, &w, 1, 0, n, (uint8_t *)saved + 1, &status), SHD_MISALIGNED);
    CHECK_CODE(shd_revert(&delta, &w, 0, n, NULL, &status), SHD_INVALID_ARGUMENT);
    w.data = (uint8_t *)data + 1;
    CHECK_CODE(shd_apply(&delta, &w, 1, 0, n, saved, &status), SHD_MISALIGNED);
    w = good;
    w.count++;
    CHECK_CODE(shd_apply(&delta, &w, 1, 0, n, saved, &status), SHD_WRONG_SHAPE);
    w = good;
    w.dtype = SHD_F16;
    CHECK_CODE(shd_apply(&delta, &w, 1, 0, n, saved, &status), SHD_WRONG_DTYPE);
    CHECK(status.code == SHD_WRONG_DTYPE && status.tensor == 0);
    w.any_dtype = 1;
    CHECK_CODE(shd_apply(&delta, &w, 1, 0, n, saved, &status), SHD_OK);
    w.dtype = SHD_F64;
    CHECK_CODE(shd_apply(&delta, &w, 1, 0, n, saved, &status), SHD_WRONG_DTYPE);
    give_sample(&s);
}

/* An error on the way: what was written is taken back. */
static void test_error_on_the_way(void) {
    sample s = build_sample(4, 300, 1000, 0.05, SHD_VALUES_I8, SHD_BF16);
    shd_file file;
    shd_delta delta;
    CHECK_CODE(shd_open(&file, s.file.data, s.file.size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_SIZES, NULL, 0, &delta, NULL), SHD_OK);
    uint16_t *data = take(s.numel * 2), *before = take(s.numel * 2), *saved = take(s.nnz * 2);
    memset(data, 0x3C, s.numel * 2);
    memcpy(before, data, s.numel * 2);
    shd_weights weights = {data, 0, s.numel, SHD_BF16, 0};
    s.file.data[delta.tensor.values.offset + s.nnz / 256 * 2 + 1] = 0xFF; /* a negative scale half way */
    CHECK_CODE(shd_apply(&delta, &weights, 1, 0, delta.block_count, saved, NULL), SHD_BAD_VALUE);
    CHECK(memcmp(data, before, s.numel * 2) == 0);
    give(data);
    give(before);
    give(saved);
    give_sample(&s);
}

/* ---- Fingerprints: FORMAT.md, section 9.3 ---- */

static uint64_t print_of(int64_t position, uint64_t bits) {
    uint64_t fingerprint = 0;
    CHECK_CODE(shd_fingerprint_elements(&position, 0, &bits, 1, 8, &fingerprint), SHD_OK);
    return fingerprint;
}

static void test_fingerprints(void) {
    CHECK(print_of(0, 0) == UINT64_C(0x3BA9A87BD6A0C658));
    CHECK(print_of(1, 0) == UINT64_C(0x1955B4DE1F19FAC2));
    CHECK(print_of(0, 1) == UINT64_C(0xB4964D43F4FA949A));
    CHECK(print_of(3, 0x3F80) == UINT64_C(0x61C5671C670124C7));
    CHECK(print_of(4, 0xBF80) == UINT64_C(0x74334201E726252A));
    CHECK(print_of(9, 0x7FC0) == UINT64_C(0xD474E0191E5A1AAE));
    CHECK(print_of(1099511627781, 0x3F800000) == UINT64_C(0x709F08D5FAD6F905));
    CHECK(print_of(7, UINT64_MAX) == UINT64_C(0x390D6DA22DD63AB1));
    static const int64_t positions[3] = {3, 4, 9};
    static const uint16_t listed[3] = {0x3F80, 0xBF80, 0x7FC0};
    uint64_t fingerprint = 1;
    CHECK_CODE(shd_fingerprint_elements(positions, 0, listed, 3, 2, &fingerprint), SHD_OK);
    CHECK(fingerprint == UINT64_C(0xAA6D89376C81649F));
    CHECK_CODE(shd_fingerprint_elements(NULL, 0, NULL, 0, 2, &fingerprint), SHD_OK);
    CHECK(fingerprint == 0);
    CHECK_CODE(shd_fingerprint_elements(positions, 0, (const uint8_t *)listed + 1, 1, 2, &fingerprint),
               SHD_MISALIGNED);
    CHECK_CODE(shd_fingerprint_elements(positions, 0, listed, 1, 3, &fingerprint), SHD_WRONG_DTYPE);

    sample s = build_sample(5, 300, 1000, 0.02, SHD_VALUES_I8, SHD_BF16);
    shd_file file;
    shd_delta delta;
    CHECK_CODE(shd_open(&file, s.file.data, s.file.size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, NULL, 0, &delta, NULL), SHD_OK);
    uint16_t *data = take(s.numel * 2), *old = take(s.nnz * 2);
    random_state r = {6};
    for (uint64_t i = 0; i < s.numel; i++) {
        data[i] = (uint16_t)random_bits(&r);
    }
    for (uint64_t i = 0; i < s.nnz; i++) {
        old[i] = data[s.positions[i]];
    }
    shd_weights weights = {data, 0, s.numel, SHD_BF16, 0};
    uint64_t first = 0, second = 0, half = delta.block_count / 2;
    CHECK_CODE(shd_fingerprint_elements(s.positions, 0, old, s.nnz, 2, &fingerprint), SHD_OK);
    CHECK_CODE(shd_fingerprint(&delta, &weights, 0, half, &first, NULL), SHD_OK);
    CHECK_CODE(shd_fingerprint(&delta, &weights, half, delta.block_count, &second, NULL), SHD_OK);
    CHECK(first + second == fingerprint);
    give(data);
    give(old);
    give_sample(&s);
}

/* A host that flushes denormals, or rounds otherwise, gets the same bits, and keeps its settings. */
static void test_foreign_float_environment(void) {
#if defined(__SSE__)
    const unsigned flush_denormals = 0x8040, round_up = 0x4000, plain = _mm_getcsr();
    sample s = build_sample(8, 50, 100, 0.2, SHD_VALUES_I8, SHD_F32);
    shd_file file;
    shd_delta delta;
    uint32_t *expected = take(s.numel * 4), *got = take(s.numel * 4);
    random_state r = {19};
    for (uint64_t i = 0; i < s.numel; i++) {
        expected[i] = got[i] = (uint32_t)random_bits(&r) & 0x81FFFFFFu; /* some of them denormals */
    }
    shd_weights usual = {expected, 0, s.numel, SHD_F32, 0}, foreign = {got, 0, s.numel, SHD_F32, 0};
    CHECK_CODE(shd_open(&file, s.file.data, s.file.size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, NULL, 0, &delta, NULL), SHD_OK);
    CHECK_CODE(shd_apply(&delta, &usual, 1e-36, 0, delta.block_count, NULL, NULL), SHD_OK);
    _mm_setcsr(plain | flush_denormals | round_up);
    int code = shd_apply(&delta, &foreign, 1e-36, 0, delta.block_count, NULL, NULL);
    unsigned kept = _mm_getcsr();
    _mm_setcsr(plain);
    CHECK_CODE(code, SHD_OK);
    CHECK((kept & ~0x3Fu) == ((plain | flush_denormals | round_up) & ~0x3Fu)); /* but for the exceptions seen */
    CHECK(memcmp(expected, got, s.numel * 4) == 0);
    give(expected);
    give(got);
    give_sample(&s);
#endif
}

/* ---- ULP ---- */

/* Shifts 1, -1 and 5, by hand: one is listed, after two others; its magnitude is 2 + 3, and 3 + 1 = 2^2 + 0. */
static const uint8_t SHIFTS[] = {0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, /* head */
                                 0, 0, 0, 0, 0, 0, 0, 0,                                                 /* directory */
                                 2, 0, 0, 0, 0x24, 0, 0, 0,                      /* signs, stream: 001 001 00 */
                                 0, 0, 0, 0, 0, 0, 0, 0};

static void test_ulp(void) {
    enum { NNZ = 3 };
    static const int64_t positions[NNZ] = {1, 2, 6};
    /* 1, -0 and a NaN, which moves as all others do */
    static const uint16_t before[8] = {7, 0x3F80, 0x8000, 7, 7, 7, 0x7FFA, 7};
    static const uint16_t after[8] = {7, 0x3F81, 0x8001, 7, 7, 7, 0x7FFF, 7};
    bytes index = encode_positions(positions, NNZ, 8);
    tensor_spec t = {.name = "w", .rank = 1, .dims = {8}, .dtype = SHD_BF16, .op = SHD_OP_ULP,
                     .index_codec = SHD_INDEX_RICE, .value_codec = SHD_VALUES_ULP, .nnz = NNZ,
                     .index = index.data, .index_size = index.size, .values = SHIFTS, .values_size = sizeof SHIFTS};
    bytes f = build_file(&t, 1, 0, NULL, 0);
    shd_file file;
    shd_delta delta;
    CHECK_CODE(shd_open(&file, f.data, f.size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, NULL, 0, &delta, NULL), SHD_OK);
    int16_t shifts[NNZ];
    CHECK_CODE(shd_elements(&delta, 0, NNZ, shifts, NULL), SHD_OK);
    CHECK(shifts[0] == 1 && shifts[1] == -1 && shifts[2] == 5);
    CHECK_CODE(shd_elements(&delta, 1, 1, shifts, NULL), SHD_OK);
    CHECK(shifts[0] == -1);
    float value;
    CHECK_CODE(shd_values(&delta, 0, 1, &value, NULL), SHD_WRONG_OPERATION);
    uint16_t data[8], saved[NNZ];
    memcpy(data, before, sizeof data);
    shd_weights weights = {data, 0, 8, SHD_BF16, 0};
    CHECK_CODE(shd_apply(&delta, &weights, 0.5, 0, delta.block_count, saved, NULL), SHD_BAD_STRENGTH);
    CHECK_CODE(shd_apply(&delta, &weights, 1, 0, delta.block_count, saved, NULL), SHD_OK);
    CHECK(memcmp(data, after, sizeof data) == 0);
    CHECK_CODE(shd_revert(&delta, &weights, 0, delta.block_count, saved, NULL), SHD_OK);
    CHECK(memcmp(data, before, sizeof data) == 0);
    /* Out of the range: all stays as it was, with and without room to save. */
    data[6] = 0x7FFB;
    CHECK_CODE(shd_apply(&delta, &weights, 1, 0, delta.block_count, saved, NULL), SHD_OUT_OF_RANGE);
    CHECK(data[1] == 0x3F80 && data[2] == 0x8000 && data[6] == 0x7FFB);
    CHECK_CODE(shd_apply(&delta, &weights, 1, 0, delta.block_count, NULL, NULL), SHD_OUT_OF_RANGE);
    CHECK(data[1] == 0x3F80 && data[2] == 0x8000 && data[6] == 0x7FFB);
    give(index.data);
    give(f.data);
}

void test_apply(void) {
    test_add();
    test_shard();
    test_set();
    test_ulp();
    test_misuse();
    test_error_on_the_way();
    test_fingerprints();
    test_foreign_float_environment();
}
