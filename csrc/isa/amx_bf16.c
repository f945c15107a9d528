/* amx_bf16.c: the single-precision kernels in AVX-512F/BW/DQ/VL, with matrices of bfloat16 in AMX-BF16. */
#if defined(__x86_64__)

#include "../simd/x86_intrinsics.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16,avx2,fma")
#endif
#include "../simd/amx_bf16.h"

#define KERNELS gqa_amx_bf16_f32
#include "../kernels_tmpl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
