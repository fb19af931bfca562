// Working memory of one model: grows to the largest step seen, and is carved anew for each.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

class Scratch {
  public:
    ~Scratch() { std::free(memory_); }

    // Room for at least `bytes`, aligned to 64; null where there is none. What it held before is lost.
    uint8_t *reserve(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            const size_t rounded = (static_cast<size_t>(bytes) + 63) / 64 * 64;
            memory_ = static_cast<uint8_t *>(std::aligned_alloc(64, rounded));
            size_ = memory_ ? bytes : 0;
        }
        return memory_;
    }

  private:
    uint8_t *memory_ = nullptr;
    int64_t size_ = 0;
};

// Deals out pieces of one reservation; with a null start it only counts what they take.
class Carver {
  public:
    explicit Carver(uint8_t *memory) : memory_(memory) {}
    template <class T> T *take(int64_t count) {
        uint8_t *at = memory_ ? memory_ + used_ : nullptr;
        used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return reinterpret_cast<T *>(at);
    }
    int64_t used() const { return used_; }

  private:
    uint8_t *memory_;
    int64_t used_ = 0;
};
