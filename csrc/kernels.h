/* kernels.h: the seam.  One table of kernels per instruction set and arithmetic
 * type; everything irregular has become plain data before it comes here.
 *
 * "real" is float or double; a table says which by real_size.  Pointers are void
 * so that one driver serves both.  Strides count reals.  Kernels cannot fail,
 * never allocate, and touch only what the shapes below say; every buffer that is
 * not a row of the caller's arrays comes from scratch and is padded to whole vectors.
 *
 * Two forms share the table.  Many query rows lie in lanes: c = K Q^T, then O^T = V^T P^T,
 * both by `outer`, or in bfloat16 by `outer_pairs` and `weigh_pairs`.  Few rows: `dot` puts keys in lanes, then
 * `outer_few` value dims; both read a regular row of a narrow type in place and widen it in registers, since few rows
 * are bound by the bytes they read.
 * `rows` is true where a statistic belongs to a row of c (few), false where to a lane.
 * Filled by kernels_tmpl.h, chosen by dispatch.c, called by tile.c, work.c, view.c, bias.c, weigh.c, merge.c and
 * cache.c. */
#ifndef GQA_KERNELS_H
#define GQA_KERNELS_H

#include "gqa.h"

enum {
    GQA_KEY_TILE = 128,     /* keys that share one score tile */
    GQA_TURNED = 128 + 32,  /* and what a row of turned values takes, zeros included */
    GQA_FEW_PIECE = 16,     /* keys that outer_few sums before it adds to c: calls cut there change no bit */
    GQA_FETCH_AHEAD = 8192, /* bytes: about what memory delivers before it is needed */
    GQA_FETCH_LINES = 8,    /* about what a core reads from memory ... */
    GQA_FETCH_EVERY = 16,   /* ... during so many products of many rows */
};

/* Rows that will be read soon.  Products bring them nearer, a few lines at a time: they are read in bursts, or in an
 * order that no prefetcher follows. */
struct gqa_fetch {
    uintptr_t row; /* address of the next of `rows` rows, `step` bytes apart: there need be no array */
    ptrdiff_t step;
    int64_t rows, width, at; /* bytes of a row, and where in it the next line is */
    int lines;               /* of 64 bytes, that are asked for at a time */
};

/* Rows without gaps are one. */
static inline struct gqa_fetch gqa_rows_to_come(uintptr_t row, ptrdiff_t step, int64_t rows, int64_t width, int lines) {
    const bool joined = step == width;
    return (struct gqa_fetch){row, step, joined ? rows > 0 : rows, joined ? rows * width : width, 0, lines};
}

/* c[n][lane] = sum over t of a[t][lane] * b[n, t], plus c[n][lane] * scale[lane] unless scale is NULL.
 * a, c and scale are padded to whole vectors. */
typedef void gqa_outer(void *c,                  /* (n, lanes), row stride row_tile */
                       const void *scale,        /* (lanes,) or NULL: c is written only */
                       const void *a,            /* (count, lanes), row stride row_tile */
                       int lanes, const void *b, /* element (n, t) at n * b_n + t * b_t; one of them is 1 */
                       ptrdiff_t b_n, ptrdiff_t b_t, int n, int count, struct gqa_fetch *next);

/* c[n][lane] += sum over t of a[t][lane] * b[n, t].  ahead: as for `dot`. */
typedef void gqa_outer_few(void *c,                           /* (n, lanes), row stride c_stride, padded */
                           ptrdiff_t c_stride, const void *a, /* (count, lanes) of dtype, row stride a_stride */
                           ptrdiff_t a_stride, enum gqa_dtype dtype, int lanes,
                           const void *b, /* (n, count), row stride b_stride */
                           ptrdiff_t b_stride, int n, int count, ptrdiff_t ahead);

struct gqa_kernels {
    size_t real_size;
    int lanes;    /* reals in a vector: what "padded" rounds to */
    int row_tile; /* query rows that lie in lanes together, a multiple of lanes */
    int few_rows; /* up to this many rows of a sequence take the few-rows form */

    /* A careful product drops what has a factor 0, even 0 * NaN, and has the same bits otherwise. */
    gqa_outer *outer, *outer_careful;

    /* Few rows read keys and values in place, in the type that they have: see gqa_streams. */
    gqa_outer_few *outer_few, *outer_few_careful;

    /* s[r][j] = q[r] . k[j]; writes keys up to the next multiple of 4.  ahead: bytes from a row to the one that
     * is read about GQA_FETCH_AHEAD bytes of rows later, which need not be there; 0: nothing is fetched. */
    void (*dot)(void *s,                                     /* (rows, keys), row stride GQA_KEY_TILE */
                const void *q,                               /* (rows, head_dim), row stride q_stride, zero-padded */
                ptrdiff_t q_stride, int rows, const void *k, /* (keys, head_dim) of dtype, row stride k_stride */
                ptrdiff_t k_stride, enum gqa_dtype dtype, int keys, int head_dim, ptrdiff_t ahead);

    /* The same products of bfloat16 queries and keys of an even head_dim, times scale; each NULL where the CPU has no
     * instruction for pairs of them, in which a subnormal counts as 0, or none that is faster.  c is written only. */
    void (*outer_pairs)(void *c,                     /* (n, lanes), row stride row_tile */
                        double scale, const void *a, /* (count, lanes) pairs, row stride row_tile */
                        int lanes, const void *b,    /* (n, 2 * count), row stride b_stride */
                        ptrdiff_t b_stride, int n, int count);
    void (*dot_pairs)(void *s,                                     /* (rows, keys), row stride GQA_KEY_TILE */
                      double scale, const void *q,                 /* (rows, head_dim), zero-padded */
                      ptrdiff_t q_stride, int rows, const void *k, /* (keys, head_dim), row stride k_stride */
                      ptrdiff_t k_stride, int keys, int head_dim, ptrdiff_t ahead);

