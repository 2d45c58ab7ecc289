/* FROM_BASE and ULP_FROM_BASE, which are decoded beside the base's elements: what is written is read again, files are
 * refused without a base, and sections that lie leave the caller's buffers alone. */
#include "check.h"
#include "support.h"

#include <string.h>

enum { ROWS = 70, COLUMNS = 150, NUMEL = ROWS * COLUMNS };

/* Elements of all exponents, and a grid over them with these classes. */
typedef struct example {
    uint8_t elements[8 * NUMEL];
    uint32_t size;
    int64_t positions[NUMEL];
    uint64_t count;
    shd_base_grid grid;
    uint16_t thresholds[3];
    uint8_t groups[4 * 4 * 4];
    uint8_t rows[ROWS], columns[COLUMNS];
    bytes section;
} example;

static void make_example(example *e, random_state *r, uint32_t size, uint32_t row_bits, uint32_t column_bits,
                         double density) {
    memset(e, 0, sizeof *e);
    e->size = size;
    for (uint32_t i = 0; i < size * NUMEL; i++) {
        e->elements[i] = (uint8_t)random_bits(r);
    }
    e->count = random_positions(r, NUMEL, density, e->positions, NUMEL);
    const uint32_t top = size == 1 ? 128 : 32768;
    for (uint32_t i = 0; i < 3; i++) {
        e->thresholds[i] = (uint16_t)(top / 4 * (i + 1));
    }
    for (uint32_t i = 0; i < sizeof e->groups; i++) {
        e->groups[i] = (uint8_t)(random_bits(r) % 9 + (random_bits(r) % 4 == 0 ? 128 : 0));
    }
    for (uint32_t i = 0; i < ROWS; i++) {
        e->rows[i] = (uint8_t)(random_bits(r) & ((1u << row_bits) - 1));
    }
    for (uint32_t i = 0; i < COLUMNS; i++) {
        e->columns[i] = (uint8_t)(random_bits(r) & ((1u << column_bits) - 1));
    }
    shd_base_grid grid = {NUMEL, COLUMNS, e->thresholds, e->groups, e->rows, e->columns, 4, 16, row_bits, column_bits};
    e->grid = grid;
}

static void encode(example *e) {
    const uint64_t room = shd_from_base_plan_size(&e->grid);
    void *scratch = take(room);
    uint64_t size = 0;
    CHECK_CODE(shd_from_base_plan(&e->grid, e->elements, e->size, e->positions, e->count, scratch, room - 1, &size),
               SHD_BUFFER_TOO_SMALL);
    CHECK_CODE(shd_from_base_plan(&e->grid, e->elements, e->size, e->positions, e->count, scratch, room, &size), SHD_OK);
    e->section.data = take(size);
    e->section.size = size;
    for (uint64_t less = 2; less-- > 0;) {
        CHECK_CODE(shd_from_base_encode(&e->grid, e->elements, e->size, e->positions, e->count, scratch, e->section.data,
                                        size - less),
                   less ? SHD_BUFFER_TOO_SMALL : SHD_OK);
    }
    give(scratch);
}

/* Decodes a section; on success positions increase, and there are as many as were said. */
static int decode(bytes section, const uint8_t *elements, uint32_t element_size, uint64_t nnz, int64_t *positions) {
    shd_from_base reader;
    const uint64_t room = shd_from_base_scratch_size(section.data, section.size);
    void *scratch = take(room);
    int code = shd_from_base_open(&reader, section.data, section.size, NUMEL, nnz, scratch, room);
    uint64_t rank = 0;
    while (code == SHD_OK && reader.next_count != 0) {
        const uint8_t *of_tile = elements + reader.next_position * element_size;
        uint64_t count = 0;
        code = shd_from_base_next(&reader, of_tile, element_size, positions + rank, nnz - rank, &count);
        rank += count;
        CHECK(rank <= nnz);
    }
    CHECK(code != SHD_OK || rank == nnz);
    for (uint64_t i = 0; i < rank; i++) {
        CHECK(positions[i] > (i == 0 ? -1 : positions[i - 1]) && positions[i] < NUMEL);
    }
    give(scratch);
    return code;
}

static void check_changed(const example *e, random_state *r, int64_t *found) {
    bytes copy = {take(e->section.size), e->section.size};
    for (int trial = 0; trial < 30; trial++) {
        memcpy(copy.data, e->section.data, copy.size);
        for (int i = 0; i < 3; i++) {
            copy.data[random_bits(r) % (trial % 2 ? copy.size : 96)] ^= (uint8_t)(1u << (random_bits(r) % 8));
        }
        const int code = decode(copy, e->elements, e->size, e->count, found);
        CHECK(code == SHD_OK || code == SHD_BAD_INDEX || code == SHD_BAD_SIZE || code == SHD_WRONG_BASE ||
              code == SHD_PADDING_NOT_ZERO);
    }
    give(copy.data);
}

