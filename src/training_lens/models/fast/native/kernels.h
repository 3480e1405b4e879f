/* The kernels, for one type: NUMBER is read and written, WIDE computed in, EXP its exponential, NAME their names; for
 * FACTOR and SUMMED see panels.h. */

#define GET NAME(get)
#define PUT NAME(put)
#define ROUND(x) GET(PUT(x))
#define LANES ((int64_t)(VECTOR / sizeof(WIDE))) /* of a vector */

typedef WIDE NAME(vector) __attribute__((vector_size(VECTOR), aligned(sizeof(WIDE)), may_alias));
typedef WIDE NAME(half) __attribute__((vector_size(32), aligned(sizeof(WIDE)), may_alias));
typedef WIDE NAME(quarter) __attribute__((vector_size(16), aligned(sizeof(WIDE)), may_alias));

struct NAME(norm_call) {
    const NUMBER *x;    /* (rows, width) */
    const void *weight; /* (width), WIDE or NUMBER */
    NUMBER *y;
    WIDE *scale; /* (rows) */
    int64_t width, has_wide_weight;
    double epsilon;
};

/* Rows: y = w x / sqrt(mean(x^2) + epsilon), the quotient rounded before the weight; by a WIDE weight, rounded once. */
void NAME(norm)(int64_t begin, int64_t end, const struct NAME(norm_call) *c) {
    const int64_t width = c->width;
    const NUMBER *weight = c->weight;
    const WIDE *wide = c->weight;
    for (int64_t row = begin; row < end; row++) {
        const NUMBER *x = c->x + row * width;
        NUMBER *y = c->y + row * width;
        WIDE squares = 0;
        #pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += GET(x[i]) * GET(x[i]);
        const WIDE scale = 1 / (WIDE)sqrt(squares / width + (WIDE)c->epsilon);
        c->scale[row] = scale;
        if (c->has_wide_weight) {
            #pragma omp simd
            for (int64_t i = 0; i < width; i++) y[i] = PUT(GET(x[i]) * scale * wide[i]);
        } else {
            #pragma omp simd
            for (int64_t i = 0; i < width; i++) y[i] = PUT(ROUND(GET(x[i]) * scale) * GET(weight[i]));
        }
    }
}

struct NAME(norm_back_call) {
    const NUMBER *dy, *x;
    const void *weight;
    const WIDE *scale; /* what `norm` gave */
    NUMBER *dx;
    int64_t width, has_wide_weight;
};

/* Rows: dx = scale (w dy - x scale^2 mean(w dy x)). */
void NAME(norm_back)(int64_t begin, int64_t end, const struct NAME(norm_back_call) *c) {
    const int64_t width = c->width;
    const NUMBER *narrow = c->weight;
    const WIDE *wide = c->weight;
    WIDE weight[width];
    for (int64_t i = 0; i < width; i++) weight[i] = c->has_wide_weight ? wide[i] : GET(narrow[i]);
    for (int64_t row = begin; row < end; row++) {
        const NUMBER *dy = c->dy + row * width, *x = c->x + row * width;
        const WIDE scale = c->scale[row];
        NUMBER *dx = c->dx + row * width;
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

struct NAME(gate_call) {
    const NUMBER *gate_up; /* (rows, 2 width) */
    NUMBER *y;             /* (rows, width) */
    int64_t width, activation;
};

/* Rows: y = a(gate) up, a(gate) rounded. */
void NAME(gate)(int64_t begin, int64_t end, const struct NAME(gate_call) *c) {
    const int64_t width = c->width, activation = c->activation;
    for (int64_t row = begin; row < end; row++) {
        const NUMBER *gate = c->gate_up + 2 * row * width, *up = gate + width;
        NUMBER *y = c->y + row * width;
        #pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const WIDE x = GET(gate[i]);
            y[i] = PUT(ROUND(x * NAME(share)(x, activation)) * GET(up[i]));
        }
    }
}

struct NAME(gate_back_call) {
    const NUMBER *dy, *gate_up;
    NUMBER *dgate_up;
    int64_t width, activation;
};

/* Rows: dgate = dy up a'(gate), dup = dy a(gate). */
void NAME(gate_back)(int64_t begin, int64_t end, const struct NAME(gate_back_call) *c) {
    const int64_t width = c->width, activation = c->activation;
    for (int64_t row = begin; row < end; row++) {
        const NUMBER *dy = c->dy + row * width;
        const NUMBER *gate = c->gate_up + 2 * row * width, *up = gate + width;
        NUMBER *dgate = c->dgate_up + 2 * row * width, *dup = dgate + width;
        #pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const WIDE x = GET(gate[i]), d = GET(dy[i]), share = NAME(share)(x, activation);
            dup[i] = PUT(d * x * share);
            dgate[i] = PUT(d * GET(up[i]) * (share + x * NAME(share_slope)(x, share, activation)));
        }
    }
}

