/* avx512_bf16.c: the single-precision kernels in AVX-512F/BW/DQ/VL and AVX512_BF16. */
#if defined(__x86_64__)

#include "../simd/x86_intrinsics.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif
#include "../simd/avx512_bf16.h"

#define KERNELS gqa_avx512_bf16_f32
#include "../kernels_tmpl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