static void test_round_trips(void) {
    static const double densities[] = {0.002, 0.05, 0.5, 0.97};
    static example e;
    static int64_t found[NUMEL];
    random_state r = {41};
    for (uint32_t trial = 0; trial < 4 * 9 * 4; trial++) {
        make_example(&e, &r, 1u << (trial % 4), trial / 4 % 3, trial / 12 % 3, densities[trial / 36]);
        if (e.count == 0) {
            continue;
        }
        encode(&e);
        CHECK_CODE(decode(e.section, e.elements, e.size, e.count, found), SHD_OK);
        CHECK(memcmp(found, e.positions, e.count * sizeof *found) == 0);
        CHECK_CODE(decode(e.section, e.elements, e.size, e.count - 1, found), SHD_WRONG_BASE);
        check_changed(&e, &r, found);
        give(e.section.data);
    }
}

static void test_misuse(void) {
    static example e;
    static int64_t found[NUMEL];
    random_state r = {5};
    make_example(&e, &r, 2, 1, 1, 0.1);
    shd_base_grid grid = e.grid;
    grid.columns = 151;
    CHECK(shd_from_base_plan_size(&grid) == 0);
    grid = e.grid;
    grid.classes = 17;
    CHECK(shd_from_base_plan_size(&grid) == 0);
    encode(&e);
    shd_from_base reader;
    uint64_t count, room = shd_from_base_scratch_size(e.section.data, e.section.size);
    void *scratch = take(room);
    CHECK_CODE(shd_from_base_open(&reader, e.section.data, 39, NUMEL, e.count, scratch, room), SHD_BAD_SIZE);
    CHECK_CODE(shd_from_base_open(&reader, e.section.data, e.section.size, NUMEL, e.count, scratch, room - 1),
               SHD_BUFFER_TOO_SMALL);
    CHECK_CODE(shd_from_base_open(&reader, e.section.data, e.section.size, NUMEL, e.count, scratch, room), SHD_OK);
    CHECK_CODE(shd_from_base_next(&reader, e.elements, 2, found, 1, &count), SHD_BUFFER_TOO_SMALL);
    CHECK_CODE(shd_from_base_next(&reader, e.elements, 3, found, NUMEL, &count), SHD_INVALID_ARGUMENT);
    CHECK(reader.next_position == 0 && reader.next_count == 16 * COLUMNS);
    give(scratch);
    give(e.section.data);
}

static void test_counts(void) {
    static example e;
    static uint64_t keys[32768], rows[ROWS][4], columns[COLUMNS][4], joint[2][2][4];
    random_state r = {6};
    make_example(&e, &r, 4, 1, 1, 0.1);
    CHECK_CODE(shd_key_counts(e.elements, NUMEL, 4, keys), SHD_OK);
    CHECK_CODE(shd_line_counts(&e.grid, e.elements, 4, rows[0], columns[0]), SHD_OK);
    CHECK_CODE(shd_joint_counts(&e.grid, e.elements, 4, joint[0][0]), SHD_OK);
    for (uint32_t i = 0; i < NUMEL; i++) {
        const uint32_t key = (e.elements[4 * i + 2] | (uint32_t)e.elements[4 * i + 3] << 8) & 0x7FFF;
        const uint32_t row = i / COLUMNS, column = i % COLUMNS, class = key / 8192;
        keys[key]--;
        rows[row][class]--;
        columns[column][class]--;
        joint[e.rows[row]][e.columns[column]][class]--;
    }
    uint64_t left = 0;
    for (uint32_t i = 0; i < 32768; i++) left |= keys[i];
    for (uint32_t i = 0; i < ROWS * 4; i++) left |= rows[i / 4][i % 4];
    for (uint32_t i = 0; i < COLUMNS * 4; i++) left |= columns[i / 4][i % 4];
    for (uint32_t i = 0; i < 16; i++) left |= joint[i / 8][i / 4 % 2][i % 4];
    CHECK(left == 0);
}

/* ---- ULP_FROM_BASE ---- */

/* Five shifts of two classes, the second of which lists two: -1 1 1 -3 2. k is 0 and 1, j is 0. The gaps are 1 and 0:
 * unary 1 1, low 1 0; the magnitudes less 2 are 1 and 0, plus 1: widths 1 and 0, unary 01 1, field 0. */
static const uint8_t ulp_example[60] = {
    2, 2, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0x00, 0x40, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0,
    0, 0, 0, 0, 0x09, 0, 0, 0, 0x67, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
};
static const uint16_t ulp_base[5] = {0x1234, 0x4001, 0xBFFF, 0xC100, 0x7F00};

static void check_ulp(uint64_t size, size_t offset, uint8_t value, int expected) {
    static const int16_t shifts[5] = {-1, 1, 1, -3, 2};
    uint8_t copy[60];
    int16_t found[5];
    memcpy(copy, ulp_example, sizeof copy);
    copy[offset] = value;
    CHECK_CODE(shd_ulp_from_base_decode(copy, size, ulp_base, 2, 5, found), expected);
    CHECK(expected != SHD_OK || memcmp(found, shifts, sizeof shifts) == 0);
}

