/* The SIMD kernels of positions against the scalar ones. */
#include "../src/draw.h"
#include "../src/kernels.h"
#include "../src/rice_writer.h"
#include "check.h"
#include "support.h"

enum { MOST = SHDI_BLOCK, ROOM = SHDI_BLOCK_ROOM + SHDI_MORE_ORDERS, BYTES = 16384 };

static uint32_t below(random_state *r, uint64_t end) { return (uint32_t)(random_bits(r) % end); }

/* Numbers that increase by 1 to `step`, from 0 on or a little above. */
static uint32_t increasing(random_state *r, uint32_t *numbers, uint32_t count, uint32_t step) {
    uint32_t next = below(r, step);
    for (uint32_t i = 0; i < count; i++) {
        numbers[i] = next;
        next += 1 + below(r, below(r, 8) == 0 ? step : 1 + step / 16);
    }
    return next;
}

static void check_rice_offsets(random_state *r, const shdi_kernels *kernels) {
    static uint8_t low[8 * MOST];
    static uint32_t a[ROOM], b[ROOM];
    const uint32_t count = below(r, below(r, 2) ? 40 : MOST), k = below(r, SHDI_NARROW_K + 1), base = (uint32_t)random_bits(r);
    const uint64_t first = random_bits(r) % 8, size = (first + count * k + 7) / 8 + 8 + random_bits(r) % 40;
    for (uint64_t i = 0; i < size; i++) {
        low[i] = (uint8_t)random_bits(r);
    }
    (void)increasing(r, a, count + 8, 2);
    memcpy(b, a, sizeof b);
    CHECK(kernels->rice_offsets(a, count, k, base, low, size, first) ==
          shdi_scalar.rice_offsets(b, count, k, base, low, size, first));
    CHECK(memcmp(a, b, (count + 8) * sizeof *a) == 0); /* what follows stays */
}

static void check_lines(random_state *r, const shdi_kernels *kernels) {
    static shdi_cell cells[64];
    static uint32_t order[ROOM], rows[2][ROOM], columns[2][ROOM];
    uint32_t end = 0, count = 0;
    for (uint32_t i = 0; i < 64; i++) {
        const uint32_t width = 1 + below(r, below(r, 2) ? 40 : 2000);
        const uint32_t size = width * (1 + below(r, 1 + 2040 / width));
        cells[i] = (shdi_cell){end, size - 1, below(r, 1000), below(r, 1000), width,
                               shdi_cell_reciprocal(width), shdi_cell_shift(width)};
        end += size;
    }
    for (uint32_t next = below(r, 100), step = 1 + below(r, 200); next < end && count < MOST; count++) {
        order[count] = next;
        next += 1 + below(r, step);
    }
    if (count == 0) {
        return;
    }
    for (uint32_t i = 0; i < SHDI_MORE_ORDERS; i++) {
        order[count + i] = INT32_MAX;
    }
    const shdi_cell *at[2] = {cells, cells};
    kernels->lines(order, count, &at[0], rows[0], columns[0]);
    shdi_scalar.lines(order, count, &at[1], rows[1], columns[1]);
    CHECK(at[0] == at[1]);
    CHECK(memcmp(rows[0], rows[1], count * sizeof **rows) == 0);
    CHECK(memcmp(columns[0], columns[1], count * sizeof **columns) == 0);
}

/* Quotients are those of division, up to the largest tile. */
static void check_reciprocals(void) {
    for (uint32_t width = 1; width <= 131072; width += 1 + width / 64) {
        const uint64_t reciprocal = shdi_cell_reciprocal(width), shift = shdi_cell_shift(width);
        for (uint32_t row = 1; row <= 131072 / width; row += 1 + row / 64) {
            CHECK((row * width - 1) * reciprocal >> shift == row - 1);
            CHECK(row * width == 131072 || row * width * reciprocal >> shift == row);
        }
    }
}

