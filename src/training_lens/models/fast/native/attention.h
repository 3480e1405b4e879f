/* Causal attention of examples that lie one behind the other, for one type (see kernels.h).
 *
 * As in arXiv 2205.14135, no matrix of weights outlives a block of queries and a chunk of keys: the forward pass scales
 * what it has summed up when a later chunk has a larger score, the backward pass computes the weights again from the
 * logarithms of their sums. Products are those of panels.h, what is
 * computed between them of softmax.h. */

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
    int64_t start, length, filled, group, heads, shared, size, inner, wide, window;
    WIDE scale, softcap;
    FACTOR *scratch;
    const NUMBER *key, *value;
};

static struct NAME(item) NAME(item_of)(const struct NAME(attend_call) *c, int64_t worker, int64_t which) {
    const int64_t example = which / c->groups, group = which % c->groups, size = c->size;
    const int64_t start = c->bounds[example], length = c->bounds[example + 1] - start;
    return (struct NAME(item)){
        .start = start, .length = length, .filled = FILLED(length), .group = group, .heads = c->heads,
        .shared = c->heads / c->groups, .size = size, .inner = JOINED(size), .wide = FILLED(size), .window = c->window,
        .scale = (WIDE)c->scale, .softcap = (WIDE)c->softcap,
        .scratch = (FACTOR *)(c->scratch + worker * c->scratch_stride),
        .key = c->key + start * c->key_stride + group * size,
        .value = c->value + start * c->value_stride + group * size,
    };
}

/* The first key that the query at `place` sees. */
static inline int64_t NAME(first)(int64_t place, int64_t window) {
    return window && place >= window ? place - window + 1 : 0;
}

/* BLOCK queries from `from` on, `rows` of them in the example, in `tiled` rows of products; and the keys `low` to `high`,
 * whole panels. */
struct NAME(part) { int64_t from, rows, tiled, low, high; };

/* The first chunk of keys that the block at `from` sees. */
static struct NAME(part) NAME(first_part)(const struct NAME(item) *it, int64_t from) {
    const int64_t left = it->length - from, rows = left < BLOCK ? left : BLOCK;
    const int64_t low = NAME(first)(from, it->window) / COLUMNS * COLUMNS, high = low + CHUNK, end = from + BLOCK;
    return (struct NAME(part)){from, rows, (rows + TILE - 1) / TILE * TILE, low, high < end ? high : end};
}

/* The next chunk; without keys behind the last. */
static struct NAME(part) NAME(next_part)(struct NAME(part) p) {
    const int64_t end = p.from + BLOCK, high = p.high + CHUNK;
    return (struct NAME(part)){p.from, p.rows, p.tiled, p.high, high < end ? high : end};
}

static struct NAME(weight_rule) NAME(rule_of)(const struct NAME(item) *it) {
    return (struct NAME(weight_rule)){it->softcap > 0 ? 1 : it->scale, it->softcap, it->scale};
}

/* Scores (tiled, CHUNK) of a part as `weight_rule` takes them; -inf where a query does not see a key. */
static void NAME(scores)(
    const struct NAME(item) *it, const struct NAME(part) *p, const FACTOR *query, const FACTOR *keys, WIDE *scores) {
    const int64_t count = p->high - p->low;
    NAME(product)(p->tiled, count, it->inner, query, it->inner, 1, keys + p->low * it->inner, COLUMNS * it->inner, scores,
                  CHUNK, 0);
    for (int64_t row = 0; row < p->tiled; row++) {
        WIDE *own = scores + row * CHUNK;
        const int64_t first = NAME(first)(p->from + row, it->window) - p->low, end = p->from + row + 1 - p->low;
        if (it->softcap > 0)
            for (int64_t i = 0; i < count; i++) own[i] = NAME(capped)(it->scale * own[i], it->softcap);
        for (int64_t i = 0; i < first && i < count; i++) own[i] = -INFINITY;
        for (int64_t i = end > 0 ? end : 0; i < count; i++) own[i] = -INFINITY;
    }
}

/* The sums so far of a block's queries: mixed values (BLOCK, wide), weights, and the largest score, by which all are. */
struct NAME(mix) { WIDE *mixed, sums[BLOCK], tops[BLOCK]; };

