// A fixed team of threads for the parallel parts of one step; the caller is one of them.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
  public:
    typedef void (*Task)(void *context, int64_t begin, int64_t end, int thread);

    explicit Pool(int num_threads);
    ~Pool();
    int size() const { return num_threads_; }

    // Split [0, count) into runs of at least `grain`, handed out in order to whoever is free. Returns when all are done.
    // What a run computes must not depend on who computes it. Tasks must not throw. One caller at a time.
    void run(Task task, void *context, int64_t count, int64_t grain);

  private:
    void work(int thread);
    void take(int thread);

    const int num_threads_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> round_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> num_busy_{0};
    std::atomic<bool> stop_{false};
    Task task_ = nullptr;
    void *context_ = nullptr;
    int64_t count_ = 0, grain_ = 1;
};
