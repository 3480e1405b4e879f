/* One new token a row: attention over the columns of a cache, adapters beside the weights; for one type (see kernels.h). */

#define TOGETHER 4

/* The sum of a vector's numbers, pair by pair. */
static inline WIDE NAME(total)(NAME(vector) sums) {
    const NAME(half) half = ((NAME(half) *)&sums)[0] + ((NAME(half) *)&sums)[1];
    const NAME(quarter) quarter = ((NAME(quarter) *)&half)[0] + ((NAME(quarter) *)&half)[1];
    WIDE total = 0;
    for (size_t lane = 0; lane < 16 / sizeof(WIDE); lane++) total += quarter[lane];
    return total;
}

/* Sums of x y of `rows` x, `apart` numbers from each other; what is read of y is shared. */
static inline __attribute__((always_inline)) void NAME(along)(
    int64_t rows, const WIDE *x, int64_t apart, const NUMBER *y, int64_t count, WIDE *found) {
    NAME(vector) sums[TOGETHER] = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        union { NAME(vector) together; WIDE numbers[LANES]; } wide;
        for (int64_t lane = 0; lane < LANES; lane++) wide.numbers[lane] = GET(y[i + lane]);
        for (int64_t row = 0; row < rows; row++)
            sums[row] += *(const NAME(vector) *)(x + row * apart + i) * wide.together;
    }
    for (int64_t row = 0; row < rows; row++) {
        found[row] = NAME(total)(sums[row]);
        for (int64_t rest = i; rest < count; rest++) found[row] += x[row * apart + rest] * GET(y[rest]);
    }
}

/* One head: y = softmax(q k^T) v over `count` columns, q scaled already; `weights` has room for as many. Inlined with
 * the sizes that most models have as constants, so that sums stay in registers. */
static inline __attribute__((always_inline)) void NAME(newest)(
    const WIDE *q, const NUMBER *keys, const NUMBER *values, int64_t count, int64_t size, WIDE *weights, NUMBER *y) {
    WIDE top = -INFINITY, sum = 0, mixed[size];
    for (int64_t column = 0; column < count; column++)
        NAME(along)(1, q, size, keys + column * size, size, weights + column);
    #pragma omp simd reduction(max : top)
    for (int64_t column = 0; column < count; column++) top = weights[column] > top ? weights[column] : top;
    #pragma omp simd reduction(+ : sum)
    for (int64_t column = 0; column < count; column++) sum += weights[column] = EXP(weights[column] - top);
    for (int64_t i = 0; i < size; i++) mixed[i] = 0;
    for (int64_t column = 0; column < count; column++)
        #pragma omp simd
        for (int64_t i = 0; i < size; i++) mixed[i] += weights[column] * GET(values[column * size + i]);
    #pragma omp simd
    for (int64_t i = 0; i < size; i++) y[i] = PUT(mixed[i] / sum);
}

/* Rows times groups of heads that share keys and values: y = softmax(by[0] q k^T) v of the row's newest token, over the
 * columns from its first one, or from where the window begins, to the newest.
 * at: q (rows, heads, size), keys and values (rows, groups, columns, size), first (rows) int64, y (rows, heads, size);
 * of: heads, groups, size, the column behind the newest, window (0: none), the strides of a row of q, of a row of keys
 * and values, and of a group of theirs. */
void NAME(attend_newest)(int64_t begin, int64_t end, const struct call *c) {
    const int64_t heads = c->of[0], groups = c->of[1], size = c->of[2], behind = c->of[3], window = c->of[4];
    const int64_t shared = heads / groups;
    WIDE q[size], weights[behind];
    for (int64_t item = begin; item < end; item++) {
        const int64_t row = item / groups, group = item % groups, own = ((const int64_t *)c->at[3])[row];
        const int64_t first = window && behind - window > own ? behind - window : own, count = behind - first;
        const int64_t cached = row * c->of[6] + group * c->of[7] + first * size;
        const NUMBER *keys = (const NUMBER *)c->at[1] + cached, *values = (const NUMBER *)c->at[2] + cached;
        for (int64_t head = group * shared; head < (group + 1) * shared; head++) {
            const NUMBER *query = (const NUMBER *)c->at[0] + row * c->of[5] + head * size;
            NUMBER *y = (NUMBER *)c->at[4] + (row * heads + head) * size;
            for (int64_t i = 0; i < size; i++) q[i] = (WIDE)c->by[0] * GET(query[i]);
            if (size == 64) NAME(newest)(q, keys, values, count, 64, weights, y);
            else if (size == 128) NAME(newest)(q, keys, values, count, 128, weights, y);
            else NAME(newest)(q, keys, values, count, size, weights, y);
        }
    }
}

/* TOGETHER ranks each: low = x A^T. at: x (rows, width), A (ranks, width) WIDE, low (rows, ranks) WIDE; of: rows, width,
 * ranks, a multiple of TOGETHER. */
void NAME(lower)(int64_t begin, int64_t end, const struct call *c) {
    const int64_t rows = c->of[0], width = c->of[1], ranks = c->of[2];
    for (int64_t rank = begin * TOGETHER; rank < end * TOGETHER; rank += TOGETHER)
        for (int64_t row = 0; row < rows; row++) {
            const NUMBER *x = (const NUMBER *)c->at[0] + row * width;
            const WIDE *down = (const WIDE *)c->at[1] + rank * width;
            NAME(along)(TOGETHER, down, width, x, width, (WIDE *)c->at[2] + row * ranks + rank);
        }
}

#define WIDTH 64 /* columns of a block, at most */

/* Blocks of columns: y += low B^T, rounded once; B of all layers whose outputs lie side by side, each with so many
 * ranks. at: y (rows, outs), low (rows, ranks) WIDE, B^T (rank, outs) WIDE, blocks (items, 3) int64: the first column,
 * how many, and the first of their ranks in `low`; of: rows, outs, ranks, rank. */
void NAME(raise)(int64_t begin, int64_t end, const struct call *c) {
    const int64_t rows = c->of[0], outs = c->of[1], ranks = c->of[2], rank = c->of[3];
    for (int64_t item = begin; item < end; item++) {
        const int64_t *block = (const int64_t *)c->at[3] + 3 * item, columns = block[1];
        const WIDE *up = (const WIDE *)c->at[2] + block[0];
        for (int64_t row = 0; row < rows; row++) {
            NUMBER *y = (NUMBER *)c->at[0] + row * outs + block[0];
            const WIDE *low = (const WIDE *)c->at[1] + row * ranks + block[2];
            WIDE sums[WIDTH] = {0};
            for (int64_t r = 0; r < rank; r++)
                #pragma omp simd
                for (int64_t i = 0; i < columns; i++) sums[i] += low[r] * up[r * outs + i];
            #pragma omp simd
            for (int64_t i = 0; i < columns; i++) y[i] = PUT(GET(y[i]) + sums[i]);
        }
    }
}

#undef TOGETHER
#undef WIDTH
