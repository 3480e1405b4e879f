/* Products of matrices that are laid out for it, for one type (see kernels.h).
 *
 * A FACTOR is what is multiplied at once: a number in WIDE, or, where the processor multiplies pairs of bfloat16
 * (AVX512-BF16), SUMMED = 2 that follow each other along the sum. Sums are WIDE. Matrices on the right of a product are
 * laid out in panels of COLUMNS columns, and filled with zeros to whole panels, so that one tile computes all products. */

#define FILLED(count) (((count) + COLUMNS - 1) / COLUMNS * COLUMNS)
#define JOINED(count) (((count) + SUMMED - 1) / SUMMED) /* FACTORs along a sum of so many numbers */

/* `count` FACTORs, each of a number and of the one below it; without `below` of 0. */
static void NAME(join)(const NUMBER *x, const NUMBER *below, int64_t count, FACTOR *out) {
#if SUMMED == 2
    if (below)
        for (int64_t i = 0; i < count; i++) out[i] = x[i] | (FACTOR)below[i] << 16;
    else
        for (int64_t i = 0; i < count; i++) out[i] = x[i];
#else
    for (int64_t i = 0; i < count; i++) out[i] = GET(x[i]);
#endif
}

/* The FACTORs of a row of `width` numbers, which lie `apart` FACTORs from each other. */
static void NAME(spread)(const NUMBER *x, int64_t width, FACTOR *out, int64_t apart) {
#if SUMMED == 2
    for (int64_t i = 0; i < width / 2; i++) memcpy(out + i * apart, x + 2 * i, sizeof *out);
    if (width % 2) out[width / 2 * apart] = x[width - 1];
#else
    for (int64_t i = 0; i < width; i++) out[i * apart] = GET(x[i]);
#endif
}

#if SUMMED == 2
/* TILE rows of COLUMNS: out = or += a b of pairs, as `small_tile`. */
static void NAME(factor_tile)(
    int64_t inner, const FACTOR *a, int64_t down, int64_t across, const FACTOR *b, WIDE *out, int64_t width, int adds) {
    __m512 sums[TILE][2];
    for (int64_t i = 0; i < TILE; i++)
        for (int64_t p = 0; p < 2; p++)
            sums[i][p] = adds ? _mm512_loadu_ps(out + i * width + p * 16) : _mm512_setzero_ps();
    for (int64_t k = 0; k < inner; k++, a += across, b += COLUMNS) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(b), right = (__m512bh)_mm512_loadu_si512(b + 16);
        for (int64_t i = 0; i < TILE; i++) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32((int)a[i * down]);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], both, left);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], both, right);
        }
    }
    for (int64_t i = 0; i < TILE; i++)
        for (int64_t p = 0; p < 2; p++) _mm512_storeu_ps(out + i * width + p * 16, sums[i][p]);
}
#else
static void NAME(factor_tile)(
    int64_t inner, const FACTOR *a, int64_t down, int64_t across, const FACTOR *b, WIDE *out, int64_t width, int adds) {
    NAME(tile)(TILE, PARTS, inner, a, down, across, b, COLUMNS, out, width, adds);
}
#endif

/* out (rows, columns) = or += a b, with rows a multiple of TILE and columns of COLUMNS, and `inner` FACTORs along a sum;
 * panels begin `apart` FACTORs from each other. */
static void NAME(product)(
    int64_t rows, int64_t columns, int64_t inner, const FACTOR *a, int64_t down, int64_t across, const FACTOR *b,
    int64_t apart, WIDE *out, int64_t width, int adds) {
    for (int64_t j = 0; j < columns; j += COLUMNS)
        for (int64_t i = 0; i < rows; i += TILE)
            NAME(factor_tile)(inner, a + i * down, down, across, b + j / COLUMNS * apart, out + i * width + j, width, adds);
}

/* Panels of x (rows, width), whose rows lie `apart` numbers from each other: (width filled / COLUMNS, filled joined,
 * COLUMNS); rows to `filled` are 0. */
static void NAME(panels)(const NUMBER *x, int64_t apart, int64_t rows, int64_t filled, int64_t width, FACTOR *out) {
    const int64_t inner = JOINED(filled);
    memset(out, 0, (size_t)(FILLED(width) * inner) * sizeof *out);
    for (int64_t j = 0; j < width; j += COLUMNS)
        for (int64_t i = 0; i < rows; i += SUMMED) {
            const NUMBER *at = x + i * apart + j;
            NAME(join)(at, i + 1 < rows ? at + apart : 0, width - j < COLUMNS ? width - j : COLUMNS,
                       out + j * inner + i / SUMMED * COLUMNS);
        }
}

/* Panels of x transposed: (rows filled / COLUMNS, width joined, COLUMNS). */
static void NAME(turned_panels)(const NUMBER *x, int64_t apart, int64_t rows, int64_t width, FACTOR *out) {
    const int64_t inner = JOINED(width), last = FILLED(rows) - COLUMNS;
    memset(out + last * inner, 0, (size_t)(COLUMNS * inner) * sizeof *out);
    for (int64_t j = 0; j < rows; j++)
        NAME(spread)(x + j * apart, width, out + j / COLUMNS * COLUMNS * inner + j % COLUMNS, COLUMNS);
}

/* x (rows, width) as a left factor along its rows: (filled, width joined); rows to `filled` are 0. */
static void NAME(factors)(const NUMBER *x, int64_t apart, int64_t rows, int64_t filled, int64_t width, FACTOR *out) {
    const int64_t inner = JOINED(width);
    for (int64_t i = 0; i < rows; i++) NAME(spread)(x + i * apart, width, out + i * inner, 1);
    memset(out + rows * inner, 0, (size_t)((filled - rows) * inner) * sizeof *out);
}

/* Rows of WIDE as numbers. */
static void NAME(narrowed)(const WIDE *x, int64_t width, int64_t rows, int64_t kept, NUMBER *out, int64_t apart) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < kept; c++) out[i * apart + c] = PUT(x[i * width + c]);
}