    /* Whether a and b of outer_pairs are to have zeros up to a multiple of `lanes` pairs, and b rows in whole lines. */
    bool whole_pairs;

    /* bfloat16 values for weigh_pairs, key beside key: zeros for the keys and dims that are not there, and for what is
     * not finite; whether all was.  NULL where outer is as fast. */
    bool (*turn_pairs)(void *to,      /* (width, GQA_TURNED), width padded to whole vectors */
                       const void *v, /* (keys, width), row stride `stride` */
                       ptrdiff_t stride, int keys, int width);
    /* c[n][lane] = c[n][lane] * scale[lane] + sum over t of s[t][lane] * turned[n][t]. */
    void (*weigh_pairs)(void *c,                       /* (n, lanes), row stride row_tile */
                        const void *scale,             /* (lanes,) */
                        const void *s,                 /* (count, lanes), row stride row_tile */
                        int lanes, const void *turned, /* from turn_pairs */
                        int n, int count);

    /* Scores become weights exp(s - max) in place, and the running maximum m and sum l of each
     * row take them in; alpha = exp(old m - new m).  Key j of a row is live when lo <= j < hi
     * and its bias is above -inf; the others are dropped by selection and weigh exactly 0.
     * lo NULL: every key is live.  bias NULL: none.  softcap: s becomes softcap * tanh(s / softcap) before
     * all this; 0 = off. */
    void (*soften_lanes)(void *s,                        /* (keys, lanes), row stride row_tile */
                         const void *bias,               /* the same shape */
                         const void *lo, const void *hi, /* (lanes,) */
                         int lanes, int keys, double softcap, void *m, void *l, void *alpha /* (lanes,) each */);
    void (*soften_rows)(void *s,                        /* (rows, keys), row stride GQA_KEY_TILE */
                        const void *bias,               /* the same shape */
                        const void *lo, const void *hi, /* (rows,) */
                        int rows, int keys, double softcap, void *m, void *l, void *alpha /* (rows,) each */);

    /* bias[i][lane] -= slope * |row_at - key_at|.  `rows`: i is a row and lanes are keys; else the other way. */
    void (*tilt)(void *bias, ptrdiff_t stride, int n, int lanes, const void *slope, const void *row_at,
                 const void *key_at, bool rows);

    /* Joins the statistics of two disjoint key sets into (m, l); weight and other_weight are what
     * their outputs count in the whole. */
    void (*join)(void *m, void *l, const void *other_m, const void *other_l, void *weight, void *other_weight,
                 int lanes); /* (lanes,) each, padded */

    /* c = c * weight + d * other_weight; d NULL: c * weight. */
    void (*blend)(void *c, const void *d, ptrdiff_t stride, int n, int lanes, const void *weight,
                  const void *other_weight, bool rows);

    /* c = c / l, and 0 where l is 0. */
    void (*divide)(void *c, ptrdiff_t stride, int n, int lanes, const void *l, bool rows);

    /* Whether all of x (n, width), reals or another type that streams, is finite. */
    bool (*all_finite)(const void *x, ptrdiff_t stride, enum gqa_dtype dtype, int n, int width);

    /* n elements of an array, any dtype but int64, step bytes apart, to reals.  A bool becomes what a mask
     * adds: 0 for true, -inf for false. */
    void (*load)(void *to, const char *from, ptrdiff_t step, enum gqa_dtype dtype, bool swapped, int n);
    /* n reals, side by side, to an array of any float dtype, step bytes apart, rounded once to nearest even. */
    void (*store)(char *to, ptrdiff_t step, enum gqa_dtype dtype, bool swapped, const void *from, int n);
    /* to[i] = from[i] * factor */
    void (*multiply)(void *to, const void *from, int n, double factor);
    /* to[t][i] = from[i][t]: rows become lanes and back.  n and width are padded to whole vectors.  Moves bits. */
    void (*turn)(void *to,                              /* (width, n), row stride to_stride */
                 ptrdiff_t to_stride, const void *from, /* (n, width), row stride from_stride */
                 ptrdiff_t from_stride, int n, int width);
};

/* The dtype of a table's reals. */
static inline enum gqa_dtype gqa_own_dtype(const struct gqa_kernels *kernels) {
    return kernels->real_size == sizeof(float) ? GQA_FLOAT32 : GQA_FLOAT64;
}

/* Whether few rows read this dtype in place.  Elements lie one after another in this machine's byte order; halves
 * and int8 at any address, reals where a real may lie. */
static inline bool gqa_streams(const struct gqa_kernels *kernels, enum gqa_dtype dtype) {
    const bool narrow = dtype == GQA_FLOAT16 || dtype == GQA_BFLOAT16 || dtype == GQA_INT8;
    return dtype == gqa_own_dtype(kernels) || (narrow && kernels->real_size == sizeof(float));
}

/* One real, for what is done once a row and for rare rules. */
static inline double gqa_get(const struct gqa_kernels *kernels, const void *reals, ptrdiff_t index) {
    return kernels->real_size == sizeof(float) ? (double)((const float *)reals)[index] : ((const double *)reals)[index];
}

static inline void gqa_put(const struct gqa_kernels *kernels, void *reals, ptrdiff_t index, double x) {
    if (kernels->real_size == sizeof(float))
        ((float *)reals)[index] = (float)x;
    else
        ((double *)reals)[index] = x;
}

#endif
