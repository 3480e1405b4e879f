/* New tokens of some rows: attention over the columns of a cache, adapters beside the weights; for one type (see kernels.h). */

/* The sum of a vector's numbers, pair by pair. */
static inline WIDE NAME(total)(NAME(vector) sums) {
#if VECTOR == 64
    const NAME(half) half = ((NAME(half) *)&sums)[0] + ((NAME(half) *)&sums)[1];
    const NAME(quarter) quarter = ((NAME(quarter) *)&half)[0] + ((NAME(quarter) *)&half)[1];
#elif VECTOR == 32
    const NAME(quarter) quarter = ((NAME(quarter) *)&sums)[0] + ((NAME(quarter) *)&sums)[1];
#else
    const NAME(quarter) quarter = sums;
#endif
    WIDE total = 0;
    for (size_t lane = 0; lane < 16 / sizeof(WIDE); lane++) total += quarter[lane];
    return total;
}

static inline NAME(vector) NAME(lanes_of)(const NUMBER *x) {
    union { NAME(vector) together; WIDE numbers[LANES]; } wide;
    for (int64_t lane = 0; lane < LANES; lane++) wide.numbers[lane] = GET(x[lane]);
    return wide.together;
}

#define AHEAD 16 /* columns */
#define QUAD 4 /* heads whose sums are in registers together, */
#define MIXED (VECTOR == 64 ? 4 : 2) /* with so many vectors of each */
#define WIDTH 64 /* columns of a block */

/* Inlined with a number of 1 to QUAD as a constant, so that sums stay in registers. */
#define BY_QUADS(kernel, number, ...) \
    (number >= 4   ? kernel(4, __VA_ARGS__) \
     : number == 3 ? kernel(3, __VA_ARGS__) \
     : number == 2 ? kernel(2, __VA_ARGS__) \
                   : kernel(1, __VA_ARGS__))

/* Of `heads` heads and `parts` vectors of each: y = weights v / sums. */
static inline __attribute__((always_inline)) void NAME(mix)(
    int64_t heads, int64_t parts, const WIDE *weights, const WIDE *sums, const NUMBER *values, int64_t count, int64_t size,
    NUMBER *y) {
    NAME(vector) mixed[QUAD][MIXED] = {0};
    for (int64_t column = 0; column < count; column++)
        for (int64_t part = 0; part < parts; part++) {
            const NAME(vector) value = NAME(lanes_of)(values + column * size + part * LANES);
            for (int64_t head = 0; head < heads; head++) mixed[head][part] += weights[head * count + column] * value;
        }
    for (int64_t head = 0; head < heads; head++)
        for (int64_t i = 0; i < parts * LANES; i++) y[head * size + i] = PUT(((const WIDE *)mixed[head])[i] / sums[head]);
}

/* `heads` heads that share keys and values: y = softmax(q k^T) v over `count` columns; q (heads, size) is scaled already,
 * `weights` has room for (heads, count); `softcap` 0: none. What the memory has to bring is asked for early. */
static inline __attribute__((always_inline)) void NAME(newest)(
    int64_t heads, const WIDE *q, const NUMBER *keys, const NUMBER *values, int64_t count, int64_t size, WIDE softcap,
    WIDE *weights, NUMBER *y) {
    const int64_t whole = size - size % LANES, line = 64 / (int64_t)sizeof *keys;
    WIDE sums[QUAD];
    for (int64_t column = 0; column < count; column++) {
        const NUMBER *key = keys + column * size;
        for (int64_t i = 0; i < size; i += line) {
            __builtin_prefetch(key + AHEAD * size + i);
            __builtin_prefetch(values + column * size + i);
        }
        NAME(vector) found[QUAD] = {0};
        for (int64_t i = 0; i < whole; i += LANES) {
            const NAME(vector) part = NAME(lanes_of)(key + i);
            for (int64_t head = 0; head < heads; head++) found[head] += part * *(const NAME(vector) *)(q + head * size + i);
        }
        for (int64_t head = 0; head < heads; head++) {
            WIDE score = NAME(total)(found[head]);
            for (int64_t i = whole; i < size; i++) score += q[head * size + i] * GET(key[i]);
            weights[head * count + column] = score;
        }
    }
    for (int64_t head = 0; head < heads; head++) {
        WIDE *own = weights + head * count, top = -INFINITY, sum = 0;
        if (softcap > 0)
            for (int64_t column = 0; column < count; column++) own[column] = NAME(capped)(own[column], softcap);
        #pragma omp simd reduction(max : top)
        for (int64_t column = 0; column < count; column++) top = own[column] > top ? own[column] : top;
        #pragma omp simd reduction(+ : sum)
        for (int64_t column = 0; column < count; column++) sum += own[column] = EXP(own[column] - top);
        sums[head] = sum;
    }
    int64_t i = 0;
    for (; i + MIXED * LANES <= size; i += MIXED * LANES)
        NAME(mix)(heads, MIXED, weights, sums, values + i, count, size, y + i);
    for (; i < whole; i += LANES) NAME(mix)(heads, 1, weights, sums, values + i, count, size, y + i);
    for (; i < size; i++)
        for (int64_t head = 0; head < heads; head++) {
            WIDE mixed = 0;
            for (int64_t column = 0; column < count; column++)
                mixed += weights[head * count + column] * GET(values[column * size + i]);
            y[head * size + i] = PUT(mixed / sums[head]);
        }
}

