/* Applying a delta to weights, reverting it, and fingerprints (FORMAT.md, section 6). */
#include "bytes.h"
#include "floats.h"
#include "index.h"
#include "operations.h"
#include "values.h"
#include "values_ulp.h"
#include "weights.h"

/* A visitor gets at most this many elements at a time. */
#define RUN 64u

/* With each element it reads, a visitor prefetches the one this many nonzeros later. Memory takes a few microseconds
 * to answer, and serves a steady stream of requests better than bursts. */
#define AHEAD 64u

typedef struct work work;

/* Does its work on the elements of `r`, and prefetches those of `ahead`, which has as many. */
typedef shdi_fault (*visit_fn)(work *w, const shdi_run *r, const shdi_run *ahead);

/* What the visitors need. */
struct work {
    const shd_delta *delta;
    uint8_t *weights;
    uint8_t *saved;          /* receives what is overwritten; may be NULL */
    const uint8_t *original; /* what a revert puts back */
    uint64_t end_rank;       /* the walk skips ranks from here on */
    uint64_t done_rank;      /* the walk has visited the ranks below */
    uint64_t sum;
    uint64_t first_position; /* of the weight buffer */
    float strength;
    uint32_t size; /* of an element */
    int dtype;
    visit_fn visit;
    shdi_ulp ulp; /* of a delta with shifts */
};

/* ---- Visitors ---- */

typedef union batch {
    uint8_t bytes[RUN * 8];
    uint16_t u16[RUN];
    uint32_t u32[RUN];
    uint64_t u64[RUN];
} batch;

static uint64_t element_bits(const uint8_t *from, uint32_t size, uint64_t i) {
    switch (size) {
    case 1: return from[i];
    case 2: return shdi_load16(from + 2 * i);
    case 4: return shdi_load32(from + 4 * i);
    case 8: return shdi_load64(from + 8 * i);
    default: return 0; /* callers refuse other sizes */
    }
}

static void save(const work *w, const shdi_run *r, const shdi_run *ahead, batch *old) {
    shdi_gather(w->weights, w->size, r, ahead, old->bytes);
    if (w->saved != NULL) {
        memcpy(w->saved + r->rank * w->size, old->bytes, (size_t)r->count * w->size);
    }
}

static shdi_fault visit_add(work *w, const shdi_run *r, const shdi_run *ahead) {
    float values[RUN];
    batch old, new;
    shdi_fault fault = shdi_values_decode(w->delta, r->rank, r->count, values);
    if (fault.code != SHD_OK) {
        return fault;
    }
    save(w, r, ahead, &old);
    int code = shdi_add(shdi_kernels_of(w->delta), w->dtype, &new, &old, values, w->strength, r->count);
    if (code != SHD_OK) {
        return shdi_fault_at(code, 0);
    }
    shdi_scatter(w->weights, w->size, r, new.bytes);
    return shdi_ok();
}

static shdi_fault visit_set(work *w, const shdi_run *r, const shdi_run *ahead) {
    batch old;
    save(w, r, ahead, &old);
    shdi_scatter(w->weights, w->size, r, w->delta->values + r->rank * w->size);
    return shdi_ok();
}

/* The shifted elements of a run, to `new`. */
static shdi_fault shifted(work *w, const shdi_run *r, const batch *old, batch *new) {
    batch shifts;
    shdi_fault fault = shdi_ulp_read(&w->ulp, r->rank, r->count, shifts.bytes);
    return fault.code != SHD_OK
               ? fault
               : shdi_fault_at(shdi_shift(w->dtype, new, old, shifts.bytes, r->count), 0);
}

static shdi_fault visit_shift(work *w, const shdi_run *r, const shdi_run *ahead) {
    batch old, new;
    save(w, r, ahead, &old);
    shdi_fault fault = shifted(w, r, &old, &new);
    if (fault.code == SHD_OK) {
        shdi_scatter(w->weights, w->size, r, new.bytes);
    }
    return fault;
}

static shdi_fault visit_range(work *w, const shdi_run *r, const shdi_run *ahead) {
    batch old, new;
    shdi_gather(w->weights, w->size, r, ahead, old.bytes);
    return shifted(w, r, &old, &new);
}

static shdi_fault visit_revert(work *w, const shdi_run *r, const shdi_run *ahead) {
    shdi_prefetch(w->weights, w->size, ahead);
    shdi_scatter(w->weights, w->size, r, w->original + r->rank * w->size);
    return shdi_ok();
}

