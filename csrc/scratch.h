/* scratch.h: working memory that outlives the call it was needed for.
 *
 * A block grows as calls ask for more and is kept, so that small calls that follow
 * each other allocate nothing.  Used by pool.c and attention.c. */
#ifndef GQA_SCRATCH_H
#define GQA_SCRATCH_H

#include <stdbool.h>
#include <stddef.h>

enum { SCRATCH_ALIGNMENT = 64 };

struct scratch {
    void *data; /* (bytes,), aligned to SCRATCH_ALIGNMENT */
    size_t bytes;
};

bool scratch_reserve(struct scratch *block, size_t bytes); /* false: no memory, the block is empty */
void scratch_trim(struct scratch *block);                  /* gives back what is too large to keep */

/* A block for a thread that comes and goes: one of a few kept ones, or own
 * (zeroed) when those are taken; own is freed when it comes back. */
struct scratch *scratch_borrow(struct scratch *own);
void scratch_return(struct scratch *block, struct scratch *own);

/* In a forked child: borrowed blocks belong to threads of the parent and are left where they lie. */
void scratch_forget_borrowed(void);

#endif
