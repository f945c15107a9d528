/* weigh.c: dropout, and weights that the caller asked for.  Called by tile.c. */
#include "weigh.h"

/* splitmix64: every bit of x moves every bit of the result. */
static uint64_t mix(uint64_t x) {
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* Uniform in [0, 1), 53 bits. */
static double draw(uint64_t row_key, int64_t key) { return (double)(mix(row_key ^ (uint64_t)key) >> 11) * 0x1p-53; }

void gqa_drop_out(const struct gqa_plan *plan, const struct gqa_unit *unit, const struct gqa_slots *slots,
                  void *weights) {
    const double p = plan->dropout_p, gain = p < 1 ? 1 / (1 - p) : 0;
    const uint64_t sequence_key = mix(plan->seed ^ mix((uint64_t)unit->sequence));
    for (int r = 0; r < slots->rows; r++) {
        const int64_t row = slots->first_row + r, head = unit->kv_head * plan->group + row % plan->group;
        const uint64_t row_key = mix(mix(sequence_key ^ (uint64_t)head) ^ (uint64_t)(row / plan->group));
        for (int j = 0; j < slots->keys; j++) {
            const int64_t at = r * slots->row_stride + j * slots->key_stride;
            const bool dropped = draw(row_key, slots->first_key + j) < p;
            gqa_put(plan->kernels, weights, at, dropped ? 0 : gqa_get(plan->kernels, weights, at) * gain);
        }
    }
}

/* Rows of weights, (rows, GQA_KEY_TILE), from row `first` of the slots on. */
static void store_weights(const struct gqa_plan *plan, const struct gqa_unit *unit, const struct gqa_slots *slots,
                          int first, int end, const char *weights) {
    const struct gqa_operand *to = &plan->weights;
    const int64_t bytes = GQA_KEY_TILE * (int64_t)plan->kernels->real_size;
    for (int r = first; r < end; r++) {
        const int64_t row = slots->first_row + r, head = unit->kv_head * plan->group + row % plan->group;
        char *at = gqa_operand_at(plan, to, unit->sequence, head) + row / plan->group * to->row;
        plan->kernels->store(at + slots->first_key * to->column, to->column, to->dtype, to->swapped,
                             weights + (r - first) * bytes, slots->keys);
    }
}

void gqa_weights_store(const struct gqa_plan *plan, const struct gqa_unit *unit, struct gqa_work *work,
                       const struct gqa_slots *slots, const char *weights) {
    const struct gqa_kernels *kernels = plan->kernels;
    const int lanes = kernels->lanes, keys = (int)gqa_round_up(slots->keys, lanes);
    if (unit->form->few) {
        store_weights(plan, unit, slots, 0, slots->rows, weights);
        return;
    }
    for (int first = 0; first < slots->rows; first += lanes) {
        kernels->turn(work->rows, GQA_KEY_TILE, weights + first * (int64_t)kernels->real_size, slots->key_stride, keys,
                      lanes);
        store_weights(plan, unit, slots, first, (int)gqa_min(first + lanes, slots->rows), work->rows);
    }
}
