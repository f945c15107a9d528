/* mask.c: bool and float masks become one bias tile: what is added, -inf where a slot is
 * dropped.  Called by tile.c for every tile that a mask touches. */
#include "mask.h"

void gqa_mask_tile(const struct gqa_plan *plan, const struct gqa_unit *unit, int64_t first_row, int rows,
                   int64_t first_key, int keys, void *bias, ptrdiff_t row_stride, ptrdiff_t key_stride) {
    const struct gqa_operand *mask = &plan->mask;
    const char *at = gqa_operand_at(plan, mask, unit->sequence, unit->kv_head * plan->group);
    const int64_t real_size = (int64_t)plan->kernels->real_size;
    for (int r = 0; r < rows; r++) {
        const int64_t row = first_row + r, query = row / plan->group, head = row % plan->group;
        const char *from = at + head * mask->head + query * mask->row + first_key * mask->column;
        plan->kernels->load((char *)bias + r * row_stride * real_size, key_stride, from, mask->column, mask->dtype,
                            mask->swapped, keys);
    }
}
