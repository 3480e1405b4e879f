/* The kernels, for one type: NUMBER is read and written, WIDE computed in, EXP its exponential, NAME their names. */

#define GET NAME(get)
#define PUT NAME(put)
#define ROUND(x) GET(PUT(x))
#define LANES ((int64_t)(64 / sizeof(WIDE))) /* of a vector */

typedef WIDE NAME(vector) __attribute__((vector_size(64), aligned(sizeof(WIDE)), may_alias));
typedef WIDE NAME(half) __attribute__((vector_size(32), aligned(sizeof(WIDE)), may_alias));
typedef WIDE NAME(quarter) __attribute__((vector_size(16), aligned(sizeof(WIDE)), may_alias));

/* Rows: y = w x / sqrt(mean(x^2) + by[0]), the quotient rounded before the weight; by a WIDE weight, rounded once.
 * at: x (rows, width), weight (width), y, scale (rows) WIDE; of: width, whether the weight is WIDE. */
void NAME(norm)(int64_t begin, int64_t end, const struct call *c) {
    const int64_t width = c->of[0];
    const NUMBER *weight = c->at[1];
    const WIDE *wide = c->at[1];
    for (int64_t row = begin; row < end; row++) {
        const NUMBER *x = (const NUMBER *)c->at[0] + row * width;
        NUMBER *y = (NUMBER *)c->at[2] + row * width;
        WIDE squares = 0;
        #pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += GET(x[i]) * GET(x[i]);
        const WIDE scale = 1 / (WIDE)sqrt(squares / width + (WIDE)c->by[0]);
        ((WIDE *)c->at[3])[row] = scale;
        if (c->of[1]) {
            #pragma omp simd
            for (int64_t i = 0; i < width; i++) y[i] = PUT(GET(x[i]) * scale * wide[i]);
        } else {
            #pragma omp simd
            for (int64_t i = 0; i < width; i++) y[i] = PUT(ROUND(GET(x[i]) * scale) * GET(weight[i]));
        }
    }
}

/* Rows: dx = scale (w dy - x scale^2 mean(w dy x)).
 * at: dy (rows, width), x, weight (width), scale (rows) WIDE, dx; of: width, whether the weight is WIDE. */
void NAME(norm_back)(int64_t begin, int64_t end, const struct call *c) {
    const int64_t width = c->of[0];
    const NUMBER *narrow = c->at[2];
    const WIDE *wide = c->at[2];
    WIDE weight[width];
    for (int64_t i = 0; i < width; i++) weight[i] = c->of[1] ? wide[i] : GET(narrow[i]);
    for (int64_t row = begin; row < end; row++) {
        const NUMBER *dy = (const NUMBER *)c->at[0] + row * width, *x = (const NUMBER *)c->at[1] + row * width;
        const WIDE scale = ((const WIDE *)c->at[3])[row];
        NUMBER *dx = (NUMBER *)c->at[4] + row * width;
        WIDE along = 0;
        #pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < width; i++) along += GET(dy[i]) * weight[i] * GET(x[i]);
        along *= scale * scale / width;
        #pragma omp simd
        for (int64_t i = 0; i < width; i++) dx[i] = PUT(scale * (GET(dy[i]) * weight[i] - along * GET(x[i])));
    }
}

/* x / (1 + e^-x), or GELU by its tanh: x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3). */
static inline WIDE NAME(share)(WIDE x, int64_t activation) {
    const WIDE twice = (WIDE)1.5957691216057308 * (x + (WIDE)0.044715 * x * x * x);
    return 1 / (1 + EXP(activation == SILU ? -x : -twice));
}

static inline WIDE NAME(share_slope)(WIDE x, WIDE share, int64_t activation) {
    const WIDE twice = (WIDE)1.5957691216057308 * (1 + 3 * (WIDE)0.044715 * x * x);
    return share * (1 - share) * (activation == SILU ? 1 : twice);
}

/* Rows: y = a(gate) up, a(gate) rounded. at: gate_up (rows, 2 width), y (rows, width); of: width, activation. */
void NAME(gate)(int64_t begin, int64_t end, const struct call *c) {
    const int64_t width = c->of[0], activation = c->of[1];
    for (int64_t row = begin; row < end; row++) {
        const NUMBER *gate = (const NUMBER *)c->at[0] + 2 * row * width, *up = gate + width;
        NUMBER *y = (NUMBER *)c->at[1] + row * width;
        #pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const WIDE x = GET(gate[i]);
            y[i] = PUT(ROUND(x * NAME(share)(x, activation)) * GET(up[i]));
        }
    }
}

/* Rows: dgate = dy up a'(gate), dup = dy a(gate).
 * at: dy (rows, width), gate_up (rows, 2 width), dgate_up; of: width, activation. */
void NAME(gate_back)(int64_t begin, int64_t end, const struct call *c) {
    const int64_t width = c->of[0], activation = c->of[1];
    for (int64_t row = begin; row < end; row++) {
        const NUMBER *dy = (const NUMBER *)c->at[0] + row * width;
        const NUMBER *gate = (const NUMBER *)c->at[1] + 2 * row * width, *up = gate + width;
        NUMBER *dgate = (NUMBER *)c->at[2] + 2 * row * width, *dup = dgate + width;
        #pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const WIDE x = GET(gate[i]), d = GET(dy[i]), share = NAME(share)(x, activation);
            dup[i] = PUT(d * x * share);
            dgate[i] = PUT(d * GET(up[i]) * (share + x * NAME(share_slope)(x, share, activation)));
        }
    }
}

