/* Index codecs: the worked example, and every codec against positions known beforehand. */
#include "check.h"
#include "support.h"

#include <stdlib.h>
#include <string.h>

/* A tensor with this INDEX section and SIGN values of zero. */
static bytes file_of_index(int codec, bytes index, uint8_t rank, uint64_t rows, uint64_t columns, uint64_t nnz) {
    bytes values = {NULL, shd_values_size(SHD_VALUES_SIGN, 0, nnz)};
    values.data = take(values.size);
    tensor_spec t = {.name = "w", .rank = rank, .dtype = SHD_F32, .index_codec = (uint8_t)codec,
                     .value_codec = SHD_VALUES_SIGN, .nnz = nnz, .index = index.data, .index_size = index.size,
                     .values = values.data, .values_size = values.size};
    const uint64_t dims[2] = {rank == 2 ? rows : rows * columns, columns};
    for (uint8_t i = 0; i < rank && i < 2; i++) {
        t.dims[i] = dims[i];
    }
    bytes file = build_file(&t, 1, 0, NULL, 0);
    give(values.data);
    return file;
}

/* Everything that can be asked about positions, against the list of them. */
static void check_positions(bytes f, const int64_t *expected, uint64_t count, int flags) {
    shd_file file;
    shd_delta delta;
    uint64_t got = 0, done = 0;
    CHECK_CODE(shd_open(&file, f.data, f.size, NULL), SHD_OK);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL | flags, NULL, 0, &delta, NULL), SHD_OK);
    int64_t *positions = take((count + 1) * sizeof *positions);
    CHECK_CODE(shd_positions(&delta, 0, delta.block_count, positions, count, &got, NULL), SHD_OK);
    CHECK(got == count && memcmp(positions, expected, count * sizeof *positions) == 0);
    if (count > 0) {
        CHECK_CODE(shd_positions(&delta, 0, delta.block_count, positions, count - 1, &got, NULL),
                   SHD_BUFFER_TOO_SMALL);
    }
    for (uint64_t block = 0; block < delta.block_count; block += 3) { /* block ranges, put together */
        uint64_t last = block + 3 < delta.block_count ? block + 3 : delta.block_count;
        CHECK(shd_block_rank(&delta, block) == done);
        CHECK_CODE(shd_positions(&delta, block, last, positions, count, &got, NULL), SHD_OK);
        CHECK(done + got <= count && memcmp(positions, expected + done, got * sizeof *positions) == 0);
        done += got;
    }
    CHECK(done == count && shd_block_rank(&delta, delta.block_count) == count);
    random_state r = {count};
    for (int i = 0; i < 20; i++) { /* position ranges */
        uint64_t a = random_bits(&r) % (delta.tensor.numel + 1), b = random_bits(&r) % (delta.tensor.numel + 1);
        uint64_t first = a < b ? a : b, end = a < b ? b : a, rank = 0;
        uint64_t below = 0, inside = 0;
        for (uint64_t j = 0; j < count; j++) {
            below += (uint64_t)expected[j] < first;
            inside += (uint64_t)expected[j] >= first && (uint64_t)expected[j] < end;
        }
        CHECK_CODE(shd_positions_between(&delta, first, end, positions, count, &rank, &got, NULL), SHD_OK);
        CHECK(got == inside && memcmp(positions, expected + below, inside * sizeof *positions) == 0);
        CHECK(inside == 0 || rank == below);
    }
    give(positions);
}

static void check_code(bytes f, int expected) {
    static const int checks[] = {SHD_CHECK_ALL, SHD_CHECK_ALL | SHD_SCALAR};
    shd_file file;
    shd_delta delta;
    for (int i = 0; i < 2; i++) {
        int code = shd_open(&file, f.data, f.size, NULL);
        CHECK_CODE(code != SHD_OK ? code : shd_load(&file, 0, checks[i], NULL, 0, &delta, NULL), expected);
    }
}

/* FORMAT.md, section 9.1 */
static const uint8_t worked_example[40] = {1, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0,   0, 0,
                                           0, 0, 0, 0, 1, 0, 0, 0, 0x26, 0, 0, 0};

static void test_worked_example(void) {
    static const int64_t positions[3] = {3, 4, 9};
    uint8_t copy[40];
    bytes index = {copy, sizeof copy};
    memcpy(copy, worked_example, sizeof copy);
    bytes f = file_of_index(SHD_INDEX_RICE, index, 1, 1, 16, 3);
    check_positions(f, positions, 3, 0);
    check_positions(f, positions, 3, SHD_SCALAR);
    give(f.data);
}

