/* scalar_f64.c: the kernels in plain C. */
#include "../simd/scalar_f64.h"

#define KERNELS gqa_scalar_f64
#include "../kernels_tmpl.h"
