/* Several ADDs at once (FORMAT.md, section 6.2).
 *
 * A call goes through the weights in chunks. In each chunk every delta first saves its elements and adds its
 * contributions to a dense array of sums. Then every delta writes original + sum to its elements. Deltas that overlap
 * write the same bits twice, so the code need not find out where. The sums start from -0, because -0 + x is x for
 * every x, and +0 + -0 is not -0.
 *
 * A chunk ends where a decoded piece of any delta ends, so one piece for each delta is enough. */
#include "floats.h"
#include "index.h"
#include "values.h"
#include "weights.h"

/* The elements of a chunk. They are few enough for their sums and weights to stay in a core's own cache, and enough
 * for a delta to have about NONZEROS among them, which the work for each chunk is spread over. */
#define LEAST_CHUNK 8192u
#define MOST_CHUNK 65536u
#define NONZEROS 80u

/* A delta on its way through the weights. */
typedef struct addend {
    shdi_cursor cursor;
    shdi_piece piece; /* without positions behind the weights; its count is 0 at the end */
    uint32_t at;      /* the first entry of the piece that is not before the chunk */
    uint32_t count;   /* how many entries from there on are in it */
    int is_last;      /* no piece comes after this one */
    float strength;
    uint8_t *saved;
} addend;

typedef struct work {
    addend *addends;
    uint32_t count;
    int from_saved;
    const shd_weights *weights;
    uint32_t size;  /* of an element */
    uint64_t chunk; /* elements of a chunk at most */
    uint64_t first; /* position of the chunk's first element */
    uint64_t done;  /* the work before this position is done */
    float *sum;     /* [chunk] */
    /* Where a fault is: */
    const shd_tensor *tensor;
    const shd_section *section;
} work;

/* The scratch buffer of a call. */
typedef struct memory {
    float sum[MOST_CHUNK];
    addend addends[];
} memory;

#define ALIGNMENT 64u

/* ---- What is done to a delta's elements of a chunk ---- */

/* Up to SHDI_GROUP of those elements, from number `first` on. They are in one group of values. */
static shdi_run run_of(const work *w, const addend *a, uint32_t first) {
    const uint64_t rank = a->piece.rank + a->at + first;
    const uint64_t count = shdi_min(a->count - first, SHDI_GROUP - rank % SHDI_GROUP);
    shdi_run r = {a->piece.base - w->weights->first_position, rank, a->piece.offset + a->at + first, (uint32_t)count};
    return r;
}

/* As many elements as in a run, from about a chunk later, if the piece has any there. */
static shdi_run run_ahead(const addend *a, const shdi_run *r) {
    const uint64_t later = (uint64_t)(r->offset - a->piece.offset) + a->count;
    shdi_run ahead = *r;
    ahead.offset = a->piece.offset + shdi_min(later, a->piece.count - r->count);
    return ahead;
}

/* sums[shift + offset[i]] is the sum of element i of a run. */
static uint64_t shift_of_sums(const work *w, const shdi_run *r) {
    return r->shift - (w->first - w->weights->first_position);
}

static shdi_fault contribute(const work *w, const addend *a) {
    shdi_run r;
    for (uint32_t first = 0; first < a->count; first += r.count) {
        float values[SHDI_GROUP];
        r = run_of(w, a, first);
        shdi_fault fault = shdi_values_decode(a->cursor.delta, r.rank, r.count, values);
        if (fault.code != SHD_OK) {
            return fault;
        }
        const uint64_t shift = shift_of_sums(w, &r);
        for (uint32_t i = 0; i < r.count; i++) {
            float s = a->strength * values[i];
            w->sum[shift + r.offset[i]] += s;
        }
        const shdi_run ahead = run_ahead(a, &r);
        if (w->from_saved) {
            shdi_prefetch(w->weights->data, w->size, &ahead);
        } else {
            shdi_gather(w->weights->data, w->size, &r, &ahead, a->saved + r.rank * w->size);
        }
    }
    return shdi_ok();
}

static shdi_fault write(const work *w, const addend *a) {
    const shdi_kernels *kernels = shdi_kernels_of(a->cursor.delta);
    shdi_run r;
    for (uint32_t first = 0; first < a->count; first += r.count) {
        float sums[SHDI_GROUP];
        union {
            uint8_t bytes[4 * SHDI_GROUP];
            uint16_t u16[SHDI_GROUP];
            uint32_t u32[SHDI_GROUP];
        } new;
        r = run_of(w, a, first);
        const uint64_t shift = shift_of_sums(w, &r);
        for (uint32_t i = 0; i < r.count; i++) {
            sums[i] = w->sum[shift + r.offset[i]];
        }
        const void *old = a->saved + r.rank * w->size;
        int code = shdi_add(kernels, w->weights->dtype, &new, old, sums, 1.0f, r.count);
        if (code != SHD_OK) {
            return shdi_fault_at(code, 0);
        }
        shdi_scatter(w->weights->data, w->size, &r, new.bytes);
    }
    return shdi_ok();
}

