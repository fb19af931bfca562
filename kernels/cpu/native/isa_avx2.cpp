// The step for x86-64 with AVX2, FMA and F16C.
//
// Standard headers come before the target switch: their inline functions must stay fit for any processor.

#if defined(__x86_64__)

#include <immintrin.h>

#include "isa.h"
#include "pack.h"

#define INLINE static inline __attribute__((always_inline))

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace avx2 {
#include "simd_avx2.h"
#include "kernels.h"
}  // namespace avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Isa kAvx2Isa = avx2::table("avx2");

#endif
