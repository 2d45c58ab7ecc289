/* Several deltas at once, against a loop over all of their nonzeros. */
#include "arithmetic.h"
#include "check.h"

#include <math.h>
#include <string.h>

enum { MOST = 70, ROWS = 97, COLUMNS = 1031, NUMEL = ROWS * COLUMNS };

/* Deltas of one tensor, and what is needed to apply them. */
typedef struct set {
    uint32_t count, size;
    int dtype;
    sample samples[MOST];
    shd_file files[MOST];
    shd_delta deltas[MOST];
    const shd_delta *pointers[MOST];
    double strengths[MOST];
    void *saved[MOST];
    uint8_t *weights, *before, *expected;
    void *scratch;
    uint64_t scratch_size;
} set;

static set s; /* too large for a stack */

static void make(uint32_t count, int dtype, const double *densities, const uint64_t *seeds, int codec, int flags) {
    random_state r = {count};
    const codec_list codecs = float_codecs();
    memset(&s, 0, sizeof s);
    s.count = count;
    s.dtype = dtype;
    s.size = shd_dtype_size(dtype);
    for (uint32_t i = 0; i < count; i++) {
        int c = codec != 0 ? codec : codecs.ids[i % (uint32_t)codecs.count];
        s.samples[i] = build_sample(seeds[i], ROWS, COLUMNS, densities[i], c, dtype);
        sample *t = &s.samples[i];
        CHECK_CODE(shd_open(&s.files[i], t->file.data, t->file.size, NULL), SHD_OK);
        CHECK_CODE(shd_load(&s.files[i], 0, SHD_CHECK_ALL | flags, NULL, 0, &s.deltas[i], NULL), SHD_OK);
        CHECK_CODE(shd_values(&s.deltas[i], 0, t->nnz, t->values, NULL), SHD_OK);
        s.pointers[i] = &s.deltas[i];
        s.strengths[i] = random_unit(&r) * 4 - 2;
        s.saved[i] = take(t->nnz * s.size);
    }
    s.weights = take((uint64_t)NUMEL * s.size);
    s.before = take((uint64_t)NUMEL * s.size);
    s.expected = take((uint64_t)NUMEL * s.size);
    fill_with_anything(&r, s.before, NUMEL, s.size, dtype);
    memcpy(s.weights, s.before, (uint64_t)NUMEL * s.size);
    s.scratch_size = shd_sum_scratch_size(count);
    s.scratch = take(s.scratch_size + 1);
}

static void drop(void) {
    for (uint32_t i = 0; i < s.count; i++) {
        give_sample(&s.samples[i]);
        give(s.saved[i]);
    }
    give(s.weights);
    give(s.before);
    give(s.expected);
    give(s.scratch);
}

/* Section 6.2, with the first contribution told from the others by a flag. */
static void compute_expected(void) {
    static float sum[NUMEL];
    static uint8_t is_first[NUMEL];
    memset(is_first, 1, sizeof is_first);
    for (uint32_t i = 0; i < s.count; i++) {
        for (uint64_t j = 0; j < s.samples[i].nnz; j++) {
            int64_t p = s.samples[i].positions[j];
            volatile float c = (float)s.strengths[i] * s.samples[i].values[j];
            volatile float both = sum[p] + c;
            sum[p] = is_first[p] ? c : both;
            is_first[p] = 0;
        }
    }
    memcpy(s.expected, s.before, (uint64_t)NUMEL * s.size);
    for (uint64_t p = 0; p < NUMEL; p++) {
        if (!is_first[p]) {
            uint32_t bits = add_sum_to(s.dtype, element(s.before, s.size, p), sum[p]);
            memcpy(s.expected + p * s.size, &bits, s.size);
        }
    }
}

/* The elements from `first` to `end` of the whole. */
static int apply_part(uint64_t first, uint64_t end, int from_saved) {
    shd_weights part = {s.weights + first * s.size, first, end - first, s.dtype, 0};
    return shd_apply_sum(s.pointers, s.strengths, s.saved, s.count, &part, from_saved, s.scratch, s.scratch_size, NULL);
}

static void check_all(uint64_t parts) {
    for (int again = 0; again < 3; again++) { /* then other strengths, then what breaks sums */
        for (uint64_t i = parts; i-- > 0;) {
            CHECK_CODE(apply_part(NUMEL * i / parts, NUMEL * (i + 1) / parts, again), SHD_OK);
        }
        compute_expected();
        CHECK(memcmp(s.weights, s.expected, (uint64_t)NUMEL * s.size) == 0);
        for (uint32_t i = 0; i < s.count; i++) {
            int same = 1;
            for (uint64_t j = 0; j < s.samples[i].nnz; j++) {
                uint64_t p = (uint64_t)s.samples[i].positions[j];
                same &= element(s.saved[i], s.size, j) == element(s.before, s.size, p);
            }
            CHECK(same);
            s.strengths[i] = again == 0 ? -0.5 * s.strengths[i] : i % 2 ? -3e38 : 3e38;
        }
    }
    shd_weights whole = {s.weights, 0, NUMEL, s.dtype, 0};
    for (uint32_t i = s.count; i-- > 0;) {
        CHECK_CODE(shd_revert(&s.deltas[i], &whole, 0, s.deltas[i].block_count, s.saved[i], NULL), SHD_OK);
    }
    CHECK(memcmp(s.weights, s.before, (uint64_t)NUMEL * s.size) == 0);
}

