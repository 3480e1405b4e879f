/* What torch would do in several passes over a tensor on a CPU, each in one pass.
 *
 * Every kernel computes items [begin, end) of a call (rows, tokens or heads), so that torch's threads can share them,
 * and no item's result depends on how they are shared. Numbers are float, double or bfloat16; bfloat16 is computed in
 * float and rounded to nearest even, where torch and transformers round. `kernels.h` has the kernels, once a type.
 *
 * The arguments of a kernel are a struct beside it; a class of Python has the same fields in the same order. Strides are
 * numbers, not bytes.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum activation { SILU, GELU_TANH };

/* Bytes of the processor's widest vector, and how many rows and vectors of a product's sums its registers hold. Wider
 * vectors than it has would go through memory. */
#if defined __AVX512F__
#define VECTOR 64
#define TILE_ROWS 8
#define TILE_PARTS PARTS
#elif defined __AVX__
#define VECTOR 32
#define TILE_ROWS 4
#define TILE_PARTS 2
#else
#define VECTOR 16
#define TILE_ROWS 4
#define TILE_PARTS 2
#endif

/* e^x to within 2 ulp (Cephes' expf: Cody-Waite reduction, polynomial of degree 5), and 0 below the smallest normal
 * number; at most e^88. */
static inline float exponential(float x) {
    float bounded = x < -88.0f ? -88.0f : x;
    bounded = bounded > 88.0f ? 88.0f : bounded;
    const float n = rintf(bounded * 1.44269504f); /* -127, which stands for 0, to 127 */
    const float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { int32_t bits; float number; } power = {((int32_t)n + 127) << 23};
    return (p * r * r + r + 1.0f) * power.number;
}

static inline float get_bfloat16(uint16_t x) {
    union { uint32_t bits; float number; } wide = {(uint32_t)x << 16};
    return wide.number;
}

static inline uint16_t put_bfloat16(float x) {
    union { float number; uint32_t bits; } wide = {x};
    uint32_t nearest = (wide.bits + 0x7fff + (wide.bits >> 16 & 1)) >> 16;
    return x == x ? (uint16_t)nearest : 0x7fc0;
}

static inline float get_float(float x) { return x; }
static inline float put_float(float x) { return x; }
static inline double get_double(double x) { return x; }
static inline double put_double(double x) { return x; }

#define NUMBER uint16_t
#define WIDE float
#define EXP exponential
#define NAME(kernel) kernel##_bfloat16
#ifdef __AVX512BF16__
#include <immintrin.h>
#define FACTOR uint32_t
#define SUMMED 2
#else
#define FACTOR float
#define SUMMED 1
#endif
#include "kernels.h"

#define NUMBER float
#define WIDE float
#define EXP exponential
#define NAME(kernel) kernel##_float
#define FACTOR float
#define SUMMED 1
#include "kernels.h"

#define NUMBER double
#define WIDE double
#define EXP exp
#define NAME(kernel) kernel##_double
#define FACTOR double
#define SUMMED 1
#include "kernels.h"

#ifdef __AVX512BF16__
#include "products.h"
#endif