struct NAME(attend_newest_call) {
    const NUMBER *query, *key, *value; /* (tokens, heads or groups, size) */
    const NUMBER *cosine, *sine;       /* (tokens, angles) */
    NUMBER *keys, *values;             /* (rows, groups, columns, size) */
    const int64_t *bounds, *ends;      /* (rows + 1): each row's first token; (rows): the column behind its last one */
    NUMBER *y;                         /* (tokens, heads, size) */
    int64_t heads, groups, size, angles, interleaved;
    int64_t most, window;                           /* most: of the ends; window 0: none */
    int64_t query_stride, key_stride, value_stride; /* of a token */
    int64_t cache_row_stride, cache_group_stride;
    double scale, softcap; /* softcap 0: none */
};

/* Rows times groups of heads that share keys and values, each row's new tokens one after the other: k is turned, k and v
 * become the column of the token, and y = softmax(s) v of the turned q, with s = scale q k^T, capped, over the columns
 * from the first one, or from where the window begins, to the token's. So a token's result is the same whatever tokens
 * come with it. */
void NAME(attend_newest)(int64_t begin, int64_t end, const struct NAME(attend_newest_call) *c) {
    const int64_t heads = c->heads, groups = c->groups, size = c->size, angles = c->angles;
    const int64_t window = c->window, shared = heads / groups, half = angles / 2;
    const WIDE softcap = (WIDE)c->softcap;
    NUMBER turned[size];
    WIDE q[QUAD * size], *weights = malloc(sizeof *weights * (size_t)(QUAD * c->most)); /* a stack may be too small */
    if (!weights) abort();
    for (int64_t item = begin; item < end; item++) {
        const int64_t row = item / groups, group = item % groups;
        for (int64_t token = c->bounds[row]; token < c->bounds[row + 1]; token++) {
            const int64_t behind = c->ends[row] - (c->bounds[row + 1] - 1 - token);
            const int64_t first = window && behind > window ? behind - window : 0, count = behind - first;
            const int64_t cached = row * c->cache_row_stride + group * c->cache_group_stride + first * size;
            const NUMBER *cosine = c->cosine + token * angles, *sine = c->sine + token * angles;
            NUMBER *keys = c->keys + cached, *values = c->values + cached;
            const int64_t newest = (count - 1) * size;
            NAME(turn)(c->key + token * c->key_stride + group * size, cosine, sine, 1, half, size,
                       c->interleaved, keys + newest);
            memcpy(values + newest, c->value + token * c->value_stride + group * size, (size_t)size * sizeof *values);
            for (int64_t head = group * shared; head < (group + 1) * shared; head += QUAD) {
                const int64_t together = (group + 1) * shared - head < QUAD ? (group + 1) * shared - head : QUAD;
                const NUMBER *query = c->query + token * c->query_stride + head * size;
                for (int64_t of = 0; of < together; of++) {
                    NAME(turn)(query + of * size, cosine, sine, 1, half, size, c->interleaved, turned);
                    for (int64_t i = 0; i < size; i++) q[of * size + i] = (WIDE)c->scale * GET(turned[i]);
                }
                NUMBER *y = c->y + (token * heads + head) * size;
                const int usual = sizeof(WIDE) == sizeof(float); /* double is for tests */
                if (usual && size == 64) BY_QUADS(NAME(newest), together, q, keys, values, count, 64, softcap, weights, y);
                else if (usual && size == 128) BY_QUADS(NAME(newest), together, q, keys, values, count, 128, softcap, weights, y);
                else BY_QUADS(NAME(newest), together, q, keys, values, count, size, softcap, weights, y);
            }
        }
    }
    free(weights);
}

