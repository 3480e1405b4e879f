/* What attention computes of scores between two products, for one type (see kernels.h): blocks of BLOCK queries and at
 * most CHUNK keys. What goes on into a product is a FACTOR, see panels.h. */

#define BLOCK 32  /* queries that go through all products together, */
#define CHUNK 256 /* with so many keys: what is computed of them stays in the cache */

/* How scores become weights, e^(scale score - less), and the slope of a score by the product that it is of. Scores with a
 * softcap are scaled and capped already: their scale is 1. */
struct NAME(weight_rule) { WIDE scale, softcap, slope; };

/* What goes into the products of the backward pass: gradients of scores along rows, weights and those along columns. */
struct NAME(back_factors) { FACTOR *rows, *weights, *columns; };

/* Sum of x y. */
static WIDE NAME(dot)(const NUMBER *x, const NUMBER *y, int64_t count) {
    WIDE sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += GET(x[i]) * GET(y[i]);
    return sum;
}

#if SUMMED == 2
/* 2^x to within 4e-6, 0 below 2^-149. */
static inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-160));
    const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1));
    return _mm512_scalef_ps(p, whole);
}

#define LOG2_E 1.44269504f

/* The largest of `count` numbers, a multiple of COLUMNS. */
static float NAME(top)(const float *x, int64_t count) {
    __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + 16);
    for (int64_t i = 32; i < count; i += 32) {
        first = _mm512_max_ps(first, _mm512_loadu_ps(x + i));
        second = _mm512_max_ps(second, _mm512_loadu_ps(x + i + 16));
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(first, second));
}

/* The weights of `count` scores, a multiple of COLUMNS, into `factors`; their sum. */
static float NAME(weigh)(float *scores, int64_t count, float scale, float less, FACTOR *factors) {
    const __m512 times = _mm512_set1_ps(scale * LOG2_E), minus = _mm512_set1_ps(less * LOG2_E);
    __m512 first = _mm512_setzero_ps(), second = first;
    for (int64_t i = 0; i < count; i += 32) {
        const __m512 low = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), times, minus));
        const __m512 high = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i + 16), times, minus));
        _mm512_storeu_si512(factors + i / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        first = _mm512_add_ps(first, low), second = _mm512_add_ps(second, high);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(first, second));
}

/* 16 pairs of numbers of two rows, as `order` puts them. */
static inline __m512i paired(__m512 above, __m512 below, __m512i order) {
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(below, above));
}

/* Of scores and of the gradients of their weights (rows, CHUNK): weights e^(scale score - sums), and the gradients of the
 * scores, scale weight (gradient - along), by the slope of a cap. */
static void NAME(weigh_back)(
    int64_t rows, int64_t count, float *scores, float *gradients, const struct NAME(weight_rule) *by, const float *sums,
    const float *along, const struct NAME(back_factors) *out) {
    uint16_t places[32];
    for (int i = 0; i < 32; i++) places[i] = (uint16_t)(i / 2 + i % 2 * 16);
    const __m512i order = _mm512_loadu_si512(places);
    const __m512 times = _mm512_set1_ps(by->scale * LOG2_E), slope = _mm512_set1_ps(by->slope);
    for (int64_t row = 0; row < rows; row += 2)
        for (int64_t i = 0; i < count; i += 16) {
            __m512 w[2], d[2];
            for (int64_t r = 0; r < 2; r++) {
                const __m512 score = _mm512_loadu_ps(scores + (row + r) * CHUNK + i);
                w[r] = power_of_two(_mm512_fmsub_ps(score, times, _mm512_set1_ps(sums[row + r] * LOG2_E)));
                d[r] = _mm512_loadu_ps(gradients + (row + r) * CHUNK + i);
                d[r] = _mm512_mul_ps(_mm512_sub_ps(d[r], _mm512_set1_ps(along[row + r])), _mm512_mul_ps(w[r], slope));
                if (by->softcap > 0) {
                    __m512 share = _mm512_div_ps(score, _mm512_set1_ps(by->softcap));
                    share = _mm512_max_ps(share, _mm512_set1_ps(-1)); /* -inf of a key that is not seen: w is 0 */
                    d[r] = _mm512_fnmadd_ps(_mm512_mul_ps(share, share), d[r], d[r]);
                }
                FACTOR *into = out->rows + (row + r) * JOINED(CHUNK) + i / 2;
                _mm256_storeu_si256((__m256i *)into, (__m256i)_mm512_cvtneps_pbh(d[r]));
            }
            _mm512_storeu_si512(out->weights + row / 2 * CHUNK + i, paired(w[0], w[1], order));
            _mm512_storeu_si512(out->columns + row / 2 * CHUNK + i, paired(d[0], d[1], order));
        }
}
#undef LOG2_E
#else /* a factor is a number: those of scores and gradients are computed where they stand */
static WIDE NAME(top)(const WIDE *x, int64_t count) {
    WIDE tops[COLUMNS], top = -INFINITY;
    for (int64_t c = 0; c < COLUMNS; c++) tops[c] = x[c];
    for (int64_t i = COLUMNS; i < count; i += COLUMNS)
        for (int64_t c = 0; c < COLUMNS; c++) tops[c] = x[i + c] > tops[c] ? x[i + c] : tops[c];
    for (int64_t c = 0; c < COLUMNS; c++) top = tops[c] > top ? tops[c] : top;
    return top;
}

static WIDE NAME(weigh)(WIDE *scores, int64_t count, WIDE scale, WIDE less, FACTOR *factors) {
    WIDE sums[COLUMNS] = {0}, sum = 0;
    for (int64_t i = 0; i < count; i += COLUMNS)
        for (int64_t c = 0; c < COLUMNS; c++) sums[c] += scores[i + c] = EXP(scale * scores[i + c] - less);
    for (int64_t c = 0; c < COLUMNS; c++) sum += sums[c];
    return sum;
}

static void NAME(weigh_back)(
    int64_t rows, int64_t count, WIDE *scores, WIDE *gradients, const struct NAME(weight_rule) *by, const WIDE *sums,
    const WIDE *along, const struct NAME(back_factors) *out) {
    for (int64_t row = 0; row < rows; row++) {
        WIDE *w = scores + row * CHUNK, *d = gradients + row * CHUNK;
        if (by->softcap > 0)
            for (int64_t i = 0; i < count; i++) d[i] = (d[i] - along[row]) * NAME(cap_slope)(w[i], by->softcap);
        else
            for (int64_t i = 0; i < count; i++) d[i] -= along[row];
        NAME(weigh)(w, count, by->scale, sums[row], 0);
        for (int64_t i = 0; i < count; i++) d[i] *= by->slope * w[i];
    }
}
#endif
