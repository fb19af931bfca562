// What one core of this machine can do. Compiled with -march=native; prints one "name value" a line:
//
//   read_<pages>_<streams>  GB/s read from a buffer much larger than the last-level cache
//   cache                   GB/s read and written together, within the second-level cache
//   fma                     10^9 float32 operations a second (a multiply-add counts twice)
//   int8, int4              the same for products of 8-bit inputs with 8-bit weights, or with 4-bit ones
//
// Times are those of the thread's own clock, so that a core that is taken away for a while does not look slow. The best
// of a few rounds counts. Arguments: bytes of the large buffer, bytes of the small one.

#include <sys/mman.h>
#include <time.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX2__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
// As many sums as hide the latency of an addition, and as many registers as there are for them.
#define CHAINS 12

typedef float Floats __attribute__((vector_size(WIDTH)));
typedef uint32_t Words __attribute__((vector_size(WIDTH)));

// The compiler may neither foresee a value nor reorder around it.
#if defined(__x86_64__)
#define SETTLE(x) __asm__ volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define SETTLE(x) __asm__ volatile("" : "+w"(x))
#else
#define SETTLE(x) __asm__ volatile("" : "+m"(x))
#endif

static double seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

static double larger(double a, double b) { return a > b ? a : b; }

template <int kStreams> static double read_once(const char *memory, size_t bytes) {
    const size_t piece = bytes / kStreams / 4096 * 4096;
    Words total[kStreams] = {};
    const double begin = seconds();
    for (size_t at = 0; at < piece; at += 64)
#pragma GCC unroll 4
        for (int s = 0; s < kStreams; s++)
#pragma GCC unroll 4
            for (int part = 0; part < 64; part += WIDTH)
                total[s] += *reinterpret_cast<const Words *>(memory + s * piece + at + part);
    for (auto &t : total) SETTLE(t);
    return static_cast<double>(piece * kStreams) / (seconds() - begin) * 1e-9;
}

static void read_pages(const char *name, size_t bytes, int advice) {
    const size_t huge = size_t(2) << 20;
    void *mapped = mmap(nullptr, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return;
    char *memory = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(mapped) + huge - 1) / huge * huge);
    madvise(memory, bytes, advice);
    memset(memory, 1, bytes);
    double one = 0, two = 0, four = 0;
    for (int round = 0; round < 3; round++) {
        one = larger(one, read_once<1>(memory, bytes));
        two = larger(two, read_once<2>(memory, bytes));
        four = larger(four, read_once<4>(memory, bytes));
    }
    printf("read_%s_1 %.4f\nread_%s_2 %.4f\nread_%s_4 %.4f\n", name, one, name, two, name, four);
    munmap(mapped, bytes + huge);
}

// Half of the buffer is read and the other half written, as a norm or an activation does.
static double best_cache(size_t bytes) {
    const size_t half = bytes / 2 / 4096 * 4096;
    char *memory = static_cast<char *>(aligned_alloc(4096, 2 * half));
    if (!memory) return 0;
    memset(memory, 1, 2 * half);
    double best = 0;
    for (int round = 0; round < 5; round++) {
        const int passes = 64;
        const double begin = seconds();
        for (int pass = 0; pass < passes; pass++)
            for (size_t at = 0; at < half; at += WIDTH) {
                Words x = *reinterpret_cast<const Words *>(memory + at);
                SETTLE(x);
                *reinterpret_cast<Words *>(memory + half + at) = x;
            }
        best = larger(best, 2.0 * static_cast<double>(half) * passes / (seconds() - begin) * 1e-9);
    }
    free(memory);
    return best;
}

// Operations a second of `step`, which does `operations` on each of CHAINS sums.
template <class V, class Step> static double best_peak(double operations, const Step &step) {
    const int steps = 400000;
    double best = 0;
    V sums[CHAINS] = {};
    for (int round = 0; round < 5; round++) {
        const double begin = seconds();
        for (int i = 0; i < steps; i++)
#pragma GCC unroll 12
            for (int c = 0; c < CHAINS; c++) {
                step(sums[c]);
                SETTLE(sums[c]);
            }
        best = larger(best, operations * CHAINS * steps / (seconds() - begin) * 1e-9);
    }
    return best;
}

static double best_fma() {
    Floats x, y;
    for (int i = 0; i < WIDTH / 4; i++) x[i] = 0.999f, y[i] = 1e-3f;
    return best_peak<Floats>(WIDTH / 4 * 2, [&](Floats &sum) { sum = sum * x + y; });
}

static void integer_peaks() {
#if defined(__AVX512VNNI__)
    const __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5);
    const double peak = best_peak<__m512i>(128, [&](__m512i &sum) { sum = _mm512_dpbusd_epi32(sum, x, y); });
    printf("int8 %.4f\nint4 %.4f\n", peak, peak);
#elif defined(__AVXVNNI__)
    const __m256i x = _mm256_set1_epi8(3), y = _mm256_set1_epi8(5);
    const double peak = best_peak<__m256i>(64, [&](__m256i &sum) { sum = _mm256_dpbusd_avx_epi32(sum, x, y); });
    printf("int8 %.4f\nint4 %.4f\n", peak, peak);
#elif defined(__AVX2__)
    // Pairs of 8-bit products nearly fill 16 bits and must be widened at once; those of 4-bit weights add up in 16
    // bits for a whole group of 32, so that widening hardly counts.
    __m256i x = _mm256_set1_epi8(3);
    const __m256i y = _mm256_set1_epi8(5), ones = _mm256_set1_epi16(1);
    printf("int8 %.4f\n", best_peak<__m256i>(64, [&](__m256i &sum) {
               SETTLE(x);
               sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), ones));
           }));
    printf("int4 %.4f\n", best_peak<__m256i>(64, [&](__m256i &sum) {
               SETTLE(x);
               sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, y));
           }));
#endif
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    const size_t large = strtoull(arguments[1], nullptr, 10), small = strtoull(arguments[2], nullptr, 10);
    read_pages("4k", large, MADV_NOHUGEPAGE);
    read_pages("huge", large, MADV_HUGEPAGE);
    printf("cache %.4f\nfma %.4f\n", best_cache(small), best_fma());
    integer_peaks();
    return 0;
}
