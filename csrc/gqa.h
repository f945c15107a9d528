/* gqa.h: the C contract of gqa_ext, usable without Python.
 *
 * A problem struct describes arrays wherever and however they lie; a function
 * checks it, says no with a status, or does the work.  Nothing here builds text:
 * who gets GQA_BAD_ARGUMENT explains (in Python: gqa_ext/_explain.py).
 * Called by csrc/python and by the tests in tests/c. */
#ifndef GQA_H
#define GQA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { GQA_MAX_DIMS = 64 };

enum gqa_status {
    GQA_OK,
    GQA_BAD_ARGUMENT, /* a shape, dtype or value breaks the contract */
    GQA_NO_MEMORY,
    GQA_INTERRUPTED, /* gqa_poll said stop; outputs hold garbage */
};

enum gqa_dtype { GQA_FLOAT16, GQA_BFLOAT16, GQA_FLOAT32, GQA_FLOAT64, GQA_BOOL, GQA_INT64, GQA_INT8 };

/* Any strided array.  data == NULL says the argument is absent. */
struct gqa_array {
    char *data;
    enum gqa_dtype dtype;
    bool swapped; /* bytes lie in the other order than this machine's */
    int ndim;
    int64_t shape[GQA_MAX_DIMS];
    int64_t strides[GQA_MAX_DIMS]; /* bytes, any sign, zero, any alignment */
};

/* Asked every few milliseconds by the calling thread only; true = give up. */
struct gqa_poll {
    bool (*stop)(void *arg); /* NULL = never */
    void *arg;
};

enum gqa_alignment { GQA_UPPER_LEFT, GQA_LOWER_RIGHT };

enum { GQA_OPEN = -1 }; /* a side of the window without an end */

/* Attention of query heads h over key/value heads h / (Hq / Hkv).  Leading
 * dimensions broadcast as in np.matmul; two dimensions mean one head.  Rules that
 * are not given are absent arrays, zeros and GQA_OPEN. */
struct gqa_attention {
    struct gqa_array query; /* (..., Hq, Sq, D) any float dtype; float64 only beside float64 */
    struct gqa_array key;   /* (..., Hkv, Sk, D) */
    struct gqa_array value; /* (..., Hkv, Sk, Dv) */
    struct gqa_array mask;  /* broadcasts to (..., Hq, Sq, Sk); bool or float */
    struct gqa_array out;   /* (..., Hq, Sq, Dv), query's dtype; same memory as query or disjoint */
    struct gqa_array lse;   /* (..., Hq, Sq) float32, or float64 beside float64; or absent */
    double scale;           /* used when has_scale, else 1 / sqrt(D); finite, in float32 0 or normal */
    bool has_scale;
    bool grouped; /* false: Hq must equal Hkv */
    bool causal;
    enum gqa_alignment alignment;

    int64_t left, right;                             /* the window: p_i - left <= p_j <= p_i + right; GQA_OPEN */
    double softcap;                                  /* 0 = off; else as scale */
    struct gqa_array alibi_slopes;                   /* float32 or float64, broadcasts to (..., Hq): (Hq,) or (B, Hq) */
    struct gqa_array sinks;                          /* (Hq,) any float dtype */
    struct gqa_array query_lengths, kv_lengths;      /* int64, broadcast to the leading dimensions */
    struct gqa_array query_positions, key_positions; /* int64, broadcast to (..., Sq) and (..., Sk) */

    struct gqa_array weights; /* (..., Hq, Sq, Sk) of lse's type, all zero: what multiplies the values; or absent */
    double dropout_p;         /* a slot is dropped with this probability, the others divided by 1 - p */
    uint64_t seed;

    /* Packed sequences, or absent: int64 (B + 1,), C-contiguous.  Sequence b is rows cu[b] to cu[b + 1] of
     * arrays (heads, T, D), and B is the one leading dimension of slopes. */
    struct gqa_array cu_seqlens_q, cu_seqlens_k;

    /* Keys and values of a cache, where Sk is cached_keys, the lengths may go as far, and key j of a sequence lies
     * - in row j % capacity of arrays (B, Hkv, capacity, D); keys older than the last capacity ones are gone;
     * - or, with a block table (int64 (B, blocks)), in row j % rows of block table[b, j / rows] of arrays
     *   (N, Hkv, rows, D).  Entries past a sequence's length are never looked at. */
    bool cached;
    int64_t cached_keys;
    struct gqa_array block_table;
    struct gqa_array key_scales, value_scales; /* float32, shaped as key and value less their columns: of int8 rows */
};

/* Checks everything but out and lse, and gives the shape of out; lse has the same less the last. */
enum gqa_status gqa_attention_shape(const struct gqa_attention *problem, int *ndim, int64_t shape[GQA_MAX_DIMS]);
enum gqa_status gqa_attention_run(const struct gqa_attention *problem, struct gqa_poll poll);

/* Writes new rows to a cache and casts them to its type: float16, bfloat16, float32, or int8 beside scales, where
 * a row x becomes rint(x / scale) with its own scale max|x| / 127, rounded up; NaN for a row that is not finite. */
struct gqa_cache_append {
    struct gqa_array keys, values, key_scales, value_scales, block_table; /* the cache, as in gqa_attention */
    struct gqa_array new_keys, new_values;                                /* (B, Hkv, S, D) any float dtype */
    struct gqa_array lengths; /* int64 (B,): rows that each sequence has already */
    struct gqa_array counts;  /* int64 (B,): how many of its new rows to write */
};
enum gqa_status gqa_cache_append_run(const struct gqa_cache_append *problem, struct gqa_poll poll);

/* Pools the heads of one projection.  Seen along axis, weight is (num_heads * head_dim)
 * slices and out (num_kv_heads * head_dim); out head g is the weighted mean of
 * weight's heads members[g], summed in double and rounded once. */
struct gqa_pool_heads {
    struct gqa_array weight; /* any float dtype */
    struct gqa_array out;    /* weight's shape and dtype but for axis; disjoint */
    int axis;
    int64_t num_heads, num_kv_heads, members_per_head;
    const int64_t *members; /* (num_kv_heads, members_per_head) */
    const double *weights;  /* (num_kv_heads, members_per_head), divided by each row's sum; NULL = plain mean */
};
enum gqa_status gqa_pool_heads_run(const struct gqa_pool_heads *problem, struct gqa_poll poll);

/* Rotary position embedding: in each row of x, pair i of the first 2 * pairs elements is turned by
 * position * frequencies[i] and made scale times as long; the elements after them stay.  Computed in double. */
struct gqa_rope {
    struct gqa_array x;   /* (..., H, S, D) or (S, D), any float dtype */
    struct gqa_array out; /* x's shape and dtype; same memory as x or disjoint */
    struct gqa_array
        positions; /* int64, native, (S,) or (..., S) broadcasting to x's dimensions before H; absent: 0.. */
    const double *frequencies; /* (pairs,) */
    int64_t pairs;
    double scale;
    bool interleaved; /* pairs are neighbours; else pair i is elements i and i + pairs */
};
enum gqa_status gqa_rope_run(const struct gqa_rope *problem, struct gqa_poll poll);

/* Which kernels run.  Of those this CPU and OS can run, the index-th name, widest first; NULL past the last. */
const char *gqa_isa_available(int index);
const char *gqa_isa_current(void);
enum gqa_status gqa_isa_use(const char *name); /* process-wide; GQA_BAD_ARGUMENT when not available */

/* Threads that one call may use, the caller among them. */
int gqa_get_num_threads(void);
void gqa_set_num_threads(int count); /* at least 1 */

#endif