static void check_changed_example(size_t offset, uint8_t value, uint64_t numel, int expected) {
    uint8_t copy[40];
    bytes index = {copy, sizeof copy};
    memcpy(copy, worked_example, sizeof copy);
    copy[offset] = value;
    bytes f = file_of_index(SHD_INDEX_RICE, index, 1, 1, numel, 3);
    check_code(f, expected);
    give(f.data);
}

static void test_rice_refusals(void) {
    check_changed_example(0, 32, 16, SHD_BAD_INDEX);
    check_changed_example(1, 1, 16, SHD_BAD_INDEX);
    check_changed_example(8, 33, 16, SHD_BAD_SIZE);
    check_changed_example(15, 0xFF, 16, SHD_BAD_SIZE);
    check_changed_example(8, 7, 16, SHD_BAD_INDEX);    /* the last bit is not a one */
    check_changed_example(28, 0x24, 16, SHD_BAD_INDEX); /* two ones */
    check_changed_example(0, 1, 9, SHD_POSITION_RANGE);
    check_changed_example(16, 1, 16, SHD_BAD_DIRECTORY);
    check_changed_example(20, 1, 16, SHD_BAD_DIRECTORY);
    check_changed_example(24, 9, 16, SHD_PADDING_NOT_ZERO);
    check_changed_example(28, 0x66, 16, SHD_PADDING_NOT_ZERO);
    check_changed_example(39, 1, 16, SHD_PADDING_NOT_ZERO);
}

/* A 4 x 4 matrix in tiles of two rows; rows are of the classes 0, 1, 0, 1, columns of 0, 0, 1, 1; k is 0, 1, 1, 2. */
static const uint8_t tiled_example[72] = {
    1, 1, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3,    2, 1, 1, 0x0A, 0, 0, 0,
    12, 0, 0, 0, 0x1C, 0, 0, 0, 6, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 0x6F, 0, 0, 0,
};

/* The section of FORMAT.md, 9.7: a 4 x 4 tensor. */
static const uint8_t seeded_example[52] = {
    7, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0,
};

/* A section that loading recodes. */
typedef struct recoded_example {
    int codec;
    const uint8_t *section;
    size_t size;
    uint32_t count;
    int64_t positions[6];
} recoded_example;

static const recoded_example tiled = {SHD_INDEX_TILED, tiled_example, sizeof tiled_example, 6, {0, 1, 3, 6, 9, 15}};
static const recoded_example seeded = {SHD_INDEX_SEEDED, seeded_example, sizeof seeded_example, 3, {0, 5, 10}};

/* Checks the example with `value` at `offset`: its code if that is not SHD_OK, and otherwise its positions. */
static void check_recoded(const recoded_example *example, size_t offset, uint8_t value, int expected) {
    uint8_t copy[72];
    bytes index = {copy, example->size};
    memcpy(copy, example->section, example->size);
    copy[offset] = value;
    bytes f = file_of_index(example->codec, index, 2, 4, 4, example->count);
    shd_file file;
    shd_tensor tensor;
    shd_delta delta;
    CHECK(shd_open(&file, f.data, f.size, NULL) == SHD_OK && shd_tensor_at(&file, 0, &tensor, NULL) == SHD_OK);
    uint64_t size = shd_scratch_size(&file, &tensor), count = 0;
    uint8_t *scratch = take(size);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, scratch, size - 1, &delta, NULL), SHD_BUFFER_TOO_SMALL);
    CHECK_CODE(shd_load(&file, 0, SHD_CHECK_ALL, scratch, size, &delta, NULL), expected);
    if (expected == SHD_PADDING_NOT_ZERO) {
        expected = shd_load(&file, 0, SHD_CHECK_SIZES, scratch, size, &delta, NULL);
        CHECK_CODE(expected, SHD_OK);
    }
    if (expected == SHD_OK) {
        int64_t found[6];
        CHECK(tensor.index_codec == example->codec && delta.tensor.index_codec == SHD_INDEX_RICE);
        CHECK_CODE(shd_positions(&delta, 0, delta.block_count, found, 6, &count, NULL), SHD_OK);
        CHECK(count == example->count && memcmp(found, example->positions, count * sizeof *found) == 0);
    }
    give(scratch);
    give(f.data);
}

