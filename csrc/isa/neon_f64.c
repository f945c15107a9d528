/* neon_f64.c: the kernels in AArch64 NEON. */
#if defined(__aarch64__)

#include "../simd/arm_intrinsics.h"
#include "../simd/neon_f64.h"

#define KERNELS gqa_neon_f64
#include "../kernels_tmpl.h"

#endif
