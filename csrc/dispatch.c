/* dispatch.c: which instruction sets this CPU and OS can run, and which one runs.
 *
 * The list stands widest first; adding an instruction set is its extern line and its row.
 * Called by plan.c for the tables and by python/module.c for the names. */
#define _DEFAULT_SOURCE /* syscall */
#include "dispatch.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern const struct gqa_kernels gqa_amx_bf16_f32;
extern const struct gqa_kernels gqa_avx512_bf16_f32;
extern const struct gqa_kernels gqa_avx512_f32, gqa_avx512_f64, gqa_avx2_f32, gqa_avx2_f64;

/* F16C, which clang 14's __builtin_cpu_supports does not know; it works in AVX registers. */
static bool has_f16c(void) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C;
}

/* __builtin_cpu_supports also asks the OS (XGETBV) whether it saves the wide registers. */
static bool has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

static bool has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static bool has_avx512_bf16(void) {
    unsigned eax, ebx, ecx, edx; /* clang 14's __builtin_cpu_supports does not know it either */
    return has_avx512() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax & 1u << 5;
}

/* Linux gives a process the room for matrix registers when it asks, once and for all its threads; not where a stack
 * for signals is too small for them. */
static bool may_use_matrices(void) {
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILE_DATA) == 0;
#else
    return false;
#endif
}

static bool has_amx_bf16(void) {
    const unsigned amx = 1u << 22 | 1u << 24; /* AMX-BF16, AMX-TILE */
    unsigned eax, ebx, ecx, edx;
    return has_avx512() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & amx) == amx && may_use_matrices();
}

/* Whether pairs of bfloat16 go faster than floats: on Zen 4 twice as fast; on Emerald Rapids an instruction takes the
 * time of four multiply-adds, so half as fast. */
static bool has_fast_bf16(void) { return has_avx512_bf16() && __builtin_cpu_is("amd"); }
#endif

#if defined(__aarch64__)
extern const struct gqa_kernels gqa_neon_f32, gqa_neon_f64;
#endif

extern const struct gqa_kernels gqa_scalar_f32, gqa_scalar_f64;

static bool always(void) { return true; }

static const struct isa {
    const char *name;
    bool (*available)(void);
    bool (*preferred)(void); /* to the rows below; NULL: wherever it is available */
    const struct gqa_kernels *f32, *f64;
} isas[] = {
#if defined(__x86_64__)
    {"amx_bf16", has_amx_bf16, NULL, &gqa_amx_bf16_f32, &gqa_avx512_f64},
    {"avx512_bf16", has_avx512_bf16, has_fast_bf16, &gqa_avx512_bf16_f32, &gqa_avx512_f64},
    {"avx512", has_avx512, NULL, &gqa_avx512_f32, &gqa_avx512_f64},
    {"avx2", has_avx2, NULL, &gqa_avx2_f32, &gqa_avx2_f64},
#endif
#if defined(__aarch64__)
    {"neon", always, NULL, &gqa_neon_f32, &gqa_neon_f64},
#endif
    {"scalar", always, NULL, &gqa_scalar_f32, &gqa_scalar_f64},
};

enum { ISA_COUNT = sizeof isas / sizeof *isas };

static _Atomic(const struct isa *) chosen; /* NULL until first asked: then the first that is preferred */

/* Asking the CPU is slow in a virtual machine, so the answer is kept. */
static const struct isa *current(void) {
    const struct isa *isa = atomic_load_explicit(&chosen, memory_order_relaxed), *best = isas;
    if (isa) return isa;
    while (!(best->preferred ? best->preferred : best->available)()) best++;
    return atomic_compare_exchange_strong(&chosen, &isa, best) ? best : isa;
}

const struct gqa_kernels *gqa_kernels_for(enum gqa_dtype dtype) {
    return dtype == GQA_FLOAT64 ? current()->f64 : current()->f32;
}

const char *gqa_isa_current(void) { return current()->name; }

const char *gqa_isa_available(int index) {
    for (int i = 0; i < ISA_COUNT; i++)
        if (isas[i].available() && index-- == 0) return isas[i].name;
    return NULL;
}

enum gqa_status gqa_isa_use(const char *name) {
    for (int i = 0; i < ISA_COUNT; i++)
        if (!strcmp(isas[i].name, name) && isas[i].available()) {
            atomic_store_explicit(&chosen, &isas[i], memory_order_relaxed);
            return GQA_OK;
        }
    return GQA_BAD_ARGUMENT;
}
