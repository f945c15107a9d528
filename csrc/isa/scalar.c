/* scalar.c: the kernels in plain C. */
#include "../simd/scalar.h"

#define KERNELS gqa_scalar_f32
#include "../kernels_tmpl.h"
