/* The canonical choices of section 8. What is encoded decodes: that is shown in test_index.c. */
#include "check.h"
#include "support.h"

#include <math.h>
#include <string.h>

static uint64_t cost(const int64_t *positions, uint64_t count, uint32_t k) {
    uint64_t sum = count * k;
    for (uint64_t i = 0; i < count; i++) {
        int64_t last = i == 0 ? -1 : positions[i - 1];
        sum += (uint64_t)(positions[i] - last - 1) >> k;
    }
    return sum;
}

static void check_k(const int64_t *positions, uint64_t count, uint64_t numel) {
    uint32_t best = 0;
    shd_rice plan;
    for (uint32_t k = 1; k <= 31; k++) {
        if (cost(positions, count, k) < cost(positions, count, best)) {
            best = k;
        }
    }
    CHECK_CODE(shd_rice_plan(positions, count, numel, &plan), SHD_OK);
    CHECK(plan.k == best);
    CHECK(plan.unary_bits == cost(positions, count, best) - count * best + count);
}

static void test_choice_of_k(void) {
    static int64_t positions[4000];
    random_state r = {31};
    for (int trial = 0; trial < 300; trial++) {
        uint64_t numel = UINT64_C(1) << (1 + random_bits(&r) % 50);
        uint64_t count = random_positions(&r, numel, pow(random_unit(&r), 4), positions, 4000);
        if (count > 0) {
            check_k(positions, count, numel);
        }
    }
    for (int64_t k = 0; k < 32; k++) { /* gaps of one size: ties */
        for (int64_t i = 0; i < 100; i++) {
            positions[i] = (i + 1) * (INT64_C(1) << k) - 1;
        }
        check_k(positions, 100, UINT64_C(1) << 50);
    }
    for (int64_t i = 0; i < 1000; i++) { /* far from geometric */
        positions[i] = i < 999 ? i : INT64_C(1) << 40;
    }
    check_k(positions, 1000, UINT64_C(1) << 50);
}

static void test_rice_misuse(void) {
    static const int64_t good[3] = {3, 4, 9}, equal[3] = {3, 3, 9}, down[3] = {4, 3, 9}, negative[3] = {-1, 3, 9};
    static const int64_t others[3] = {3, 8, 9};
    static uint8_t section[64];
    shd_rice plan;
    CHECK_CODE(shd_rice_plan(equal, 3, 16, &plan), SHD_POSITION_ORDER);
    CHECK_CODE(shd_rice_plan(down, 3, 16, &plan), SHD_POSITION_ORDER);
    CHECK_CODE(shd_rice_plan(negative, 3, 16, &plan), SHD_POSITION_RANGE);
    CHECK_CODE(shd_rice_plan(good, 3, 9, &plan), SHD_POSITION_RANGE);
    CHECK_CODE(shd_rice_plan(good, 0, 9, &plan), SHD_INVALID_ARGUMENT);
    CHECK_CODE(shd_rice_plan(good, 3, 16, &plan), SHD_OK);
    CHECK_CODE(shd_rice_encode(&plan, good, section, plan.size - 1), SHD_BUFFER_TOO_SMALL);
    CHECK_CODE(shd_rice_encode(&plan, good, section, plan.size), SHD_OK);
    CHECK_CODE(shd_rice_encode(&plan, down, section, plan.size), SHD_INVALID_ARGUMENT);
    (void)shd_rice_encode(&plan, others, section, plan.size); /* an error or not, but inside the buffer */
}

static void test_select(void) {
    enum { N = 10007 };
    static float x[N];
    static int64_t positions[N], expected[N];
    random_state r = {17};
    uint64_t count = 0, got = 0;
    for (int i = 0; i < N; i++) {
        x[i] = (float)random_unit(&r) - 0.5f;
        if (i % 100 == 0) {
            x[i] = i % 200 == 0 ? NAN : INFINITY;
        }
        if (fabsf(x[i]) >= 0.4f) {
            expected[count++] = 1000 + i;
        }
    }
    CHECK(shd_count_at_least(x, N, 0.4f) == count);
    CHECK_CODE(shd_select_at_least(x, N, 0.4f, 1000, positions, count, &got), SHD_OK);
    CHECK(got == count && memcmp(positions, expected, count * sizeof *positions) == 0);
    CHECK_CODE(shd_select_at_least(x, N, 0.4f, 0, positions, count - 1, &got), SHD_BUFFER_TOO_SMALL);
    CHECK(shd_count_at_least(x, N, 0.0f) == N - 51);
    CHECK(shd_count_at_least(NULL, 0, 0.0f) == 0);
}

void test_encode(void) {
    test_choice_of_k();
    test_rice_misuse();
    test_select();
}
