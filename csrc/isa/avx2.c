/* avx2.c: the kernels in AVX2, FMA and F16C. */
#if defined(__x86_64__)

#include "../simd/x86_intrinsics.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "../simd/avx2.h"

#define KERNELS gqa_avx2_f32
#include "../kernels_tmpl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