static shdi_fault visit_fingerprint(work *w, const shdi_run *r, const shdi_run *ahead) {
    batch now;
    shdi_gather(w->weights, w->size, r, ahead, now.bytes);
    for (uint32_t i = 0; i < r->count; i++) {
        w->sum += shdi_mix(w->first_position + r->shift + r->offset[i], element_bits(now.bytes, w->size, i));
    }
    return shdi_ok();
}

/* ---- Walking ---- */

/* The part of a piece that lies in the buffer, as a run. This is where positions are checked before they are used. */
static shdi_run clip(const shdi_piece *piece, const shd_weights *weights, uint64_t end_rank) {
    shdi_run r = {piece->base - weights->first_position, piece->rank, piece->offset, piece->count};
    r.count = (uint32_t)shdi_min(r.count, end_rank - shdi_min(end_rank, r.rank));
    /* Positions increase, so those outside are at the ends. */
    while (r.count > 0 && piece->base + r.offset[0] < weights->first_position) {
        r.offset++;
        r.rank++;
        r.count--;
    }
    while (r.count > 0 && r.shift + r.offset[r.count - 1] >= weights->count) {
        r.count--;
    }
    return r;
}

/* Part of a run: up to `count` elements from number `first` on. */
static shdi_run part_of(const shdi_run *r, uint32_t first, uint32_t count) {
    uint32_t start = (uint32_t)shdi_min(first, r->count);
    shdi_run part = {r->shift, r->rank + start, r->offset + start, (uint32_t)shdi_min(count, r->count - start)};
    return part;
}

/* Visits all of a run in parts, and prefetches what comes later in it or in the next. */
static shdi_fault visit_parts(work *w, const shdi_run *this, const shdi_run *next) {
    shdi_run part;
    for (uint32_t first = 0; first < this->count; first += part.count) {
        uint32_t later = first + AHEAD;
        shdi_run ahead = later < this->count ? part_of(this, later, RUN) : part_of(next, later - this->count, RUN);
        part = part_of(this, first, ahead.count != 0 ? ahead.count : RUN);
        if (ahead.count < part.count) {
            ahead = part; /* nothing comes; a prefetch of what is in the cache costs nothing */
        }
        ahead.count = part.count;
        shdi_fault fault = w->visit(w, &part, &ahead);
        if (fault.code != SHD_OK) {
            return fault;
        }
        w->done_rank = part.rank + part.count;
    }
    return shdi_ok();
}

/* Visits blocks [first_block, last_block), and decodes one piece ahead. *section becomes the one that a fault is in. */
static shdi_fault walk(work *w, const shd_weights *weights, uint64_t first_block, uint64_t last_block,
                       const shd_section **section) {
    shdi_cursor cursor;
    shdi_piece pieces[2];
    *section = &w->delta->tensor.index;
    shdi_fault fault = shdi_cursor_open(&cursor, w->delta, first_block, last_block);
    if (fault.code == SHD_OK) {
        fault = shdi_cursor_next(&cursor, &pieces[0]);
    }
    if (fault.code != SHD_OK) {
        return fault;
    }
    shdi_run this = clip(&pieces[0], weights, w->end_rank);
    shdi_run start = part_of(&this, 0, AHEAD);
    shdi_prefetch(w->weights, w->size, &start);
    for (uint32_t turn = 0; pieces[turn].count != 0; turn ^= 1) {
        fault = shdi_cursor_next(&cursor, &pieces[turn ^ 1]);
        if (fault.code != SHD_OK) {
            return fault;
        }
        shdi_run next = clip(&pieces[turn ^ 1], weights, w->end_rank);
        fault = visit_parts(w, &this, &next);
        if (fault.code != SHD_OK) {
            *section = &w->delta->tensor.values;
            return fault;
        }
        this = next;
    }
    return shdi_ok();
}

/* ---- Calls ---- */

/* Makes the checks that all calls make, and fills in what all visitors need. */
static int prepare(work *w, const shd_delta *delta, const shd_weights *weights, uint64_t first_block,
                   uint64_t last_block, const void *saved) {
    int code = shdi_check_weights(delta, weights, saved);
    if (code == SHD_OK && (first_block > last_block || last_block > delta->block_count)) {
        code = SHD_INVALID_ARGUMENT;
    }
    if (code != SHD_OK) {
        return code;
    }
    memset(w, 0, sizeof *w);
    w->delta = delta;
    w->weights = weights->data;
    w->first_position = weights->first_position;
    w->dtype = weights->dtype;
    w->size = shd_dtype_size(weights->dtype);
    w->end_rank = delta->tensor.nnz;
    return SHD_OK;
}