static void test_tiled(void) {
    check_recoded(&tiled, 0, 1, SHD_OK);
    check_recoded(&tiled, 0, 5, SHD_BAD_INDEX);
    check_recoded(&tiled, 4, 5, SHD_BAD_INDEX);     /* more rows than there are */
    check_recoded(&tiled, 8, 3, SHD_BAD_INDEX);     /* columns that do not divide */
    check_recoded(&tiled, 16, 40, SHD_BAD_SIZE);    /* more unary bits */
    check_recoded(&tiled, 23, 0xFF, SHD_BAD_SIZE);
    check_recoded(&tiled, 27, 32, SHD_BAD_INDEX);   /* k */
    check_recoded(&tiled, 28, 20, SHD_BAD_INDEX);   /* a field of 20 bits */
    check_recoded(&tiled, 52, 2, SHD_BAD_INDEX);    /* a nonzero less */
    check_recoded(&tiled, 60, 0x6E, SHD_BAD_INDEX); /* a one less */
    check_recoded(&tiled, 56, 0x11, SHD_POSITION_RANGE);
    check_recoded(&tiled, 36, 0x1C, SHD_PADDING_NOT_ZERO);
    check_recoded(&tiled, 71, 1, SHD_PADDING_NOT_ZERO);
}

static void test_seeded(void) {
    check_recoded(&seeded, 0, 7, SHD_OK);
    check_recoded(&seeded, 8, 2, SHD_BAD_INDEX);  /* fewer cells than nonzeros */
    check_recoded(&seeded, 8, 17, SHD_BAD_INDEX); /* more than elements */
    check_recoded(&seeded, 15, 1, SHD_BAD_INDEX);
    check_recoded(&seeded, 8, 3, SHD_BAD_SIZE);    /* no cell is listed */
    check_recoded(&seeded, 8, 4, SHD_BAD_INDEX);   /* one is */
    check_recoded(&seeded, 16, 32, SHD_BAD_INDEX); /* k */
    check_recoded(&seeded, 24, 37, SHD_BAD_SIZE);
    check_recoded(&seeded, 32, 1, SHD_BAD_DIRECTORY);
    check_recoded(&seeded, 40, 0x10, SHD_BAD_INDEX); /* a one less */
    check_recoded(&seeded, 43, 1, SHD_PADDING_NOT_ZERO);
    check_recoded(&seeded, 51, 1, SHD_PADDING_NOT_ZERO);
}

static void check_rice(uint64_t numel, double density, uint64_t seed) {
    random_state r = {seed};
    uint64_t capacity = (uint64_t)((double)numel * density * 1.5) + 1000;
    int64_t *positions = take(capacity * sizeof *positions);
    uint64_t count = random_positions(&r, numel, density, positions, capacity);
    if (count > 0) {
        bytes index = encode_positions(positions, count, numel);
        bytes f = file_of_index(SHD_INDEX_RICE, index, 2, numel, 1, count);
        check_positions(f, positions, count, 0);
        check_positions(f, positions, count, SHD_SCALAR);
        give(index.data);
        give(f.data);
    }
    give(positions);
}

static void test_rice(void) {
    static const double densities[] = {1, 0.9, 0.5, 0.2, 0.05, 0.01, 0.001, 0.0001};
    for (size_t i = 0; i < sizeof densities / sizeof densities[0]; i++) {
        check_rice(300000, densities[i], i);
        check_rice(777, densities[i], i);
    }
    for (int bits = 20; bits <= 52; bits += 4) { /* every k, past 32-bit positions and past 32-bit offsets */
        check_rice(UINT64_C(1) << bits, 3000.0 / (double)(UINT64_C(1) << bits), (uint64_t)bits);
    }
}

static void test_rice_clusters(void) {
    /* Long gaps between dense runs: blocks of zeros only. */
    enum { COUNT = 3000 };
    static int64_t positions[COUNT];
    for (int64_t i = 0; i < COUNT; i++) {
        positions[i] = i % 1000 + i / 1000 * 9000000;
    }
    bytes index = encode_positions(positions, COUNT, 30000000);
    bytes f = file_of_index(SHD_INDEX_RICE, index, 2, 3000, 10000, COUNT);
    check_positions(f, positions, COUNT, 0);
    check_positions(f, positions, COUNT, SHD_SCALAR);
    give(index.data);
    give(f.data);
}