static void clear_sums(const work *w, const addend *a) {
    shdi_run r;
    for (uint32_t first = 0; first < a->count; first += r.count) {
        r = run_of(w, a, first);
        const uint64_t shift = shift_of_sums(w, &r);
        for (uint32_t i = 0; i < r.count; i++) {
            w->sum[shift + r.offset[i]] = -0.0f;
        }
    }
}

static void put_back(const work *w, const addend *a) {
    shdi_run r;
    for (uint32_t first = 0; first < a->count; first += r.count) {
        r = run_of(w, a, first);
        shdi_scatter(w->weights->data, w->size, &r, a->saved + r.rank * w->size);
    }
}

/* ---- A chunk ---- */

/* A fault in the values of addend i. */
static shdi_fault fault_of_values(work *w, uint32_t i, shdi_fault fault) {
    w->tensor = &w->addends[i].cursor.delta->tensor;
    w->section = &w->tensor->values;
    return fault;
}

static shdi_fault write_chunk(work *w) {
    for (uint32_t i = 0; i < w->count; i++) {
        shdi_fault fault = contribute(w, &w->addends[i]);
        if (fault.code != SHD_OK) {
            return fault_of_values(w, i, fault);
        }
    }
    for (uint32_t i = 0; i < w->count; i++) {
        shdi_fault fault = write(w, &w->addends[i]);
        if (fault.code != SHD_OK) {
            return fault_of_values(w, i, fault);
        }
    }
    for (uint32_t i = 0; i < w->count; i++) {
        clear_sums(w, &w->addends[i]);
    }
    return shdi_ok();
}

static shdi_fault put_chunk_back(work *w) {
    for (uint32_t i = 0; i < w->count; i++) {
        put_back(w, &w->addends[i]);
    }
    return shdi_ok();
}

/* ---- Walking ---- */

static uint64_t position_of(const shdi_piece *piece, uint32_t i) { return piece->base + piece->offset[i]; }

/* Moves behind the chunk, to the first element at or after position `first`, and decodes as far as needed. This is
 * where positions are checked before they are used: the piece keeps none at or after `end`. */
static shdi_fault advance(addend *a, uint64_t first, uint64_t end) {
    shdi_piece *piece = &a->piece;
    a->at += a->count;
    a->count = 0;
    for (;;) {
        while (a->at < piece->count && position_of(piece, a->at) < first) {
            a->at++; /* in the piece that the weights start in */
        }
        if (a->at < piece->count) {
            return shdi_ok();
        }
        a->at = piece->count = 0;
        if (a->is_last) {
            return shdi_ok();
        }
        shdi_fault fault = shdi_cursor_next(&a->cursor, piece);
        if (fault.code != SHD_OK) {
            return fault;
        }
        a->is_last = piece->count == 0;
        for (; piece->count > 0 && position_of(piece, piece->count - 1) >= end; piece->count--) {
            a->is_last = 1;
        }
    }
}

/* How many elements lie before `end`, from a->at on. */
static uint32_t count_before(const addend *a, uint64_t end) {
    uint32_t low = a->at, high = a->piece.count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (position_of(&a->piece, middle) < end) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low - a->at;
}

/* Finds the next chunk that is not empty, and what each delta has in it. *chunk_end becomes 0 if there is none. */
static shdi_fault next_chunk(work *w, uint64_t end, uint64_t *chunk_end) {
    uint64_t first = UINT64_MAX, last = UINT64_MAX;
    for (uint32_t i = 0; i < w->count; i++) {
        addend *a = &w->addends[i];
        shdi_fault fault = advance(a, w->done, end);
        if (fault.code != SHD_OK) {
            w->tensor = &a->cursor.delta->tensor;
            w->section = &w->tensor->index;
            return fault;
        }
        if (a->piece.count != 0) {
            first = shdi_min(first, position_of(&a->piece, a->at));
            last = shdi_min(last, position_of(&a->piece, a->piece.count - 1));
        }
    }
    w->first = first;
    *chunk_end = first == UINT64_MAX ? 0 : shdi_min(last + 1, first + w->chunk);
    for (uint32_t i = 0; i < w->count; i++) {
        w->addends[i].count = count_before(&w->addends[i], *chunk_end);
    }
    return shdi_ok();
}