static int run_walk(work *w, const shd_weights *weights, uint64_t first_block, uint64_t last_block,
                    shd_status *status) {
    const shd_section *section;
    shdi_fault fault = walk(w, weights, first_block, last_block, &section);
    return shdi_fail_in(status, fault, &w->delta->tensor, section);
}

static uint32_t number_of(const shd_delta *delta) { return delta == NULL ? SHD_NO_TENSOR : delta->tensor.number; }

/* The visitor that applies an op. */
static int visitor_of(uint32_t op, visit_fn *visit) {
    const shdi_operation *operation = shdi_operation_of(op);
    if (operation == NULL) {
        return SHD_UNKNOWN_OP;
    }
    if (!shdi_is_in_result(operation)) {
        return SHD_WRONG_OPERATION; /* it changes no elements */
    }
    *visit = operation->adds ? visit_add : operation->shifts ? visit_shift : visit_set;
    return SHD_OK;
}

static int open_shifts(work *w, shd_status *status) {
    return shdi_fail_in(status, shdi_ulp_open(&w->ulp, w->delta), &w->delta->tensor, &w->delta->tensor.values);
}

int shd_apply(const shd_delta *delta, const shd_weights *weights, double strength, uint64_t first_block,
              uint64_t last_block, void *saved, shd_status *status) {
    work w;
    int code = prepare(&w, delta, weights, first_block, last_block, saved);
    shdi_float_environment environment = shdi_float_enter();
    visit_fn visit = NULL;
    if (code == SHD_OK) {
        code = shdi_check_strength(&delta->tensor, strength);
    }
    if (code == SHD_OK) {
        code = visitor_of(delta->tensor.op, &visit);
    }
    if (code != SHD_OK) {
        shdi_float_leave(environment);
        return shdi_fail(status, code, number_of(delta), 0);
    }
    w.saved = saved;
    w.strength = (float)strength;
    if (visit == visit_shift) {
        code = open_shifts(&w, status);
        if (code == SHD_OK && saved == NULL) { /* what is overwritten is lost, so nothing may fail later */
            w.visit = visit_range;
            code = run_walk(&w, weights, first_block, last_block, status);
        }
        if (code != SHD_OK) {
            shdi_float_leave(environment);
            return code;
        }
    }
    w.visit = visit;
    code = run_walk(&w, weights, first_block, last_block, status);
    if (code != SHD_OK && saved != NULL) {
        w.original = saved;
        w.visit = visit_revert;
        w.end_rank = w.done_rank;
        (void)run_walk(&w, weights, first_block, last_block, NULL);
    }
    shdi_float_leave(environment);
    return code;
}

int shd_revert(const shd_delta *delta, const shd_weights *weights, uint64_t first_block, uint64_t last_block,
               const void *saved, shd_status *status) {
    work w;
    int code = saved == NULL ? SHD_INVALID_ARGUMENT : prepare(&w, delta, weights, first_block, last_block, saved);
    if (code != SHD_OK) {
        return shdi_fail(status, code, number_of(delta), 0);
    }
    w.original = saved;
    w.visit = visit_revert;
    return run_walk(&w, weights, first_block, last_block, status);
}

int shd_fingerprint(const shd_delta *delta, const shd_weights *weights, uint64_t first_block, uint64_t last_block,
                    uint64_t *fingerprint, shd_status *status) {
    work w;
    int code = fingerprint == NULL ? SHD_INVALID_ARGUMENT : prepare(&w, delta, weights, first_block, last_block, NULL);
    if (code != SHD_OK) {
        return shdi_fail(status, code, number_of(delta), 0);
    }
    w.visit = visit_fingerprint;
    code = run_walk(&w, weights, first_block, last_block, status);
    *fingerprint = w.sum;
    return code;
}

int shd_fingerprint_elements(const int64_t *positions, uint64_t first_position, const void *elements, uint64_t count,
                             uint32_t element_size, uint64_t *fingerprint) {
    if (fingerprint == NULL || (elements == NULL && count != 0)) {
        return SHD_INVALID_ARGUMENT;
    }
    if (!shdi_size_is_known(element_size)) {
        return SHD_WRONG_DTYPE;
    }
    if (!shdi_is_aligned(elements, element_size)) {
        return SHD_MISALIGNED;
    }
    uint64_t sum = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t position = positions == NULL ? first_position + i : (uint64_t)positions[i];
        sum += shdi_mix(position, element_bits(elements, element_size, i));
    }
    *fingerprint = sum;
    return SHD_OK;
}