/* The code of a RICE section with `changed` in the place of one byte. */
static void check_changed_byte(bytes index, uint64_t offset, uint8_t changed, uint64_t numel, uint64_t count,
                               int expected) {
    const uint8_t before = index.data[offset];
    index.data[offset] = changed;
    bytes f = file_of_index(SHD_INDEX_RICE, index, 2, numel, 1, count);
    check_code(f, expected);
    give(f.data);
    index.data[offset] = before;
}

static void test_rice_damaged_blocks(void) {
    enum { NUMEL = 60000, CAPACITY = 10000 };
    static int64_t positions[CAPACITY];
    random_state r = {5};
    const uint64_t count = random_positions(&r, NUMEL, 0.1, positions, CAPACITY);
    bytes index = encode_positions(positions, count, NUMEL);
    const uint64_t k = index.data[0], unary_bits = index.data[8] | (uint64_t)index.data[9] << 8;
    const uint64_t blocks = (unary_bits + 2047) / 2048, low = 16 + 8 * blocks;
    const uint64_t unary = low + 4 * ((count * k + 31) / 32);
    CHECK(blocks > 4 && k > 1 && index.data[10] == 0);
    for (uint64_t word = 16; word < low; word += 4) { /* the directory */
        check_changed_byte(index, word, index.data[word] ^ 1, NUMEL, count, SHD_BAD_DIRECTORY);
    }
    for (uint64_t byte = low; byte < low + 100; byte++) { /* low bits of the first block: its positions move */
        check_changed_byte(index, byte, index.data[byte] ^ 0x10, NUMEL, count, SHD_BAD_DIRECTORY);
    }
    for (uint64_t byte = unary; byte < unary + 100; byte++) { /* a one more, or less */
        check_changed_byte(index, byte, index.data[byte] ^ 0x10, NUMEL, count, SHD_BAD_INDEX);
    }
    for (uint64_t end = unary + 256; end < unary + 256 * (blocks - 1); end += 256) { /* a one over a block's end */
        if (index.data[end - 1] >> 7 != (index.data[end] & 1)) {
            index.data[end - 1] ^= 0x80;
            check_changed_byte(index, end, index.data[end] ^ 1, NUMEL, count, SHD_BAD_DIRECTORY);
            index.data[end - 1] ^= 0x80;
        }
    }
    const uint64_t last = (uint64_t)positions[count - 1];
    check_changed_byte(index, 0, (uint8_t)k, last + 1, count, SHD_OK);
    check_changed_byte(index, 0, (uint8_t)k, last, count, SHD_POSITION_RANGE);
    check_changed_byte(index, 0, (uint8_t)k, last / 2, count, SHD_POSITION_RANGE);
    give(index.data);
}

static void test_raw(void) {
    enum { COUNT = 5000 };
    static int64_t positions[COUNT];
    static uint32_t narrow[COUNT + 2];
    static uint64_t wide[COUNT + 1];
    for (uint32_t i = 0; i < COUNT; i++) {
        positions[i] = 7 * (int64_t)i + i % 3;
        narrow[i] = (uint32_t)positions[i];
    }
    bytes index = {(uint8_t *)narrow, 4 * COUNT + 8};
    bytes f = file_of_index(SHD_INDEX_RAW, index, 2, 40000, 1, COUNT);
    check_positions(f, positions, COUNT, 0);
    give(f.data);
    f = file_of_index(SHD_INDEX_RAW, index, 2, (uint64_t)positions[COUNT - 1], 1, COUNT);
    check_code(f, SHD_POSITION_RANGE);
    give(f.data);
    narrow[100] = narrow[99];
    f = file_of_index(SHD_INDEX_RAW, index, 2, 40000, 1, COUNT);
    check_code(f, SHD_POSITION_ORDER);
    give(f.data);
    for (uint64_t i = 0; i < COUNT; i++) {
        wide[i] = i << 32;
        positions[i] = (int64_t)wide[i];
    }
    bytes wide_index = {(uint8_t *)wide, 8 * COUNT + 8};
    f = file_of_index(SHD_INDEX_RAW, wide_index, 2, UINT64_C(5000) << 32, 1, COUNT);
    check_positions(f, positions, COUNT, 0);
    give(f.data);
}