static shdi_fault open(work *w, addend *a, const shd_delta *delta) {
    const shd_weights *weights = w->weights;
    uint64_t first_block, last_block;
    (void)shd_find_blocks(delta, weights->first_position, weights->first_position + weights->count, &first_block,
                          &last_block);
    a->at = a->count = a->piece.count = 0;
    a->is_last = 0;
    w->tensor = &delta->tensor;
    w->section = &w->tensor->index;
    return shdi_cursor_open(&a->cursor, delta, first_block, last_block);
}

/* Goes through the weights up to position `end`. */
static shdi_fault walk(work *w, const shd_delta *const *deltas, uint64_t end, shdi_fault (*visit)(work *w)) {
    w->done = w->weights->first_position;
    for (uint32_t i = 0; i < w->count; i++) {
        shdi_fault fault = open(w, &w->addends[i], deltas[i]);
        if (fault.code != SHD_OK) {
            return fault;
        }
    }
    for (;;) {
        uint64_t chunk_end;
        shdi_fault fault = next_chunk(w, end, &chunk_end);
        if (fault.code == SHD_OK && chunk_end != 0) {
            fault = visit(w);
        }
        if (fault.code != SHD_OK || chunk_end == 0) {
            return fault;
        }
        w->done = chunk_end;
    }
}

/* ---- The call ---- */

uint64_t shd_sum_scratch_size(uint32_t count) {
    return ALIGNMENT + sizeof(memory) + (uint64_t)count * sizeof(addend);
}

static int check(const shd_delta *delta, double strength, const void *saved, const shd_weights *weights) {
    int code = shdi_check_weights(delta, weights, saved);
    if (code == SHD_OK && delta->tensor.op != SHD_OP_ADD) {
        code = SHD_WRONG_OPERATION;
    }
    if (code == SHD_OK && saved == NULL && delta->tensor.nnz != 0) {
        code = SHD_INVALID_ARGUMENT;
    }
    return code == SHD_OK ? shdi_check_strength(&delta->tensor, strength) : code;
}

/* Chooses the size of a chunk by the average density of the deltas. */
static uint64_t chunk_of(const work *w, const shd_delta *const *deltas) {
    double density = 0;
    for (uint32_t i = 0; i < w->count; i++) {
        const shd_tensor *tensor = &deltas[i]->tensor;
        density += tensor->nnz == 0 ? 0 : (double)tensor->nnz / (double)tensor->numel;
    }
    const double wanted = NONZEROS * (double)w->count;
    const uint64_t chunk = wanted < density * MOST_CHUNK ? (uint64_t)(wanted / density) : MOST_CHUNK;
    return shdi_min(chunk > LEAST_CHUNK ? chunk : LEAST_CHUNK, w->weights->count);
}

static int apply_sum(work *w, const shd_delta *const *deltas, shd_status *status) {
    w->chunk = chunk_of(w, deltas);
    for (uint64_t i = 0; i < w->chunk; i++) {
        w->sum[i] = -0.0f;
    }
    shdi_fault fault = walk(w, deltas, w->weights->first_position + w->weights->count, write_chunk);
    if (fault.code == SHD_OK) {
        return shdi_fail(status, SHD_OK, SHD_NO_TENSOR, 0);
    }
    int code = shdi_fail_in(status, fault, w->tensor, w->section);
    (void)walk(w, deltas, w->done, put_chunk_back); /* meets the fault again, behind all that was written */
    return code;
}

int shd_apply_sum(const shd_delta *const *deltas, const double *strengths, void *const *saved, uint32_t count,
                  const shd_weights *weights, int from_saved, void *scratch, uint64_t scratch_size,
                  shd_status *status) {
    if (weights == NULL || scratch == NULL || (count != 0 && (deltas == NULL || strengths == NULL || saved == NULL))) {
        return shdi_fail(status, SHD_INVALID_ARGUMENT, SHD_NO_TENSOR, 0);
    }
    if (scratch_size < shd_sum_scratch_size(count)) {
        return shdi_fail(status, SHD_BUFFER_TOO_SMALL, SHD_NO_TENSOR, 0);
    }
    memory *m = (memory *)(((uintptr_t)scratch + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    shdi_float_environment environment = shdi_float_enter();
    int code = SHD_OK;
    for (uint32_t i = 0; i < count && code == SHD_OK; i++) {
        code = check(deltas[i], strengths[i], saved[i], weights);
        m->addends[i].strength = (float)strengths[i];
        m->addends[i].saved = saved[i];
        if (code != SHD_OK) {
            (void)shdi_fail(status, code, deltas[i] == NULL ? SHD_NO_TENSOR : deltas[i]->tensor.number, 0);
        }
    }
    if (code == SHD_OK) {
        work w = {.addends = m->addends, .count = count, .from_saved = from_saved, .weights = weights, .sum = m->sum};
        w.size = shd_dtype_size(weights->dtype);
        code = apply_sum(&w, deltas, status);
    }
    shdi_float_leave(environment);
    return code;
}
