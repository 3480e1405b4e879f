/* Causal attention of examples that lie one behind the other, for one type (see kernels.h).
 *
 * As in arXiv 2205.14135, no matrix of weights outlives a block of queries: the backward pass computes them again from
 * the logarithms of their sums. All is computed in WIDE. Matrices that stand on the right of a product are laid out in
 * panels of COLUMNS columns, and filled with zeros to whole panels, so that one tile computes all products. */

#define BLOCK 32 /* queries that go through all products together */
#define FILLED(count) (((count) + COLUMNS - 1) / COLUMNS * COLUMNS)

/* out (rows, columns) = or += a b, with rows a multiple of TILE and columns of COLUMNS; panels begin `apart` numbers
 * from each other. */
static void NAME(product)(
    int64_t rows, int64_t columns, int64_t inner, const WIDE *a, int64_t down, int64_t across, const WIDE *b,
    int64_t apart, WIDE *out, int64_t width, int adds) {
    for (int64_t j = 0; j < columns; j += COLUMNS)
        for (int64_t i = 0; i < rows; i += TILE)
            NAME(tile)(TILE, PARTS, inner, a + i * down, down, across, b + j / COLUMNS * apart, COLUMNS,
                       out + i * width + j, width, adds);
}

/* Panels of x (rows, width), whose rows lie `apart` numbers from each other: (width filled / COLUMNS, filled, COLUMNS);
 * rows to `filled` are 0. */
static void NAME(panels)(const NUMBER *x, int64_t apart, int64_t rows, int64_t filled, int64_t width, WIDE *out) {
    memset(out, 0, (size_t)(FILLED(width) * filled) * sizeof *out);
    for (int64_t j = 0; j < width; j += COLUMNS) {
        const int64_t columns = width - j < COLUMNS ? width - j : COLUMNS;
        for (int64_t i = 0; i < rows; i++)
            for (int64_t c = 0; c < columns; c++) out[(j * filled) + i * COLUMNS + c] = GET(x[i * apart + j + c]);
    }
}

/* Panels of x transposed: (rows filled / COLUMNS, width, COLUMNS). */
static void NAME(turned_panels)(const NUMBER *x, int64_t apart, int64_t rows, int64_t width, WIDE *out) {
    for (int64_t j = 0; j < FILLED(rows); j++, x += apart) {
        WIDE *column = out + j / COLUMNS * COLUMNS * width + j % COLUMNS;
        for (int64_t i = 0; i < width; i++) column[i * COLUMNS] = j < rows ? GET(x[i]) : 0;
    }
}

/* BLOCK rows, of which those behind `rows` are 0. */
static void NAME(widened)(const NUMBER *x, int64_t apart, int64_t rows, int64_t width, WIDE *out) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < width; c++) out[i * width + c] = GET(x[i * apart + c]);
    memset(out + rows * width, 0, (size_t)((BLOCK - rows) * width) * sizeof *out);
}

static void NAME(narrowed)(const WIDE *x, int64_t width, int64_t rows, int64_t kept, NUMBER *out, int64_t apart) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < kept; c++) out[i * apart + c] = PUT(x[i * width + c]);
}

/* The largest of `count` numbers, a multiple of COLUMNS. */
static WIDE NAME(top)(const WIDE *x, int64_t count) {
    WIDE tops[COLUMNS], top = -INFINITY;
    for (int64_t c = 0; c < COLUMNS; c++) tops[c] = x[c];
    for (int64_t i = COLUMNS; i < count; i += COLUMNS)
        for (int64_t c = 0; c < COLUMNS; c++) tops[c] = x[i + c] > tops[c] ? x[i + c] : tops[c];
    for (int64_t c = 0; c < COLUMNS; c++) top = tops[c] > top ? tops[c] : top;
    return top;
}

/* `count` numbers x, a multiple of COLUMNS, become e^(scale x - less); their sum. */
static WIDE NAME(raised)(WIDE *x, int64_t count, WIDE scale, WIDE less) {
    WIDE sums[COLUMNS] = {0}, sum = 0;
    for (int64_t i = 0; i < count; i += COLUMNS)
        for (int64_t c = 0; c < COLUMNS; c++) sums[c] += x[i + c] = EXP(scale * x[i + c] - less);
    for (int64_t c = 0; c < COLUMNS; c++) sum += sums[c];
    return sum;
}

/* Sum of x y. */
static WIDE NAME(dot)(const NUMBER *x, const NUMBER *y, int64_t count) {
    WIDE sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += GET(x[i]) * GET(y[i]);
    return sum;
}

/* Workers share items out, an example and a group of heads each: worker w takes those at w, w + workers, ... of `order`.
 * Query, out and dout are (tokens, heads, size), key and value (tokens, groups, size), `out`, `dout` and `sums` dense. */