static void test_ulp(void) {
    check_ulp(52, 0, 2, SHD_OK);
    check_ulp(52, 0, 17, SHD_BAD_VALUE);
    check_ulp(52, 1, 15, SHD_BAD_VALUE);
    check_ulp(52, 2, 1, SHD_BAD_VALUE);
    check_ulp(48, 0, 2, SHD_BAD_SIZE);
    check_ulp(56, 0, 2, SHD_BAD_SIZE);
    check_ulp(52, 22, 14, SHD_BAD_VALUE);        /* k */
    check_ulp(52, 23, 63, SHD_BAD_VALUE);        /* j */
    check_ulp(52, 28, 3, SHD_BAD_VALUE);         /* one more of three */
    check_ulp(52, 24, 3, SHD_WRONG_BASE);        /* three of two */
    check_ulp(52, 32, 1, SHD_BAD_DIRECTORY);
    check_ulp(52, 40, 0x3F, SHD_BAD_VALUE);      /* fewer zeros than there are fields */
    check_ulp(52, 40, 0x6F, SHD_WRONG_BASE);     /* a gap more */
    check_ulp(52, 18, 1, SHD_PADDING_NOT_ZERO);
    check_ulp(52, 36, 0x29, SHD_PADDING_NOT_ZERO);
    check_ulp(52, 51, 1, SHD_PADDING_NOT_ZERO);
}

static void test_changed_ulp(void) {
    random_state r = {9};
    for (int trial = 0; trial < 3000; trial++) {
        uint8_t copy[52];
        uint64_t shifts[5], base[5];
        memcpy(copy, ulp_example, sizeof copy);
        for (int i = 0; i < 3; i++) {
            copy[random_bits(&r) % sizeof copy] ^= (uint8_t)(1u << (random_bits(&r) % 8));
        }
        for (int i = 0; i < 5; i++) {
            base[i] = random_bits(&r);
        }
        const int code = shd_ulp_from_base_decode(copy, sizeof copy, base, 1u << (trial % 4), 5, shifts);
        CHECK(code < SHD_INVALID_ARGUMENT);
    }
}

/* ---- Files ---- */

static int load(uint8_t dtype, uint8_t op, uint8_t index_codec, uint8_t value_codec, bytes index, bytes values) {
    tensor_spec spec = {.name = "w", .rank = 1, .dims = {5}, .dtype = dtype, .op = op, .index_codec = index_codec,
                        .value_codec = value_codec, .nnz = 5, .index = index.data, .index_size = index.size,
                        .values = values.data, .values_size = values.size};
    bytes f = build_file(&spec, 1, 0, NULL, 0);
    shd_file file;
    shd_delta delta;
    int code = shd_open(&file, f.data, f.size, NULL);
    if (code == SHD_OK) {
        CHECK_CODE(shd_verify(&file, NULL, 0, NULL), SHD_BASE_NEEDED);
        code = shd_load(&file, 0, SHD_CHECK_SIZES, NULL, 0, &delta, NULL);
        CHECK(delta.block_count == 0);
    }
    give(f.data);
    return code;
}

static void test_files_need_a_base(void) {
    static uint8_t zeros[64];
    const bytes none = {NULL, 0}, least = {zeros, 40}, too_small = {zeros, 36}, f32 = {zeros, 28};
    bytes shifts = {(uint8_t *)(uintptr_t)ulp_example, 52};
    CHECK_CODE(load(SHD_BF16, SHD_OP_ADD, SHD_INDEX_FROM_BASE, SHD_VALUES_F32, least, f32), SHD_BASE_NEEDED);
    CHECK_CODE(load(SHD_BF16, SHD_OP_ADD, SHD_INDEX_FROM_BASE, SHD_VALUES_F32, too_small, f32), SHD_BAD_SIZE);
    CHECK_CODE(load(SHD_UNSPECIFIED, SHD_OP_ADD, SHD_INDEX_FROM_BASE, SHD_VALUES_F32, least, f32), SHD_BAD_COMBINATION);
    CHECK_CODE(load(SHD_F16, SHD_OP_ULP, SHD_INDEX_ALL, SHD_VALUES_ULP_FROM_BASE, none, shifts), SHD_BASE_NEEDED);
    CHECK_CODE(load(SHD_I16, SHD_OP_ULP, SHD_INDEX_ALL, SHD_VALUES_ULP_FROM_BASE, none, shifts), SHD_BAD_COMBINATION);
    CHECK_CODE(load(SHD_F16, SHD_OP_ADD, SHD_INDEX_ALL, SHD_VALUES_ULP_FROM_BASE, none, shifts), SHD_BAD_COMBINATION);
    shifts.size = 32;
    CHECK_CODE(load(SHD_F16, SHD_OP_ULP, SHD_INDEX_ALL, SHD_VALUES_ULP_FROM_BASE, none, shifts), SHD_BAD_SIZE);
}

void test_from_base(void) {
    test_round_trips();
    test_misuse();
    test_counts();
    test_ulp();
    test_changed_ulp();
    test_files_need_a_base();
}