static void test_sums(void) {
    static const int dtypes[] = {SHD_F32, SHD_F16, SHD_BF16};
    static const double mixed[] = {0.01, 0.0001, 0.5, 0.02, 1.0, 0.05};
    static const uint64_t different[] = {1, 2, 3, 4, 5, 6}, same[] = {7, 7, 7};
    for (int i = 0; i < 3; i++) {
        for (uint32_t count = 1; count <= 6; count++) {
            make(count, dtypes[i], mixed, different, 0, 0);
            check_all(1 + count % 3);
            drop();
            if (!is_brief || (count + (uint32_t)i) % 3 == 0) {
                make(count, dtypes[i], mixed, different, 0, SHD_SCALAR);
                check_all(count);
                drop();
            }
        }
        const codec_list codecs = float_codecs();
        for (int j = 0; j < codecs.count; j++) { /* all positions are in all of them */
            static const double density[] = {0.02, 0.02, 0.02};
            if (!is_brief || j % 3 == i) {
                make(3, dtypes[i], density, same, codecs.ids[j], 0);
                check_all(2);
                drop();
            }
        }
    }
    static double densities[MOST];
    static uint64_t seeds[MOST];
    for (uint32_t i = 0; i < MOST; i++) {
        densities[i] = 0.03 / (1 + i % 7);
        seeds[i] = 100 + i;
    }
    make(MOST, SHD_BF16, densities, seeds, 0, 0);
    check_all(3);
    check_all(NUMEL / 500); /* many parts in one block */
    drop();
    make(0, SHD_BF16, densities, seeds, 0, 0);
    CHECK_CODE(apply_part(0, NUMEL, 0), SHD_OK);
    CHECK(memcmp(s.weights, s.before, NUMEL * 2) == 0);
    drop();
}

/* -0 + -0 is -0, if the first is not added to +0. */
static void test_first_contribution(void) {
    static const double density[] = {1.0};
    static const uint64_t seed[] = {9};
    make(1, SHD_F32, density, seed, SHD_VALUES_F32, 0);
    s.strengths[0] = 0;
    for (uint64_t i = 0; i < NUMEL; i++) {
        const uint32_t minus_zero = UINT32_C(1) << 31;
        memcpy(s.before + 4 * i, &minus_zero, 4);
        memcpy(s.weights + 4 * i, &minus_zero, 4);
    }
    CHECK_CODE(apply_part(0, NUMEL, 0), SHD_OK);
    int same = 1;
    for (uint64_t i = 0; i < NUMEL; i++) {
        uint32_t expected = signbit(s.samples[0].values[i]) ? UINT32_C(1) << 31 : 0;
        same &= element(s.weights, 4, i) == expected;
    }
    CHECK(same);
    drop();
}

/* A tensor of 2^40 elements, of which only a part is in memory. */
static void test_far_positions(void) {
    const uint64_t numel = UINT64_C(1) << 40, first = numel - 1000;
    int64_t positions[] = {5, (int64_t)(numel / 2), (int64_t)first, (int64_t)numel - 1};
    float values[] = {1, 2, 3, 4};
    bytes index = encode_positions(positions, 4, numel), stored = encode_values(SHD_VALUES_F32, values, 4);
    tensor_spec t = {.name = "w", .rank = 1, .dims = {numel}, .dtype = SHD_F32, .op = SHD_OP_ADD,
                     .index_codec = SHD_INDEX_RICE, .value_codec = SHD_VALUES_F32, .nnz = 4,
                     .index = index.data, .index_size = index.size, .values = stored.data, .values_size = stored.size};
    bytes f = build_file(&t, 1, 0, NULL, 0);
    shd_file file;
    shd_delta delta;
    CHECK_CODE(shd_open(&file, f.data, f.size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, NULL, 0, &delta, NULL), SHD_OK);
    float *part = take(1000 * sizeof *part), saved[2][4] = {{7, 7, 7, 7}, {7, 7, 7, 7}};
    const shd_delta *deltas[] = {&delta, &delta};
    const double strengths[] = {1, 10};
    void *const rooms[] = {saved[0], saved[1]};
    shd_weights end = {part, first, 1000, SHD_F32, 0};
    void *scratch = take(shd_sum_scratch_size(2));
    CHECK_CODE(shd_apply_sum(deltas, strengths, rooms, 2, &end, 0, scratch, shd_sum_scratch_size(2), NULL), SHD_OK);
    CHECK(part[0] == 33 && part[999] == 44);
    for (int i = 0; i < 2; i++) { /* ranks of what lies elsewhere are not touched */
        CHECK(saved[i][0] == 7 && saved[i][1] == 7 && saved[i][2] == 0 && saved[i][3] == 0);
    }
    give(part);
    give(scratch);
    give(index.data);
    give(stored.data);
    give(f.data);
}

