// SeqLock: a value that one thread writes without ever waiting, and that others read whole.
#ifndef KERNELS_BASE_SEQ_LOCK_H_
#define KERNELS_BASE_SEQ_LOCK_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dejavu {

// A reader tries again while the value is being written.
template <typename T>
class SeqLock {
 public:
  void Store(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    uint64_t words[kWords] = {};
    std::memcpy(words, &value, sizeof(T));
    const uint64_t version = version_.load(std::memory_order_relaxed);
    version_.store(version + 1, std::memory_order_relaxed);
    for (size_t i = 0; i < kWords; ++i) words_[i].store(words[i], std::memory_order_release);
    version_.store(version + 2, std::memory_order_release);
  }

  T Load() const {
    uint64_t words[kWords];
    uint64_t before, after;
    do {
      before = version_.load(std::memory_order_acquire);
      for (size_t i = 0; i < kWords; ++i) words[i] = words_[i].load(std::memory_order_acquire);
      after = version_.load(std::memory_order_relaxed);
    } while (before != after || before % 2 != 0);
    T value;
    std::memcpy(&value, words, sizeof(T));
    return value;
  }

 private:
  static constexpr size_t kWords = (sizeof(T) + 7) / 8;
  std::atomic<uint64_t> version_{0};  // odd: being written
  std::array<std::atomic<uint64_t>, kWords> words_{};
};

}  // namespace dejavu

#endif  // KERNELS_BASE_SEQ_LOCK_H_