/* One head: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), every product rounded; what is behind both halves stays. */
static inline void NAME(turn)(
    const NUMBER *x, const NUMBER *cosine, const NUMBER *sine, WIDE direction, int64_t half, int64_t width, NUMBER *y) {
    #pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const WIDE a = GET(x[i]), b = GET(x[half + i]), k = GET(cosine[i]), s = direction * GET(sine[i]);
        y[i] = PUT(ROUND(a * k) - ROUND(b * s));
        y[half + i] = PUT(ROUND(b * k) + ROUND(a * s));
    }
    if (2 * half < width) memcpy(y + 2 * half, x + 2 * half, (size_t)(width - 2 * half) * sizeof *x);
}

/* Tokens: `turn` of each head; by[0] -1: back. at: x, cos (tokens, angles), sin, y; of: heads, width of one, half of
 * what is turned of it, numbers from one token of x to the next, the same of y, angles. */
void NAME(rotate)(int64_t begin, int64_t end, const struct call *c) {
    const int64_t heads = c->of[0], width = c->of[1];
    for (int64_t token = begin; token < end; token++) {
        const NUMBER *cosine = (const NUMBER *)c->at[1] + token * c->of[5];
        const NUMBER *sine = (const NUMBER *)c->at[2] + token * c->of[5];
        for (int64_t head = 0; head < heads; head++) {
            const NUMBER *x = (const NUMBER *)c->at[0] + token * c->of[3] + head * width;
            NUMBER *y = (NUMBER *)c->at[3] + token * c->of[4] + head * width;
            NAME(turn)(x, cosine, sine, (WIDE)c->by[0], c->of[2], width, y);
        }
    }
}

/* Rows: logits become the gradient of -log softmax(logits)[target], softmax - onehot.
 * at: logits (rows, classes), targets (rows) int64, losses (rows) WIDE; of: classes. */
void NAME(nll)(int64_t begin, int64_t end, const struct call *c) {
    const int64_t classes = c->of[0];
    for (int64_t row = begin; row < end; row++) {
        NUMBER *logits = (NUMBER *)c->at[0] + row * classes;
        const int64_t target = ((const int64_t *)c->at[1])[row];
        WIDE top = -INFINITY, sum = 0;
        #pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < classes; i++) top = GET(logits[i]) > top ? GET(logits[i]) : top;
        #pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < classes; i++) sum += EXP(GET(logits[i]) - top);
        const WIDE chosen = GET(logits[target]) - top;
        #pragma omp simd
        for (int64_t i = 0; i < classes; i++) logits[i] = PUT(EXP(GET(logits[i]) - top) / sum);
        logits[target] = PUT(EXP(chosen) / sum - 1);
        ((WIDE *)c->at[2])[row] = (WIDE)log(sum) - chosen;
    }
}

/* softcap tanh(score / softcap) of a score (arXiv 2408.00118). */
static inline WIDE NAME(capped)(WIDE score, WIDE softcap) {
    return softcap - 2 * softcap / (EXP(2 * score / softcap) + 1);
}

/* The derivative of `capped` where it gave `capped`; 0 where that is -inf, which stands for a key that is not seen. */
static inline WIDE NAME(cap_slope)(WIDE capped, WIDE softcap) {
    const WIDE share = capped / softcap;
    return share < -1 ? 0 : 1 - share * share;
}

#define TILE 8     /* rows of a product whose sums are in registers together, */
#define COLUMNS 32 /* with so many columns */
#define PARTS ((int64_t)COLUMNS / LANES)

/* out (rows, parts vectors) = or += a b, TILE and PARTS of them at most, and inlined as constants: a's number (i, k) is
 * a[i down + k across], rows of b lie `apart` numbers from each other, those of out `width`. */
static inline __attribute__((always_inline)) void NAME(tile)(
    int64_t rows, int64_t parts, int64_t inner, const WIDE *a, int64_t down, int64_t across, const WIDE *b, int64_t apart,
    WIDE *out, int64_t width, int adds) {
    NAME(vector) sums[TILE][PARTS];
    for (int64_t i = 0; i < rows; i++)
        for (int64_t p = 0; p < parts; p++)
            sums[i][p] = adds ? *(NAME(vector) *)(out + i * width + p * LANES) : (NAME(vector)){0};
    for (int64_t k = 0; k < inner; k++, b += apart, a += across)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t p = 0; p < parts; p++) sums[i][p] += a[i * down] * *(const NAME(vector) *)(b + p * LANES);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t p = 0; p < parts; p++) *(NAME(vector) *)(out + i * width + p * LANES) = sums[i][p];
}

#include "attention.h"
#include "decoding.h"

#undef TILE
#undef COLUMNS
#undef PARTS

#undef GET
#undef PUT
#undef ROUND
#undef LANES
#undef NUMBER
#undef WIDE
#undef EXP
#undef NAME