/* Take the values of a part into the sums, by its scores; `weights` is room for what they weigh. */
static void NAME(mix_part)(
    const struct NAME(item) *it, const struct NAME(part) *p, WIDE *scores, FACTOR *weights, const FACTOR *values,
    struct NAME(mix) *mix) {
    const int64_t count = p->high - p->low;
    const WIDE scale = NAME(rule_of)(it).scale;
    for (int64_t row = 0; row < p->tiled; row++) {
        const WIDE before = mix->tops[row], here = scale * NAME(top)(scores + row * CHUNK, count);
        const WIDE top = here > before ? here : before, kept = EXP(before - top); /* 0 of the first part */
        mix->tops[row] = top;
        mix->sums[row] *= kept;
        mix->sums[row] += NAME(weigh)(scores + row * CHUNK, count, scale, top, weights + row * JOINED(CHUNK));
        if (here > before)
            for (int64_t i = 0; i < it->wide; i++) mix->mixed[row * it->wide + i] *= kept;
    }
    NAME(product)(p->tiled, it->wide, JOINED(count), weights, JOINED(CHUNK), 1, values + JOINED(p->low) * COLUMNS,
                  JOINED(it->filled) * COLUMNS, mix->mixed, it->wide, 1);
}

/* out = softmax(scores) value. */
void NAME(attend)(int64_t begin, int64_t end, const struct NAME(attend_call) *c) {
    for (int64_t worker = begin; worker < end; worker++)
        for (int64_t turn = worker; turn < c->items; turn += c->workers) {
            const struct NAME(item) it = NAME(item_of)(c, worker, c->order[turn]);
            FACTOR *keys = it.scratch, *values = keys + it.filled * it.inner;
            FACTOR *query = values + JOINED(it.filled) * it.wide, *behind = query + BLOCK * it.inner;
            WIDE *scores = (WIDE *)behind;
            FACTOR *weights = SUMMED == 2 ? behind + BLOCK * CHUNK : behind;
            struct NAME(mix) mix = {.mixed = scores + 2 * BLOCK * CHUNK};
            NAME(turned_panels)(it.key, c->key_stride, it.length, it.size, keys);
            NAME(panels)(it.value, c->value_stride, it.length, it.filled, it.size, values);
            for (int64_t head = it.group * it.shared; head < (it.group + 1) * it.shared; head++)
                for (int64_t from = 0; from < it.length; from += BLOCK) {
                    struct NAME(part) p = NAME(first_part)(&it, from);
                    const int64_t token = it.start + from, rows = p.rows;
                    const NUMBER *q = c->query + token * c->query_stride + head * it.size;
                    NUMBER *out = c->out + (token * it.heads + head) * it.size;
                    WIDE *sums = c->sums + head * c->tokens + token;
                    NAME(factors)(q, c->query_stride, rows, BLOCK, it.size, query);
                    memset(mix.mixed, 0, (size_t)(BLOCK * it.wide) * sizeof *mix.mixed);
                    for (int64_t row = 0; row < BLOCK; row++) mix.sums[row] = 0, mix.tops[row] = -INFINITY;
                    for (; p.low < p.high; p = NAME(next_part)(p)) {
                        NAME(scores)(&it, &p, query, keys, scores);
                        NAME(mix_part)(&it, &p, scores, weights, values, &mix);
                    }
                    for (int64_t row = 0; row < rows; row++) {
                        const WIDE share = 1 / mix.sums[row];
                        for (int64_t i = 0; i < it.size; i++) mix.mixed[row * it.wide + i] *= share;
                        sums[row] = mix.tops[row] + (WIDE)log(mix.sums[row]);
                    }
                    NAME(narrowed)(mix.mixed, it.wide, rows, it.size, out, it.heads * it.size);
                }
        }
}

/* Where the backward pass of an item computes; keys and values are panels, by size (turned) and by key (plain). */
struct NAME(gradients) {
    FACTOR *keys, *values, *plain_keys, *query, *dout, *queries, *douts;
    WIDE *dkeys, *dvalues, *dquery, *scores, *dweights, along[BLOCK], sums[BLOCK];
    struct NAME(back_factors) factors;
};

static struct NAME(gradients) NAME(gradients_of)(const struct NAME(item) *it) {
    struct NAME(gradients) g;
    g.keys = it->scratch;
    g.values = g.keys + it->filled * it->inner;
    g.plain_keys = g.values + it->filled * it->inner;
    g.query = g.plain_keys + JOINED(it->filled) * it->wide;
    g.dout = g.query + BLOCK * it->inner;
    g.queries = g.dout + BLOCK * it->inner;
    g.douts = g.queries + JOINED(BLOCK) * it->wide;
    g.dkeys = (WIDE *)(g.douts + JOINED(BLOCK) * it->wide);
    g.dvalues = g.dkeys + it->filled * it->wide;
    g.dquery = g.dvalues + it->filled * it->wide;
    g.scores = g.dquery + BLOCK * it->wide;
    g.dweights = g.scores + BLOCK * CHUNK;
#if SUMMED == 2
    g.factors.rows = (FACTOR *)(g.dweights + BLOCK * CHUNK);
    g.factors.weights = g.factors.rows + BLOCK * JOINED(CHUNK);
    g.factors.columns = g.factors.weights + JOINED(BLOCK) * CHUNK;
#else
    g.factors = (struct NAME(back_factors)){g.dweights, g.scores, g.dweights};
#endif
    return g;
}

