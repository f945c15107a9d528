/* ggml_attention.c: ggml's flash_attn_ext over the caller's arrays, as a graph of one node.
 *
 * ggml_attention.py compiles this file at run time against a built ggml (see build_ggml.sh); nothing else uses it.
 * One query row a sequence, no mask: decoding. */
#include <ggml-cpu.h>
#include <ggml.h>
#include <stdint.h>
#include <stdlib.h>

struct attention {
    struct ggml_context *context;
    struct ggml_cgraph *graph;
    struct ggml_cplan plan;
    struct ggml_tensor *output; /* float (batch, 1, heads, head_dim) */
    void *quantised[2];         /* of K and V, where it is this program's */
};

static struct ggml_tensor *tensor_of(struct ggml_context *context, enum ggml_type type, int64_t head_dim, int64_t seq,
                                     int64_t heads, int64_t batch, void *data)
{
    struct ggml_tensor *tensor = ggml_new_tensor_4d(context, type, head_dim, seq, heads, batch);
    tensor->data = data;
    return tensor;
}

static void *quantise(const float *rows, int64_t count, int64_t width)
{
    void *to = malloc((size_t)count * ggml_row_size(GGML_TYPE_Q8_0, width));
    ggml_quantize_chunk(GGML_TYPE_Q8_0, rows, to, 0, count, width, NULL);
    return to;
}

/* key and value: float16 (batch, kv_heads, seq, head_dim), read in place; or floats, kept as Q8_0. */
struct attention *attention_make(void *query, void *key, void *value, int quantised, int64_t batch, int64_t heads,
                                 int64_t kv_heads, int64_t seq, int64_t head_dim, float scale, int threads)
{
    struct attention *a = calloc(1, sizeof *a);
    const enum ggml_type type = quantised ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
    const int64_t rows = batch * kv_heads * seq;
    ggml_cpu_init();
    a->context = ggml_init((struct ggml_init_params){1 << 20, NULL, true});
    if (quantised) {
        a->quantised[0] = key = quantise(key, rows, head_dim);
        a->quantised[1] = value = quantise(value, rows, head_dim);
    }
    struct ggml_tensor *q = tensor_of(a->context, GGML_TYPE_F32, head_dim, 1, heads, batch, query);
    struct ggml_tensor *k = tensor_of(a->context, type, head_dim, seq, kv_heads, batch, key);
    struct ggml_tensor *v = tensor_of(a->context, type, head_dim, seq, kv_heads, batch, value);
    a->output = ggml_flash_attn_ext(a->context, q, k, v, NULL, scale, 0, 0);
    a->output->data = malloc(ggml_nbytes(a->output));
    a->graph = ggml_new_graph(a->context);
    ggml_build_forward_expand(a->graph, a->output);
    a->plan = ggml_graph_plan(a->graph, threads, NULL);
    a->plan.work_data = malloc(a->plan.work_size + 64);
    return a;
}

const float *attention_run(struct attention *a)
{
    ggml_graph_compute(a->graph, &a->plan);
    return a->output->data;
}

void attention_free(struct attention *a)
{
    free(a->quantised[0]);
    free(a->quantised[1]);
    free(a->output->data);
    free(a->plan.work_data);
    ggml_free(a->context);
    free(a);
}
