/* The arithmetic of section 6 of FORMAT.md, the long way. */
#ifndef ARITHMETIC_H
#define ARITHMETIC_H

#include "support.h"

/* A float and its bits. */
float float_of(uint32_t bits);
uint32_t bits_of(float f);

/* The element of F32, F16 or BF16 that has these bits, and the other way round: rounded. */
float widen(int dtype, uint32_t bits);
uint32_t narrow(int dtype, float y);

/* The bits of weight + sum, and of weight + alpha * value. */
uint32_t add_sum_to(int dtype, uint32_t weight, float sum);
uint32_t add_to(int dtype, uint32_t weight, float value, float alpha);

/* Bits of weight number i. */
uint32_t element(const void *weights, uint32_t size, uint64_t i);

/* Random weights, NaNs, infinities and denormals among them. */
void fill_with_anything(random_state *r, uint8_t *weights, uint64_t count, uint32_t size, int dtype);

#endif