#define CHUNK 256 /* numbers of a row that are widened at once */

/* Of `rows` rows `parts` vectors of ranks: low = x A^T, from A^T (width, ranks). */
static inline __attribute__((always_inline)) void NAME(lower)(
    int64_t rows, int64_t parts, int64_t width, int64_t ranks, const NUMBER *x, const WIDE *down, WIDE *low) {
    WIDE wide[TILE * CHUNK];
    for (int64_t from = 0; from < width; from += CHUNK) {
        const int64_t depth = width - from < CHUNK ? width - from : CHUNK;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < depth; i++) wide[row * CHUNK + i] = GET(x[row * width + from + i]);
        NAME(tile)(rows, parts, depth, wide, CHUNK, 1, down + from * ranks, ranks, low, ranks, from > 0);
    }
}

/* Of `rows` rows up to COLUMNS columns of a block: y += low B^T, rounded once. */
static inline __attribute__((always_inline)) void NAME(raise)(
    int64_t rows, int64_t rank, int64_t ranks, int64_t outs, int64_t columns, const WIDE *low, const WIDE *up, NUMBER *y) {
    WIDE found[TILE * COLUMNS];
    NAME(tile)(rows, PARTS, rank, low, ranks, 1, up, WIDTH, found, COLUMNS, 0);
    for (int64_t row = 0; row < rows; row++)
        #pragma omp simd
        for (int64_t i = 0; i < columns; i++) y[row * outs + i] = PUT(GET(y[row * outs + i]) + found[row * COLUMNS + i]);
}

static inline int64_t NAME(least)(int64_t a, int64_t b) { return a < b ? a : b; }

struct NAME(branches_call) {
    const NUMBER *x;           /* (rows, width) */
    NUMBER *y;                 /* (rows, outs) */
    const WIDE *down, *up;     /* A^T (width, ranks), B^T (blocks, rank, WIDTH) */
    const int64_t *block_info; /* (blocks, 3): the first column, how many, and the first of their ranks in A */
    int64_t rows, width, outs, ranks, blocks, rank, panel; /* ranks: a multiple of 16; panel: rows of an item */
};

/* `rows` rows, one of 8, 4, 2 and 1: see `branches`. */
static inline __attribute__((always_inline)) void NAME(branch)(
    int64_t rows, const NUMBER *x, NUMBER *y, WIDE *low, const struct NAME(branches_call) *c) {
    const int64_t width = c->width, outs = c->outs, ranks = c->ranks, rank = c->rank;
    const WIDE *down = c->down, *up = c->up;
    int64_t r = 0;
    for (; r + COLUMNS <= ranks; r += COLUMNS)
        NAME(lower)(rows, PARTS, width, ranks, x, down + r, low + r);
    for (; r < ranks; r += LANES) NAME(lower)(rows, 1, width, ranks, x, down + r, low + r);
    for (int64_t block = 0; block < c->blocks; block++) {
        const int64_t *is = c->block_info + 3 * block;
        for (int64_t i = 0; i < is[1]; i += COLUMNS)
            NAME(raise)(rows, rank, ranks, outs, NAME(least)(is[1] - i, COLUMNS), low + is[2],
                        up + block * rank * WIDTH + i, y + is[0] + i);
    }
}

/* Panels of rows: y += (x A^T) B^T, rounded once, of all layers whose outputs lie side by side, each with so many
 * ranks. */
void NAME(branches)(int64_t begin, int64_t end, const struct NAME(branches_call) *c) {
    WIDE low[TILE * c->ranks];
    for (int64_t item = begin; item < end; item++) {
        const int64_t behind = NAME(least)((item + 1) * c->panel, c->rows);
        for (int64_t row = item * c->panel, rows; row < behind; row += rows) {
            const NUMBER *x = c->x + row * c->width;
            NUMBER *y = c->y + row * c->outs;
            if (behind - row >= 8) NAME(branch)(rows = 8, x, y, low, c);
            else if (behind - row >= 4) NAME(branch)(rows = 4, x, y, low, c);
            else if (behind - row >= 2) NAME(branch)(rows = 2, x, y, low, c);
            else NAME(branch)(rows = 1, x, y, low, c);
        }
    }
}

#undef CHUNK
#undef AHEAD
#undef QUAD
#undef MIXED
#undef WIDTH
#undef BY_QUADS
