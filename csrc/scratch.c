/* scratch.c: see scratch.h. */
#define _POSIX_C_SOURCE 200809L /* posix_memalign */

#include "scratch.h"

#include <stdatomic.h>
#include <stdlib.h>

enum {
    KEPT_BLOCKS = 8,       /* a caller takes two where the keys of a unit are cut into chunks */
    KEEP_BYTES = 64 << 20, /* of one block, after a call */
};

static struct {
    atomic_bool taken;
    struct scratch block;
} kept[KEPT_BLOCKS];

static void discard(struct scratch *block) {
    free(block->data);
    *block = (struct scratch){0};
}

bool scratch_reserve(struct scratch *block, size_t bytes) {
    if (bytes <= block->bytes) return true;
    discard(block);
    void *data;
    if (posix_memalign(&data, SCRATCH_ALIGNMENT, bytes) != 0) return false;
    *block = (struct scratch){data, bytes};
    return true;
}

void scratch_trim(struct scratch *block) {
    if (block->bytes > KEEP_BYTES) discard(block);
}

struct scratch *scratch_borrow(struct scratch *own) {
    for (int i = 0; i < KEPT_BLOCKS; i++)
        if (!atomic_exchange(&kept[i].taken, true)) return &kept[i].block;
    return own;
}

void scratch_return(struct scratch *block, struct scratch *own) {
    if (block == own) {
        discard(own);
        return;
    }
    scratch_trim(block);
    for (int i = 0; i < KEPT_BLOCKS; i++)
        if (block == &kept[i].block) atomic_store(&kept[i].taken, false);
}

void scratch_forget_borrowed(void) {
    for (int i = 0; i < KEPT_BLOCKS; i++)
        if (atomic_exchange(&kept[i].taken, false)) kept[i].block = (struct scratch){0};
}