/* An error on the way, in one delta's values or positions: what all of them have written is taken back. */
static void test_error_on_the_way(void) {
    static const double densities[] = {0.05, 0.1, 0.02};
    static const uint64_t seeds[] = {31, 32, 33};
    for (int in_values = 0; in_values < 2; in_values++) {
        for (uint32_t bad = 0; bad < 3; bad++) {
            make(3, SHD_BF16, densities, seeds, SHD_VALUES_I8, 0);
            const shd_tensor *t = &s.deltas[bad].tensor;
            uint8_t *file = s.samples[bad].file.data;
            if (in_values) {
                file[t->values.offset + t->nnz / 256 * 2 + 1] = 0xFF; /* a negative scale half way */
            } else {
                file[t->index.offset + 16 + s.deltas[bad].block_count / 2 * 8] ^= 1; /* an entry of the directory */
            }
            CHECK_CODE(apply_part(0, NUMEL, 0), in_values ? SHD_BAD_VALUE : SHD_BAD_DIRECTORY);
            CHECK(memcmp(s.weights, s.before, NUMEL * 2) == 0);
            drop();
        }
    }
}

static void check_refused(const shd_delta *const *deltas, const double *strengths, void *const *saved,
                          const shd_weights *weights, uint64_t scratch_size, int code) {
    shd_status status;
    CHECK_CODE(shd_apply_sum(deltas, strengths, saved, 2, weights, 0, s.scratch, scratch_size, &status), code);
    CHECK(status.code == code && memcmp(s.weights, s.before, NUMEL * 2) == 0);
}

static void test_misuse(void) {
    static const double densities[] = {0.05, 0.1};
    static const uint64_t seeds[] = {41, 42};
    make(2, SHD_BF16, densities, seeds, SHD_VALUES_I8, 0);
    shd_weights good = {s.weights, 0, NUMEL, SHD_BF16, 0}, w = good;
    const double nan[] = {1, NAN};
    void *const missing[] = {s.saved[0], NULL}, *const odd[] = {s.saved[0], (uint8_t *)s.saved[1] + 1};
    const shd_delta *const none[] = {s.pointers[0], NULL};
    check_refused(NULL, s.strengths, s.saved, &w, s.scratch_size, SHD_INVALID_ARGUMENT);
    check_refused(none, s.strengths, s.saved, &w, s.scratch_size, SHD_INVALID_ARGUMENT);
    check_refused(s.pointers, NULL, s.saved, &w, s.scratch_size, SHD_INVALID_ARGUMENT);
    check_refused(s.pointers, nan, s.saved, &w, s.scratch_size, SHD_BAD_STRENGTH);
    check_refused(s.pointers, s.strengths, NULL, &w, s.scratch_size, SHD_INVALID_ARGUMENT);
    check_refused(s.pointers, s.strengths, missing, &w, s.scratch_size, SHD_INVALID_ARGUMENT);
    check_refused(s.pointers, s.strengths, odd, &w, s.scratch_size, SHD_MISALIGNED);
    check_refused(s.pointers, s.strengths, s.saved, NULL, s.scratch_size, SHD_INVALID_ARGUMENT);
    check_refused(s.pointers, s.strengths, s.saved, &w, s.scratch_size - 1, SHD_BUFFER_TOO_SMALL);
    w.count++;
    check_refused(s.pointers, s.strengths, s.saved, &w, s.scratch_size, SHD_WRONG_SHAPE);
    w = good;
    w.dtype = SHD_F16;
    check_refused(s.pointers, s.strengths, s.saved, &w, s.scratch_size, SHD_WRONG_DTYPE);
    w = good;
    w.data = s.weights + 1;
    check_refused(s.pointers, s.strengths, s.saved, &w, s.scratch_size, SHD_MISALIGNED);
    s.deltas[1].tensor.op = SHD_OP_SET;
    check_refused(s.pointers, s.strengths, s.saved, &good, s.scratch_size, SHD_WRONG_OPERATION);
    s.deltas[1].tensor.op = SHD_OP_ADD;
    CHECK_CODE(shd_apply_sum(s.pointers, s.strengths, s.saved, 2, &good, 0, (uint8_t *)s.scratch + 1, s.scratch_size,
                             NULL),
               SHD_OK); /* scratch may lie anywhere */
    drop();
}

void test_sum(void) {
    test_sums();
    test_first_contribution();
    test_far_positions();
    test_error_on_the_way();
    test_misuse();
}