/* One head: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) of pairs at one place of both halves, every product rounded,
 * or of neighbours, rounded once; what is behind them stays. The angles stand as the pairs do. */
static inline void NAME(turn)(
    const NUMBER *x, const NUMBER *cosine, const NUMBER *sine, WIDE direction, int64_t half, int64_t width,
    int64_t interleaved, NUMBER *y) {
    if (interleaved) {
        for (int64_t i = 0; i < 2 * half; i += 2) {
            const WIDE a = GET(x[i]), b = GET(x[i + 1]), k = GET(cosine[i]), s = direction * GET(sine[i]);
            y[i] = PUT(a * k - b * s);
            y[i + 1] = PUT(b * k + a * s);
        }
    } else {
        #pragma omp simd
        for (int64_t i = 0; i < half; i++) {
            const WIDE a = GET(x[i]), b = GET(x[half + i]), k = GET(cosine[i]), s = direction * GET(sine[i]);
            y[i] = PUT(ROUND(a * k) - ROUND(b * s));
            y[half + i] = PUT(ROUND(b * k) + ROUND(a * s));
        }
    }
    if (2 * half < width) memcpy(y + 2 * half, x + 2 * half, (size_t)(width - 2 * half) * sizeof *x);
}

struct NAME(rotate_call) {
    const NUMBER *x, *cosine, *sine; /* x (tokens, heads, size), angles (tokens, rotated) */
    NUMBER *y;
    int64_t heads, size, rotated, x_stride, y_stride, interleaved; /* strides of a token */
    double direction;                                              /* 1: forth, -1: back */
};

/* Tokens: `turn` of each head. */
void NAME(rotate)(int64_t begin, int64_t end, const struct NAME(rotate_call) *c) {
    for (int64_t token = begin; token < end; token++) {
        const NUMBER *cosine = c->cosine + token * c->rotated, *sine = c->sine + token * c->rotated;
        for (int64_t head = 0; head < c->heads; head++) {
            const NUMBER *x = c->x + token * c->x_stride + head * c->size;
            NUMBER *y = c->y + token * c->y_stride + head * c->size;
            NAME(turn)(x, cosine, sine, (WIDE)c->direction, c->rotated / 2, c->size, c->interleaved, y);
        }
    }
}

struct NAME(drop_call) {
    const NUMBER *x;         /* (rows, width) */
    const uint32_t *draws;   /* (rows, 2): a factor and a summand */
    const uint32_t *columns; /* (width) */
    NUMBER *y;
    int64_t width, least;
    double scale;
};

/* Rows: y = scale x where factor column + summand, modulo 2^32 and taken with its sign, is at least `least`, else 0. */
void NAME(drop)(int64_t begin, int64_t end, const struct NAME(drop_call) *c) {
    const int64_t width = c->width;
    const int32_t least = (int32_t)c->least;
    const WIDE scale = (WIDE)c->scale;
    const uint32_t *columns = c->columns;
    for (int64_t row = begin; row < end; row++) {
        const NUMBER *x = c->x + row * width;
        NUMBER *y = c->y + row * width;
        const uint32_t factor = c->draws[2 * row], summand = c->draws[2 * row + 1];
        #pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const int32_t number = (int32_t)(factor * columns[i] + summand);
            y[i] = number >= least ? PUT(GET(x[i]) * scale) : 0;
        }
    }
}

struct NAME(nll_call) {
    NUMBER *logits;         /* (rows, classes) */
    const int64_t *targets; /* (rows) */
    WIDE *losses;           /* (rows) */
    int64_t classes;
};