static void test_bitmap(void) {
    enum { NUMEL = 10001, BLOCKS = 5, WORDS = 313 };
    static uint32_t section[BLOCKS + WORDS + 2];
    static int64_t positions[NUMEL];
    random_state r = {11};
    uint64_t count = 0;
    for (uint32_t i = 0; i < NUMEL; i++) {
        if (i % 2048 == 0) {
            section[i / 2048] = (uint32_t)count;
        }
        if (random_bits(&r) % 3 != 0) {
            section[BLOCKS + i / 32] |= 1u << (i % 32);
            positions[count++] = i;
        }
    }
    bytes index = {(uint8_t *)section, sizeof section};
    bytes f = file_of_index(SHD_INDEX_BITMAP, index, 2, NUMEL, 1, count);
    check_positions(f, positions, count, 0);
    check_positions(f, positions, count, SHD_SCALAR);
    give(f.data);
    f = file_of_index(SHD_INDEX_BITMAP, index, 2, NUMEL, 1, count - 1);
    check_code(f, SHD_BAD_INDEX);
    give(f.data);
    section[2]++;
    f = file_of_index(SHD_INDEX_BITMAP, index, 2, NUMEL, 1, count);
    check_code(f, SHD_BAD_DIRECTORY);
    give(f.data);
    section[2]--;
    section[BLOCKS + WORDS - 1] |= 1u << 31;
    f = file_of_index(SHD_INDEX_BITMAP, index, 2, NUMEL, 1, count);
    check_code(f, SHD_PADDING_NOT_ZERO);
    give(f.data);
}

static void test_all(void) {
    enum { NUMEL = 5000 };
    static int64_t positions[NUMEL];
    for (int64_t i = 0; i < NUMEL; i++) {
        positions[i] = i;
    }
    bytes nothing = {NULL, 0};
    bytes f = file_of_index(SHD_INDEX_ALL, nothing, 2, 50, 100, NUMEL);
    check_positions(f, positions, NUMEL, 0);
    give(f.data);
    f = file_of_index(SHD_INDEX_ALL, nothing, 0, 1, 1, 1); /* rank 0 */
    check_positions(f, positions, 1, 0);
    give(f.data);
}

/* ---- STRUCT ---- */

typedef struct entry {
    uint64_t kind;
    int64_t start;
    uint64_t step, count;
} entry;

/* Marks the elements of the lines one by one. */
static uint64_t list_lines(const entry *entries, size_t m, int64_t rows, int64_t columns, int64_t *positions) {
    uint8_t *listed = take((size_t)(rows * columns) + 1);
    for (size_t e = 0; e < m; e++) {
        for (uint64_t i = 0; i < entries[e].count; i++) {
            int64_t line = entries[e].start + (int64_t)(i * entries[e].step);
            for (int64_t row = 0; row < rows; row++) {
                for (int64_t column = 0; column < columns; column++) {
                    int64_t of[3] = {row, column, column - row};
                    listed[row * columns + column] |= of[entries[e].kind] == line;
                }
            }
        }
    }
    uint64_t count = 0;
    for (int64_t p = 0; p < rows * columns; p++) {
        if (listed[p]) {
            positions[count++] = p;
        }
    }
    give(listed);
    return count;
}

static bytes section_of(const entry *entries, size_t m) {
    bytes section = {take(32 * m + 8), 32 * m + 8};
    memcpy(section.data, entries, 32 * m);
    return section;
}

static void check_lines(const entry *entries, size_t m, int64_t rows, int64_t columns) {
    int64_t *positions = take((size_t)(rows * columns) * sizeof *positions);
    uint64_t count = list_lines(entries, m, rows, columns, positions);
    bytes index = section_of(entries, m);
    bytes f = file_of_index(SHD_INDEX_STRUCT, index, 2, (uint64_t)rows, (uint64_t)columns, count);
    check_positions(f, positions, count, 0);
    give(f.data);
    f = file_of_index(SHD_INDEX_STRUCT, index, 2, (uint64_t)rows, (uint64_t)columns, count - 1);
    if (count > 1) {
        check_code(f, SHD_BAD_INDEX);
    }
    give(f.data);
    give(index.data);
    give(positions);
}

