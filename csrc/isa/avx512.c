/* avx512.c: the kernels in AVX-512F/BW/DQ/VL. */
#if defined(__x86_64__)

#include "../simd/x86_intrinsics.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include "../simd/avx512.h"

#define KERNELS gqa_avx512_f32
#include "../kernels_tmpl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
