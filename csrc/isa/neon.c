/* neon.c: the kernels in AArch64 NEON. */
#if defined(__aarch64__)

#include "../simd/arm_intrinsics.h"
#include "../simd/neon.h"

#define KERNELS gqa_neon_f32
#include "../kernels_tmpl.h"

#endif
