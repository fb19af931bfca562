// The step in plain C++, for whatever the compiler's default target is (on ARM that includes NEON and fused adds).

#include "isa.h"
#include "pack.h"

#define INLINE static inline __attribute__((always_inline))

namespace portable {
#include "simd_portable.h"
#include "kernels.h"
}  // namespace portable

const Isa kPortableIsa = portable::table("portable");
