/* dispatch.h: the kernels in use.  Read once at the start of a call, or where kernels only move and cast rows. */
#ifndef GQA_DISPATCH_H
#define GQA_DISPATCH_H

#include "kernels.h"

/* dtype is GQA_FLOAT32 or GQA_FLOAT64: the type of the arithmetic. */
const struct gqa_kernels *gqa_kernels_for(enum gqa_dtype dtype);

#endif
