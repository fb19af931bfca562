// What one core of this machine can do: prints GB/s read, float GFLOP/s and int8 GOP/s. Compiled with -march=native.

#include <immintrin.h>
#include <sys/mman.h>
#include <time.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

static double seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

static volatile float sink;

// Read `bytes` in `streams` places at once.
static double read_once(const char *memory, size_t bytes, size_t streams) {
    const double begin = seconds();
    const size_t piece = bytes / streams;
    __m256i total[8];
    for (auto &t : total) t = _mm256_setzero_si256();
    for (size_t at = 0; at < piece; at += 64)
        for (size_t s = 0; s < streams; s++) {
            const __m256i *from = reinterpret_cast<const __m256i *>(memory + s * piece + at);
            total[2 * s] = _mm256_add_epi8(total[2 * s], _mm256_loadu_si256(from));
            total[2 * s + 1] = _mm256_add_epi8(total[2 * s + 1], _mm256_loadu_si256(from + 1));
        }
    for (auto &t : total) sink = sink + static_cast<float>(_mm256_extract_epi32(t, 0));
    return static_cast<double>(bytes) / (seconds() - begin) * 1e-9;
}

static double best_read() {
    const size_t bytes = size_t(192) << 20;
    char *memory = static_cast<char *>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) return 0;
    madvise(memory, bytes, MADV_HUGEPAGE);
    memset(memory, 1, bytes);
    double best = 0;
    for (int round = 0; round < 6; round++)
        for (size_t streams : {size_t(1), size_t(2), size_t(4)}) {
            const double found = read_once(memory, bytes, streams);
            best = found > best ? found : best;
        }
    munmap(memory, bytes);
    return best;
}

static double best_fma() {
    double best = 0;
    const int steps = 4000000;
    for (int round = 0; round < 5; round++) {
        __m256 acc[12];
        const __m256 x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps(1e-3f);
        for (auto &a : acc) a = _mm256_set1_ps(1.0f);
        const double begin = seconds();
        for (int i = 0; i < steps; i++)
            for (auto &a : acc) {
                a = _mm256_fmadd_ps(a, x, y);
                __asm__("" : "+x"(a));
            }
        const double found = 12.0 * 16 * steps / (seconds() - begin) * 1e-9;
        for (auto &a : acc) sink = sink + _mm256_cvtss_f32(a);
        best = found > best ? found : best;
    }
    return best;
}

// 4-bit weights by 8-bit inputs, added up in 16 bits: what a product of this library cannot be faster than.
static double best_int8() {
    double best = 0;
    const int steps = 4000000;
    for (int round = 0; round < 5; round++) {
#if defined(__AVX512VNNI__)
        __m512i acc[12];
        const __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5);
        for (auto &a : acc) a = _mm512_setzero_si512();
        const double begin = seconds();
        for (int i = 0; i < steps; i++)
            for (auto &a : acc) {
                a = _mm512_dpbusd_epi32(a, x, y);
                __asm__("" : "+v"(a));
            }
        const double found = 12.0 * 128 * steps / (seconds() - begin) * 1e-9;
        for (auto &a : acc) sink = sink + static_cast<float>(_mm_cvtsi128_si32(_mm512_castsi512_si128(a)));
#else
        __m256i acc[10], x = _mm256_set1_epi8(3), y = _mm256_set1_epi8(5);
        for (auto &a : acc) a = _mm256_setzero_si256();
        const double begin = seconds();
        for (int i = 0; i < steps; i++)
            for (auto &a : acc) {
                __asm__("" : "+x"(x));
                a = _mm256_add_epi16(a, _mm256_maddubs_epi16(x, y));
                __asm__("" : "+x"(a));
            }
        const double found = 10.0 * 64 * steps / (seconds() - begin) * 1e-9;
        for (auto &a : acc) sink = sink + static_cast<float>(_mm256_extract_epi32(a, 0));
#endif
        best = found > best ? found : best;
    }
    return best;
}

int main() {
    printf("%.3f %.3f %.3f\n", best_read(), best_fma(), best_int8());
    return 0;
}