static void check_bitmap(random_state *r, const shdi_kernels *kernels) {
    static uint8_t bitmaps[2][BYTES];
    static uint32_t words[2][ROOM], ones[2][ROOM];
    memset(bitmaps, 0, sizeof bitmaps);
    const uint32_t count = 8 * (1 + below(r, BYTES / 64)), density = 1 + below(r, below(r, 4) == 0 ? 4 : 200);
    for (uint32_t i = 0; i < 64 * count; i += 1 + below(r, density)) {
        bitmaps[0][i / 8] |= (uint8_t)(1u << (i % 8));
    }
    memcpy(bitmaps[1], bitmaps[0], BYTES);
    const uint32_t found = kernels->words(bitmaps[0], count, words[0]);
    CHECK(found == shdi_scalar.words(bitmaps[1], count, words[1]));
    CHECK(memcmp(words[0], words[1], found * sizeof **words) == 0);
    for (uint32_t at[2] = {0, 0}; at[1] < found;) {
        const uint32_t n = kernels->take_ones(bitmaps[0], words[0], &at[0], found, ones[0]);
        CHECK(n == shdi_scalar.take_ones(bitmaps[1], words[1], &at[1], found, ones[1]) && at[0] == at[1]);
        CHECK(memcmp(ones[0], ones[1], n * sizeof **ones) == 0);
    }
    CHECK(memcmp(bitmaps[0], bitmaps[1], BYTES) == 0);
}

static void check_rice_gaps(random_state *r, const shdi_kernels *kernels) {
    static uint8_t unary[2][16 * MOST], low[2][16 * MOST], directory[2][BYTES];
    static uint32_t offset[ROOM];
    memset(unary, 0, sizeof unary);
    memset(low, 0, sizeof low);
    memset(directory, 0, sizeof directory);
    const uint32_t k = below(r, 18), count = below(r, MOST), start = below(r, 1000), step = (2u << k) + below(r, 16);
    (void)increasing(r, offset, count, step);
    shdi_rice_writer w[2];
    for (uint32_t i = 0; i < 2; i++) {
        w[i] = (shdi_rice_writer){.directory = directory[i], .unary = unary[i], .low = {low[i], 0, 0}, .word = 4, .k = k};
        shdi_rice_write_run(&w[i], i == 0 ? kernels : &shdi_scalar, start, offset, count);
        shdi_pack_rest(&w[i].low);
    }
    CHECK(w[0].bit == w[1].bit && w[0].rank == count && w[1].rank == count && w[0].position == w[1].position);
    CHECK(memcmp(unary[0], unary[1], sizeof *unary) == 0);
    CHECK(memcmp(low[0], low[1], sizeof *low) == 0);
    CHECK(memcmp(directory[0], directory[1], sizeof *directory) == 0);
}

static void check_drawn(random_state *r, const shdi_kernels *kernels) {
    static uint32_t numbers[2][ROOM];
    const uint64_t cells = 1 + (random_bits(r) >> (32 + below(r, 31))), most = UINT64_C(1) << below(r, 32);
    const uint64_t numel = cells * (1 + random_bits(r) % most) + random_bits(r) % cells, rest = numel % cells;
    const shdi_draw draw = {random_bits(r), cells, numel / cells, rest, (rest << 32) / cells};
    const uint32_t count = below(r, 200), base = (uint32_t)random_bits(r);
    for (uint32_t i = 0; i < count; i++) {
        numbers[0][i] = numbers[1][i] = below(r, 8) == 0 ? (uint32_t)cells - 1 : below(r, cells);
    }
    kernels->drawn(&draw, base, numbers[0], count);
    shdi_scalar.drawn(&draw, base, numbers[1], count);
    CHECK(memcmp(numbers[0], numbers[1], count * sizeof **numbers) == 0);
}

void test_kernels(void) {
    random_state r = {5};
    check_reciprocals();
    for (int i = 0; i < (is_brief ? 300 : 3000); i++) {
        check_rice_offsets(&r, shdi_kernels_best());
        check_lines(&r, shdi_kernels_best());
        check_bitmap(&r, shdi_kernels_best());
        check_rice_gaps(&r, shdi_kernels_best());
        check_drawn(&r, shdi_kernels_best());
    }
}