struct NAME(attend_call) {
    const NUMBER *query, *key, *value;
    NUMBER *out;
    WIDE *sums;                    /* (heads, tokens), the logarithms of the weights' sums */
    WIDE *scratch;                 /* (workers, scratch_stride) */
    const int64_t *bounds, *order; /* (examples + 1), (items) */
    const NUMBER *dout;            /* from here on of the backward pass alone */
    NUMBER *dquery, *dkey, *dvalue;
    int64_t tokens, heads, groups, size, window, workers, items; /* window 0: none */
    int64_t query_stride, key_stride, value_stride, scratch_stride, gradient_stride;
    double scale, softcap; /* softcap 0: none */
};

/* What a worker does at a time. */
struct NAME(item) {
    int64_t start, length, filled, group, heads, shared, size, wide, window;
    WIDE scale, softcap, *scratch;
    const NUMBER *key, *value;
};

static struct NAME(item) NAME(item_of)(const struct NAME(attend_call) *c, int64_t worker, int64_t which) {
    const int64_t example = which / c->groups, group = which % c->groups, size = c->size;
    const int64_t start = c->bounds[example], length = c->bounds[example + 1] - start;
    return (struct NAME(item)){
        .start = start, .length = length, .filled = FILLED(length), .group = group, .heads = c->heads,
        .shared = c->heads / c->groups, .size = size, .wide = FILLED(size), .window = c->window,
        .scale = (WIDE)c->scale, .softcap = (WIDE)c->softcap, .scratch = c->scratch + worker * c->scratch_stride,
        .key = c->key + start * c->key_stride + group * size,
        .value = c->value + start * c->value_stride + group * size,
    };
}

/* Queries from `from` on: how many, and the panels of keys that any of them sees. */
struct NAME(block) { int64_t from, rows, low, high; };

/* The first key that the query at `place` sees. */
static inline int64_t NAME(first)(int64_t place, int64_t window) {
    return window && place >= window ? place - window + 1 : 0;
}

static struct NAME(block) NAME(block_of)(const struct NAME(item) *it, int64_t from) {
    const int64_t left = it->length - from, low = NAME(first)(from, it->window) / COLUMNS * COLUMNS;
    return (struct NAME(block)){from, left < BLOCK ? left : BLOCK, low, from + BLOCK};
}

/* Scores (BLOCK, it->filled) of a block's queries with the keys from b->low on; -inf where one does not see another.
 * With a softcap they are scaled and capped; else `raised` scales them. */
static void NAME(scores)(
    const struct NAME(item) *it, const struct NAME(block) *b, const WIDE *query, const WIDE *keys, WIDE *scores) {
    NAME(product)(BLOCK, b->high - b->low, it->size, query, it->size, 1, keys + b->low * it->size,
                  COLUMNS * it->size, scores, it->filled, 0);
    for (int64_t row = 0; row < BLOCK; row++) {
        WIDE *own = scores + row * it->filled - b->low;
        if (it->softcap > 0)
            for (int64_t i = b->low; i < b->high; i++) own[i] = NAME(capped)(it->scale * own[i], it->softcap);
        for (int64_t i = b->low; i < NAME(first)(b->from + row, it->window); i++) own[i] = -INFINITY;
        for (int64_t i = b->from + row + 1; i < b->high; i++) own[i] = -INFINITY;
    }
}

/* out = softmax(scores) value. */
void NAME(attend)(int64_t begin, int64_t end, const struct NAME(attend_call) *c) {
    for (int64_t worker = begin; worker < end; worker++)
        for (int64_t turn = worker; turn < c->items; turn += c->workers) {
            const struct NAME(item) it = NAME(item_of)(c, worker, c->order[turn]);
            WIDE *keys = it.scratch, *values = keys + it.filled * it.size, *query = values + it.filled * it.wide;
            WIDE *scores = query + BLOCK * it.size, *mixed = scores + BLOCK * it.filled;
            NAME(turned_panels)(it.key, c->key_stride, it.length, it.size, keys);
            NAME(panels)(it.value, c->value_stride, it.length, it.filled, it.size, values);
            for (int64_t head = it.group * it.shared; head < (it.group + 1) * it.shared; head++)
                for (int64_t from = 0; from < it.length; from += BLOCK) {
                    const struct NAME(block) b = NAME(block_of)(&it, from);
                    const int64_t token = it.start + from;
                    const NUMBER *q = c->query + token * c->query_stride + head * it.size;
                    NUMBER *out = c->out + (token * it.heads + head) * it.size;
                    WIDE *sums = c->sums + head * c->tokens + token;
                    const WIDE scale = it.softcap > 0 ? 1 : it.scale;
                    WIDE shares[BLOCK];
                    NAME(widened)(q, c->query_stride, b.rows, it.size, query);
                    NAME(scores)(&it, &b, query, keys, scores);
                    for (int64_t row = 0; row < BLOCK; row++) {
                        const WIDE top = scale * NAME(top)(scores + row * it.filled, b.high - b.low);
                        const WIDE sum = NAME(raised)(scores + row * it.filled, b.high - b.low, scale, top);
                        shares[row] = 1 / sum;
                        if (row < b.rows) sums[row] = top + (WIDE)log(sum);
                    }
                    NAME(product)(BLOCK, it.wide, b.high - b.low, scores, it.filled, 1, values + b.low * COLUMNS,
                                  it.filled * COLUMNS, mixed, it.wide, 0);
                    for (int64_t row = 0; row < b.rows; row++)
                        for (int64_t i = 0; i < it.size; i++) mixed[row * it.wide + i] *= shares[row];
                    NAME(narrowed)(mixed, it.wide, b.rows, it.size, out, it.heads * it.size);
                }
        }
}

