#include "pool.h"

#include <chrono>

namespace {

// Between two parallel parts of a step lie microseconds: spin that long before going to sleep.
constexpr auto kSpin = std::chrono::microseconds(100);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

Pool::Pool(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads) {
    for (int i = 1; i < num_threads_; i++) threads_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto &thread : threads_) thread.join();
}

void Pool::run(Task task, void *context, int64_t count, int64_t grain) {
    if (count <= 0) return;
    if (num_threads_ == 1 || count <= grain) {
        task(context, 0, count, 0);
        return;
    }
    task_ = task, context_ = context, count_ = count, grain_ = grain < 1 ? 1 : grain;
    next_ = 0;
    num_busy_ = num_threads_ - 1;
    {
        // Under the lock, so that a thread that is just going to sleep sees the new round or the wake-up.
        std::lock_guard<std::mutex> lock(mutex_);
        round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take(0);
    while (num_busy_.load(std::memory_order_acquire) > 0) relax();
}

void Pool::take(int thread) {
    for (;;) {
        const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
        if (begin >= count_) return;
        task_(context_, begin, begin + grain_ < count_ ? begin + grain_ : count_, thread);
    }
}

void Pool::work(int thread) {
    uint64_t seen = 0;
    while (true) {
        const auto give_up = std::chrono::steady_clock::now() + kSpin;
        while (round_.load(std::memory_order_acquire) == seen && !stop_) {
            relax();
            if (std::chrono::steady_clock::now() < give_up) continue;
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen || stop_; });
        }
        if (stop_) return;
        seen = round_.load(std::memory_order_acquire);
        take(thread);
        num_busy_.fetch_sub(1, std::memory_order_acq_rel);
    }
}
