#include "machine/machine.h"

#include "core/isa.h"
#include "core/parallel.h"

namespace ranvier {
namespace {

std::int64_t dot_scalar(std::int64_t iterations) {
  std::int32_t sum = 0;
  for (std::int64_t k = 0; k < iterations; ++k) {
    sum += static_cast<std::int32_t>(k & 15) * -1;
    __asm__ volatile("" : "+r"(sum));
  }
  return iterations;
}

std::int64_t read_scalar(const void* data, std::int64_t bytes) {
  const std::int64_t* words = static_cast<const std::int64_t*>(data);
  std::int64_t sum = 0;
  for (std::int64_t k = 0; k < bytes / 8; ++k) sum ^= words[k];
  return sum;
}

}  // namespace

std::int64_t machine_dot(std::int64_t iterations) {
  auto run = dot_scalar;
#if defined(RANVIER_X86)
  if (active_isa() >= Isa::avx512vnni) {
    run = machine_dot_avx512vnni;
  } else if (active_isa() >= Isa::avx2) {
    run = machine_dot_avx2;
  }
#endif
  const std::int64_t threads = num_threads();
  std::atomic<std::int64_t> total{0};
  parallel_tasks(threads, threads == 1, [&](std::int64_t) { total += run(iterations); });
  return total;
}

std::int64_t machine_read(const void* data, std::int64_t bytes) {
  auto run = read_scalar;
#if defined(RANVIER_X86)
  if (active_isa() >= Isa::avx512vnni) run = machine_read_avx512;
#endif
  constexpr std::int64_t kPart = std::int64_t{64} << 10;
  std::atomic<std::int64_t> total{0};
  parallel_tasks((bytes + kPart - 1) / kPart, false, [&](std::int64_t i) {
    const std::int64_t left = bytes - i * kPart;
    total += run(static_cast<const char*>(data) + i * kPart, left < kPart ? left : kPart);
  });
  return total;
}

}  // namespace ranvier
