/* Products of few rows with plain bfloat16 weights, on processors that multiply pairs of bfloat16 (AVX512-BF16). */

#include <immintrin.h>

#define OUTS 4 /* outputs whose sums are in registers together, for as many rows */
#define MOST_LAYERS 8

/* The sums of 16 vectors: lane i has that of vector i. */
static inline __attribute__((always_inline)) __m512 totals(const __m512 *of) {
    __m512 rows[OUTS];
    for (int64_t i = 0; i < OUTS; i++) {
        const __m512 *x = of + OUTS * i;
        const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
        const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
        rows[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    const __m512 a = _mm512_add_ps(
        _mm512_shuffle_f32x4(rows[0], rows[1], 0x44), _mm512_shuffle_f32x4(rows[0], rows[1], 0xee));
    const __m512 b = _mm512_add_ps(
        _mm512_shuffle_f32x4(rows[2], rows[3], 0x44), _mm512_shuffle_f32x4(rows[2], rows[3], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* Of `rows` rows, at most OUTS, OUTS outputs: y = x W^T + b, rounded once; `bias` has OUTS numbers. */
static inline __attribute__((always_inline)) void few_rows(
    int64_t rows, const uint16_t *x, const uint16_t *weight, int64_t width, __m512 bias, int64_t outs, uint16_t *y) {
    __m512 sums[OUTS * OUTS];
    for (int64_t i = 0; i < OUTS * OUTS; i++) sums[i] = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 32) {
        __m512bh given[OUTS];
        for (int64_t row = 0; row < rows; row++) given[row] = (__m512bh)_mm512_loadu_si512(x + row * width + i);
        for (int64_t out = 0; out < OUTS; out++) {
            const __m512bh w = (__m512bh)_mm512_loadu_si512(weight + out * width + i);
            for (int64_t row = 0; row < rows; row++)
                sums[OUTS * row + out] = _mm512_dpbf16_ps(sums[OUTS * row + out], given[row], w);
        }
    }
    uint16_t rounded[OUTS * OUTS];
    _mm256_storeu_si256((__m256i *)rounded, (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(totals(sums), bias)));
    for (int64_t row = 0; row < rows; row++) memcpy(y + row * outs, rounded + OUTS * row, OUTS * sizeof *y);
}

struct few_rows_call_bfloat16 {
    const uint16_t *x;                    /* (rows, width), one row at least, the width a multiple of 32 */
    uint16_t *y;                          /* (rows, outs) */
    const int64_t *firsts;                /* (layers): the first output of each, a multiple of OUTS */
    const uint16_t *bias;                 /* (outs), or null */
    const uint16_t *weights[MOST_LAYERS]; /* (., width) each */
    int64_t rows, width, outs, layers;
};

/* OUTS outputs each, of layers whose outputs lie side by side: y = x W^T + b; the weights of the next are asked for
 * meanwhile. */
void few_rows_bfloat16(int64_t begin, int64_t end, const struct few_rows_call_bfloat16 *c) {
    const int64_t rows = c->rows, width = c->width, outs = c->outs;
    const int64_t *firsts = c->firsts, passes = (rows + OUTS - 1) / OUTS, share = OUTS * width / passes;
    for (int64_t out = OUTS * begin; out < OUTS * end; out += OUTS) {
        int64_t layer = c->layers - 1;
        while (firsts[layer] > out) layer--;
        const uint16_t *weight = c->weights[layer] + (out - firsts[layer]) * width;
        __m512 bias = _mm512_setzero_ps();
        if (c->bias) {
            float numbers[OUTS];
            for (int64_t i = 0; i < OUTS; i++) numbers[i] = get_bfloat16(c->bias[out + i]);
            bias = _mm512_broadcast_f32x4(_mm_loadu_ps(numbers));
        }
        for (int64_t row = 0; row < rows; row += OUTS) {
            const uint16_t *x = c->x + row * width, *next = weight + OUTS * width + row / OUTS * share;
            uint16_t *y = c->y + row * outs + out;
            for (int64_t i = 0; i < share; i += 32) __builtin_prefetch(next + i);
            if (rows - row >= 4) few_rows(4, x, weight, width, bias, outs, y);
            else if (rows - row == 3) few_rows(3, x, weight, width, bias, outs, y);
            else if (rows - row == 2) few_rows(2, x, weight, width, bias, outs, y);
            else few_rows(1, x, weight, width, bias, outs, y);
        }
    }
}

#undef OUTS
#undef MOST_LAYERS
