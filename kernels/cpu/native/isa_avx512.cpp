// The step for x86-64 with AVX-512 (F, BW, DQ, VL) and VNNI.
//
// Standard headers come before the target switch: their inline functions must stay fit for any processor.

#if defined(__x86_64__)

#include <immintrin.h>

#include "isa.h"
#include "pack.h"

#define INLINE static inline __attribute__((always_inline))

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

namespace avx512 {
#include "simd_avx512.h"
#include "kernels.h"
}  // namespace avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Isa kAvx512Isa = avx512::table("avx512");

#endif