/* dquery, dkey and dvalue from dout, and from what `attend` gave. */
void NAME(attend_back)(int64_t begin, int64_t end, const struct NAME(attend_call) *c) {
    for (int64_t worker = begin; worker < end; worker++)
        for (int64_t turn = worker; turn < c->items; turn += c->workers) {
            const struct NAME(item) it = NAME(item_of)(c, worker, c->order[turn]);
            const int64_t narrow = it.filled * it.size, wide = it.filled * it.wide;
            WIDE *keys = it.scratch, *values = keys + narrow, *plain_keys = values + narrow;
            WIDE *dkeys = plain_keys + wide, *dvalues = dkeys + wide, *query = dvalues + wide;
            WIDE *dout = query + BLOCK * it.size, *queries = dout + BLOCK * it.size, *douts = queries + BLOCK * it.wide;
            WIDE *weights = douts + BLOCK * it.wide, *dscores = weights + BLOCK * it.filled;
            WIDE *dquery = dscores + BLOCK * it.filled;
            NAME(turned_panels)(it.key, c->key_stride, it.length, it.size, keys);
            NAME(turned_panels)(it.value, c->value_stride, it.length, it.size, values);
            NAME(panels)(it.key, c->key_stride, it.length, it.filled, it.size, plain_keys);
            memset(dkeys, 0, (size_t)(2 * wide) * sizeof *dkeys);
            for (int64_t head = it.group * it.shared; head < (it.group + 1) * it.shared; head++)
                for (int64_t from = 0; from < it.length; from += BLOCK) {
                    const struct NAME(block) b = NAME(block_of)(&it, from);
                    const int64_t token = it.start + from, seen = b.high - b.low, dense = it.heads * it.size;
                    const NUMBER *q = c->query + token * c->query_stride + head * it.size;
                    const NUMBER *out = c->out + token * dense + head * it.size;
                    const NUMBER *dy = c->dout + token * dense + head * it.size;
                    const WIDE *sums = c->sums + head * c->tokens + token;
                    NAME(widened)(q, c->query_stride, b.rows, it.size, query);
                    NAME(widened)(dy, dense, b.rows, it.size, dout);
                    NAME(panels)(q, c->query_stride, b.rows, BLOCK, it.size, queries);
                    NAME(panels)(dy, dense, b.rows, BLOCK, it.size, douts);
                    NAME(scores)(&it, &b, query, keys, weights);
                    NAME(product)(BLOCK, seen, it.size, dout, it.size, 1, values + b.low * it.size,
                                  COLUMNS * it.size, dscores, it.filled, 0);
                    for (int64_t row = 0; row < BLOCK; row++) {
                        WIDE *w = weights + row * it.filled, *d = dscores + row * it.filled;
                        if (row >= b.rows) {
                            memset(w, 0, (size_t)seen * sizeof *w);
                            memset(d, 0, (size_t)seen * sizeof *d);
                            continue;
                        }
                        const WIDE along = NAME(dot)(dy + row * dense, out + row * dense, it.size);
                        if (it.softcap > 0)
                            for (int64_t i = 0; i < seen; i++) d[i] = (d[i] - along) * NAME(cap_slope)(w[i], it.softcap);
                        else
                            for (int64_t i = 0; i < seen; i++) d[i] -= along;
                        NAME(raised)(w, seen, it.softcap > 0 ? 1 : it.scale, sums[row]);
                        for (int64_t i = 0; i < seen; i++) d[i] *= it.scale * w[i];
                    }
                    NAME(product)(BLOCK, it.wide, seen, dscores, it.filled, 1, plain_keys + b.low * COLUMNS,
                                  it.filled * COLUMNS, dquery, it.wide, 0);
                    NAME(product)(seen, it.wide, BLOCK, weights, 1, it.filled, douts, BLOCK * COLUMNS,
                                  dvalues + b.low * it.wide, it.wide, 1);
                    NAME(product)(seen, it.wide, BLOCK, dscores, 1, it.filled, queries, BLOCK * COLUMNS,
                                  dkeys + b.low * it.wide, it.wide, 1);
                    NUMBER *into = c->dquery + token * c->gradient_stride + head * it.size;
                    NAME(narrowed)(dquery, it.wide, b.rows, it.size, into, c->gradient_stride);
                }
            const int64_t into = it.start * c->gradient_stride + it.group * it.size;
            NAME(narrowed)(dkeys, it.wide, it.length, it.size, c->dkey + into, c->gradient_stride);
            NAME(narrowed)(dvalues, it.wide, it.length, it.size, c->dvalue + into, c->gradient_stride);
        }
}

#undef BLOCK
#undef FILLED