/* Add what a part gives to the gradients of its queries, keys and values. */
static void NAME(add_part)(const struct NAME(item) *it, const struct NAME(part) *p, struct NAME(gradients) *g) {
    const int64_t count = p->high - p->low, wide = it->wide;
    const struct NAME(weight_rule) rule = NAME(rule_of)(it);
    NAME(scores)(it, p, g->query, g->keys, g->scores);
    NAME(product)(p->tiled, count, it->inner, g->dout, it->inner, 1, g->values + p->low * it->inner, COLUMNS * it->inner,
                  g->dweights, CHUNK, 0);
    NAME(weigh_back)(p->tiled, count, g->scores, g->dweights, &rule, g->sums, g->along, &g->factors);
    NAME(product)(p->tiled, wide, JOINED(count), g->factors.rows, JOINED(CHUNK), 1, g->plain_keys + JOINED(p->low) * COLUMNS,
                  JOINED(it->filled) * COLUMNS, g->dquery, wide, 1);
    NAME(product)(count, wide, JOINED(p->tiled), g->factors.weights, 1, CHUNK, g->douts, JOINED(BLOCK) * COLUMNS,
                  g->dvalues + p->low * wide, wide, 1);
    NAME(product)(count, wide, JOINED(p->tiled), g->factors.columns, 1, CHUNK, g->queries, JOINED(BLOCK) * COLUMNS,
                  g->dkeys + p->low * wide, wide, 1);
}

/* dquery, dkey and dvalue from dout, and from what `attend` gave. */
void NAME(attend_back)(int64_t begin, int64_t end, const struct NAME(attend_call) *c) {
    for (int64_t worker = begin; worker < end; worker++)
        for (int64_t turn = worker; turn < c->items; turn += c->workers) {
            const struct NAME(item) it = NAME(item_of)(c, worker, c->order[turn]);
            struct NAME(gradients) g = NAME(gradients_of)(&it);
            NAME(turned_panels)(it.key, c->key_stride, it.length, it.size, g.keys);
            NAME(turned_panels)(it.value, c->value_stride, it.length, it.size, g.values);
            NAME(panels)(it.key, c->key_stride, it.length, it.filled, it.size, g.plain_keys);
            memset(g.dkeys, 0, (size_t)(2 * it.filled * it.wide) * sizeof *g.dkeys);
            for (int64_t head = it.group * it.shared; head < (it.group + 1) * it.shared; head++)
                for (int64_t from = 0; from < it.length; from += BLOCK) {
                    struct NAME(part) p = NAME(first_part)(&it, from);
                    const int64_t token = it.start + from, rows = p.rows, dense = it.heads * it.size;
                    const NUMBER *q = c->query + token * c->query_stride + head * it.size;
                    const NUMBER *out = c->out + token * dense + head * it.size;
                    const NUMBER *dy = c->dout + token * dense + head * it.size;
                    NAME(factors)(q, c->query_stride, rows, BLOCK, it.size, g.query);
                    NAME(factors)(dy, dense, rows, BLOCK, it.size, g.dout);
                    NAME(panels)(q, c->query_stride, rows, BLOCK, it.size, g.queries);
                    NAME(panels)(dy, dense, rows, BLOCK, it.size, g.douts);
                    for (int64_t row = 0; row < BLOCK; row++) { /* a row that fills the block has weights of 0 */
                        g.along[row] = row < rows ? NAME(dot)(dy + row * dense, out + row * dense, it.size) : 0;
                        g.sums[row] = row < rows ? c->sums[head * c->tokens + token + row] : INFINITY;
                    }
                    memset(g.dquery, 0, (size_t)(BLOCK * it.wide) * sizeof *g.dquery);
                    for (; p.low < p.high; p = NAME(next_part)(p)) NAME(add_part)(&it, &p, &g);
                    NUMBER *into = c->dquery + token * c->gradient_stride + head * it.size;
                    NAME(narrowed)(g.dquery, it.wide, rows, it.size, into, c->gradient_stride);
                }
            const int64_t into = it.start * c->gradient_stride + it.group * it.size;
            NAME(narrowed)(g.dkeys, it.wide, it.length, it.size, c->dkey + into, c->gradient_stride);
            NAME(narrowed)(g.dvalues, it.wide, it.length, it.size, c->dvalue + into, c->gradient_stride);
        }
}

#undef BLOCK
#undef CHUNK