static void test_struct(void) {
    static const entry rows_only[] = {{0, 2, 3, 4}, {0, 15, 1, 2}};
    static const entry columns_only[] = {{1, 0, 7, 3}, {1, 20, 1, 1}};
    static const entry diagonals_only[] = {{2, -10, 4, 3}, {2, 5, 1, 2}};
    static const entry far_diagonal[] = {{2, -19, 1, 1}, {2, 29, 1, 1}};
    static const entry mixed[] = {{0, 3, 5, 3}, {1, 2, 9, 3}, {2, -19, 6, 4}, {2, 0, 29, 2}};
    check_lines(rows_only, 2, 20, 30);
    check_lines(columns_only, 2, 20, 30);
    check_lines(diagonals_only, 2, 20, 30);
    check_lines(far_diagonal, 2, 20, 30);
    check_lines(mixed, 4, 20, 30);
    check_lines(mixed, 4, 60, 30);
    random_state r = {3};
    for (int trial = 0; trial < 200; trial++) {
        entry entries[8];
        int64_t rows = 1 + (int64_t)(random_bits(&r) % 40), columns = 1 + (int64_t)(random_bits(&r) % 40);
        size_t m = 0;
        for (uint64_t kind = 0; kind < 3; kind++) {
            int64_t end = kind == 0 ? rows : columns, next = kind == 2 ? 1 - rows : 0;
            for (int i = 0; i < 2; i++) {
                entry e = {kind, next + (int64_t)(random_bits(&r) % 20), 1 + random_bits(&r) % 9,
                           1 + random_bits(&r) % 4};
                int64_t last = e.start + (int64_t)(e.step * (e.count - 1));
                if (last < end) {
                    entries[m++] = e;
                    next = last + 1;
                }
            }
        }
        if (m > 0) {
            check_lines(entries, m, rows, columns);
        }
    }
}

static void check_entries(const entry *entries, size_t m, int expected) {
    bytes index = section_of(entries, m);
    bytes f = file_of_index(SHD_INDEX_STRUCT, index, 2, 20, 30, 30);
    check_code(f, expected);
    give(f.data);
    give(index.data);
}

static void test_struct_refusals(void) {
    static const entry one_row = {0, 0, 1, 1};
    static const entry wrong[] = {{3, 0, 1, 1},  {0, 0, 0, 1},  {0, 0, 1, 0},          {0, -1, 1, 1},
                                  {0, 20, 1, 1}, {1, 30, 1, 1}, {2, -20, 1, 1},        {2, 30, 1, 1},
                                  {0, 1, 10, 3}, {0, 0, 1, 2},  {0, 1, UINT64_MAX, 2}, {1, 0, 1, UINT64_MAX}};
    static const entry backwards[] = {{1, 0, 1, 1}, {0, 0, 1, 1}}, twice[] = {{0, 3, 1, 1}, {0, 3, 1, 1}};
    check_entries(&one_row, 1, SHD_OK);
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        check_entries(&wrong[i], 1, SHD_BAD_INDEX);
    }
    check_entries(backwards, 2, SHD_POSITION_ORDER);
    check_entries(twice, 2, SHD_POSITION_ORDER);
}

static void test_struct_of_a_huge_matrix(void) {
    /* One row among 2^48 of one column: the empty rows must cost nothing. */
    static const entry entries[] = {{0, INT64_C(1) << 47, 1, 1}, {2, -(INT64_C(1) << 46), 1, 1}};
    static const int64_t positions[2] = {INT64_C(1) << 46, INT64_C(1) << 47};
    bytes index = section_of(entries, 2);
    bytes f = file_of_index(SHD_INDEX_STRUCT, index, 2, UINT64_C(1) << 48, 1, 2);
    check_positions(f, positions, 2, 0);
    give(f.data);
    give(index.data);
}

/* Which ids are known is compared with the registry by tests/libshd/test_registry.py of the whole project. */
static void test_known_codecs(void) {
    CHECK(shd_knows_index_codec(SHD_INDEX_NONE) && shd_knows_index_codec(SHD_INDEX_RICE));
    CHECK(shd_values_size(SHD_VALUES_F32, SHD_F32, 1) != 0);
    CHECK(shd_values_size(SHD_VALUES_NONE, SHD_F32, 1) == 0);
    static const int never[] = {-1, 255, 256};
    for (int i = 0; i < 3; i++) {
        CHECK(!shd_knows_index_codec(never[i]));
        CHECK(shd_values_size(never[i], SHD_F32, 1) == 0);
    }
}

void test_index(void) {
    test_known_codecs();
    test_worked_example();
    test_rice_refusals();
    test_tiled();
    test_seeded();
    test_rice();
    test_rice_clusters();
    test_rice_damaged_blocks();
    test_raw();
    test_bitmap();
    test_all();
    test_struct();
    test_struct_refusals();
    test_struct_of_a_huge_matrix();
}