/* Rows: logits become the gradient of -log softmax(logits)[target], softmax - onehot. */
void NAME(nll)(int64_t begin, int64_t end, const struct NAME(nll_call) *c) {
    const int64_t classes = c->classes;
    for (int64_t row = begin; row < end; row++) {
        NUMBER *logits = c->logits + row * classes;
        const int64_t target = c->targets[row];
        WIDE top = -INFINITY, sum = 0;
        #pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < classes; i++) top = GET(logits[i]) > top ? GET(logits[i]) : top;
        #pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < classes; i++) sum += EXP(GET(logits[i]) - top);
        const WIDE chosen = GET(logits[target]) - top;
        #pragma omp simd
        for (int64_t i = 0; i < classes; i++) logits[i] = PUT(EXP(GET(logits[i]) - top) / sum);
        logits[target] = PUT(EXP(chosen) / sum - 1);
        c->losses[row] = (WIDE)log(sum) - chosen;
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

#define TILE 8     /* rows of a product that are computed together, */
#define COLUMNS 32 /* with so many columns */
#define PARTS ((int64_t)COLUMNS / LANES)

/* out (rows, parts vectors) = or += a b, all sums in registers: at most TILE_ROWS rows and TILE_PARTS parts, inlined as
 * constants. a's number (i, k) is a[i down + k across], rows of b lie `apart` numbers from each other, those of out
 * `width`. */
static inline __attribute__((always_inline)) void NAME(small_tile)(
    int64_t rows, int64_t parts, int64_t inner, const WIDE *a, int64_t down, int64_t across, const WIDE *b, int64_t apart,
    WIDE *out, int64_t width, int adds) {
    NAME(vector) sums[TILE_ROWS][TILE_PARTS];
    for (int64_t i = 0; i < rows; i++)
        for (int64_t p = 0; p < parts; p++)
            sums[i][p] = adds ? *(NAME(vector) *)(out + i * width + p * LANES) : (NAME(vector)){0};
    for (int64_t k = 0; k < inner; k++, b += apart, a += across)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t p = 0; p < parts; p++) sums[i][p] += a[i * down] * *(const NAME(vector) *)(b + p * LANES);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t p = 0; p < parts; p++) *(NAME(vector) *)(out + i * width + p * LANES) = sums[i][p];
}

/* The same of some rows and of 1 part, or of a multiple of TILE_PARTS. */
static inline __attribute__((always_inline)) void NAME(row_tile)(
    int64_t rows, int64_t parts, int64_t inner, const WIDE *a, int64_t down, int64_t across, const WIDE *b, int64_t apart,
    WIDE *out, int64_t width, int adds) {
    if (parts < TILE_PARTS)
        NAME(small_tile)(rows, parts, inner, a, down, across, b, apart, out, width, adds);
    else
        for (int64_t p = 0; p < parts; p += TILE_PARTS)
            NAME(small_tile)(rows, TILE_PARTS, inner, a, down, across, b + p * LANES, apart, out + p * LANES, width, adds);
}

/* The same of fewer than TILE_ROWS rows, or of a multiple. */
static inline __attribute__((always_inline)) void NAME(tile)(
    int64_t rows, int64_t parts, int64_t inner, const WIDE *a, int64_t down, int64_t across, const WIDE *b, int64_t apart,
    WIDE *out, int64_t width, int adds) {
    if (rows < TILE_ROWS)
        NAME(row_tile)(rows, parts, inner, a, down, across, b, apart, out, width, adds);
    else
        for (int64_t i = 0; i < rows; i += TILE_ROWS)
            NAME(row_tile)(TILE_ROWS, parts, inner, a + i * down, down, across, b, apart, out + i * width, width, adds);
}

#include "panels.h"
#include "softmax.h"
#include "attention.h"
#include "decoding.h"

#undef TILE
#undef COLUMNS
#undef PARTS
#undef FILLED
#undef JOINED

#undef GET
#undef PUT
#undef ROUND
#undef LANES
#undef NUMBER
#undef WIDE
#undef EXP
#undef NAME
#undef FACTOR
#undef SUMMED
