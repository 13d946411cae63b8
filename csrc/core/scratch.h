// Memory that one thread reuses from call to call: 64-byte aligned, grown on demand, given back above a bound.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace ranvier {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // nullptr when memory is out. The content is not kept.
  void* reserve(std::size_t bytes) {
    if (bytes == 0) bytes = 1;
    if (bytes <= capacity_ && (capacity_ <= kKeep || bytes > kKeep)) return data_;
    std::free(data_);
    capacity_ = (bytes + 63) / 64 * 64;
    data_ = std::aligned_alloc(64, capacity_);
    if (data_ == nullptr) capacity_ = 0;
    return data_;
  }

 private:
  static constexpr std::size_t kKeep = std::size_t{32} << 20;
  void* data_ = nullptr;
  std::size_t capacity_ = 0;
};

}  // namespace ranvier
