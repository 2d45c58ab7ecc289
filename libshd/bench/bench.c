/* Speeds, against memcpy of the weights: shd_bench [rows columns density]. One core, but for the rows that say so.
 * Each figure is the best of several runs. Before what touches the weights they are copied, so that each run finds
 * the caches as a memcpy leaves them. */
#include "../tests/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if !defined(_WIN32)
#include <pthread.h>
#define WITH_THREADS 1
#endif

#define RUNS 9

static double now(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* All that a measured action works on. */
typedef struct stage {
    sample s;
    shd_file file;
    shd_delta delta;
    shd_delta scalar;
    shd_weights weights;
    int64_t *positions;
    uint64_t room; /* in positions */
    float *values;
    void *saved;
    void *copy;
    bytes section;
    float *dense;
} stage;

typedef int (*action)(stage *g);

static int copy_weights(stage *g) {
    memcpy(g->copy, g->weights.data, g->s.numel * shd_dtype_size(g->weights.dtype));
    return SHD_OK;
}

static double best(action run, stage *g, int cold) {
    double least = 1e9;
    for (int i = 0; i < RUNS; i++) {
        if (cold) {
            (void)copy_weights(g);
        }
        double start = now();
        int code = run(g);
        double took = now() - start;
        if (code != SHD_OK) {
            fprintf(stderr, "%s\n", shd_error_name(code));
            exit(1);
        }
        least = took < least ? took : least;
    }
    return least;
}

static int decode(stage *g) {
    uint64_t count;
    return shd_positions(&g->delta, 0, g->delta.block_count, g->positions, g->s.nnz, &count, NULL);
}

static int decode_scalar(stage *g) {
    uint64_t count;
    return shd_positions(&g->scalar, 0, g->scalar.block_count, g->positions, g->s.nnz, &count, NULL);
}

static int decode_values(stage *g) { return shd_values(&g->delta, 0, g->s.nnz, g->values, NULL); }

static int check_all(stage *g) {
    shd_delta delta;
    return shd_load(&g->file, 0, SHD_CHECK_ALL, NULL, 0, &delta, NULL);
}

static int encode(stage *g) {
    shd_rice plan;
    int code = shd_rice_plan(g->s.positions, g->s.nnz, g->s.numel, &plan);
    return code != SHD_OK ? code : shd_rice_encode(&plan, g->s.positions, g->section.data, g->section.size);
}

static int encode_i8(stage *g) {
    return shd_values_encode(SHD_VALUES_I8, g->s.values, g->s.nnz, g->section.data, g->section.size);
}

static int encode_i4(stage *g) {
    return shd_values_encode(SHD_VALUES_I4, g->s.values, g->s.nnz, g->section.data, g->section.size);
}

static int apply(stage *g) {
    return shd_apply(&g->delta, &g->weights, 1.0, 0, g->delta.block_count, g->saved, NULL);
}

static int apply_scalar(stage *g) {
    return shd_apply(&g->scalar, &g->weights, 1.0, 0, g->scalar.block_count, g->saved, NULL);
}

#if WITH_THREADS
typedef struct half {
    stage *g;
    uint64_t first, last;
    int code;
} half;

static void *apply_half(void *argument) {
    half *h = argument;
    h->code = shd_apply(&h->g->delta, &h->g->weights, 1.0, h->first, h->last, h->g->saved, NULL);
    return NULL;
}

/* The two threads patch blocks that do not overlap, of one buffer. */
static int apply_by_two(stage *g) {
    uint64_t blocks = g->delta.block_count;
    half first = {g, 0, blocks / 2, SHD_OK}, second = {g, blocks / 2, blocks, SHD_OK};
    pthread_t thread;
    if (pthread_create(&thread, NULL, apply_half, &second) != 0) {
        return SHD_INVALID_ARGUMENT;
    }
    (void)apply_half(&first);
    pthread_join(thread, NULL);
    return first.code != SHD_OK ? first.code : second.code;
}
#endif

static int revert(stage *g) {
    return shd_revert(&g->delta, &g->weights, 0, g->delta.block_count, g->saved, NULL);
}

static int fingerprint(stage *g) {
    uint64_t sum;
    return shd_fingerprint(&g->delta, &g->weights, 0, g->delta.block_count, &sum, NULL);
}

static int select_largest(stage *g) {
    uint64_t count;
    return shd_select_at_least(g->dense, g->s.numel, 0.99f, 0, g->positions, g->room, &count);
}

static void prepare(stage *g, uint64_t rows, uint64_t columns, double density) {
    g->s = build_sample(1, rows, columns, density, SHD_VALUES_I8, SHD_BF16);
    if (shd_open(&g->file, g->s.file.data, g->s.file.size, NULL) != SHD_OK ||
        shd_load(&g->file, 0, SHD_CHECK_ALL, NULL, 0, &g->delta, NULL) != SHD_OK ||
        shd_load(&g->file, 0, SHD_CHECK_ALL | SHD_SCALAR, NULL, 0, &g->scalar, NULL) != SHD_OK) {
        fprintf(stderr, "the sample does not open\n");
        exit(1);
    }
    shd_weights weights = {take(g->s.numel * 2), 0, g->s.numel, SHD_BF16, 0};
    g->weights = weights;
    memset(weights.data, 0x3C, g->s.numel * 2);
    g->copy = take(g->s.numel * 2);
    g->room = g->s.nnz + g->s.numel / 64 + 1024;
    g->positions = take(g->room * sizeof *g->positions);
    g->values = take(g->s.nnz * sizeof *g->values);
    g->saved = take(g->s.nnz * 2);
    g->section.size = 8 * g->s.nnz + 4096;
    g->section.data = take(g->section.size);
    random_state r = {2};
    g->dense = take(g->s.numel * sizeof *g->dense);
    for (uint64_t i = 0; i < g->s.numel; i++) {
        g->dense[i] = (float)random_unit(&r);
    }
}

int main(int count, char **arguments) {
    uint64_t rows = count > 1 ? strtoull(arguments[1], NULL, 10) : 11008;
    uint64_t columns = count > 2 ? strtoull(arguments[2], NULL, 10) : 4096;
    double density = count > 3 ? strtod(arguments[3], NULL) : 0.01;
    static stage g;
    prepare(&g, rows, columns, density);
    static const struct {
        const char *name;
        action run;
        int of_weights; /* the rate counts all elements, not the nonzeros */
        int cold;
    } rows_of_table[] = {
        {"memcpy of the weights (bf16)", copy_weights, 1, 1},
        {"decode positions", decode, 0, 0},
        {"decode positions, scalar", decode_scalar, 0, 0},
        {"decode values (int8)", decode_values, 0, 0},
        {"full check", check_all, 0, 0},
        {"encode positions", encode, 0, 0},
        {"encode values (int8)", encode_i8, 0, 0},
        {"encode values (int4)", encode_i4, 0, 0},
        {"apply, with saving", apply, 0, 1},
        {"apply, with saving, scalar", apply_scalar, 0, 1},
#if WITH_THREADS
        {"apply, with saving, 2 threads", apply_by_two, 0, 1},
#endif
        {"revert", revert, 0, 1},
        {"fingerprint", fingerprint, 0, 1},
        {"select |x| >= threshold (1 %)", select_largest, 1, 1},
    };
    printf("[%llu, %llu], density %g: %llu nonzeros, %.3f bits each for the position; %s\n", (unsigned long long)rows,
           (unsigned long long)columns, density, (unsigned long long)g.s.nnz,
           8.0 * (double)g.delta.tensor.index.stored / (double)g.s.nnz, shd_simd());
    printf("%-32s %9s %12s %10s\n", "", "ms", "G elements/s", "x memcpy");
    double copy = best(copy_weights, &g, 1);
    for (size_t i = 0; i < sizeof rows_of_table / sizeof rows_of_table[0]; i++) {
        double took = best(rows_of_table[i].run, &g, rows_of_table[i].cold);
        double elements = (double)(rows_of_table[i].of_weights ? g.s.numel : g.s.nnz);
        printf("%-32s %9.3f %12.3f %10.3f\n", rows_of_table[i].name, 1e3 * took, elements / took * 1e-9, took / copy);
    }
    return 0;
}
