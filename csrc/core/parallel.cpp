#include "core/parallel.h"

namespace ranvier {
namespace {

std::atomic<ParallelFor> g_parallel_for{nullptr};
std::atomic<NumThreads> g_num_threads{nullptr};

}  // namespace

void set_parallel(ParallelFor parallel_for, NumThreads num_threads) {
  g_num_threads.store(num_threads);
  g_parallel_for.store(parallel_for);
}

std::int64_t num_threads() {
  const NumThreads query = g_num_threads.load(std::memory_order_relaxed);
  std::uint32_t count = 1;
  if (query == nullptr || g_parallel_for.load(std::memory_order_relaxed) == nullptr || query(&count) != 0) return 1;
  return count;
}

void parallel_range(std::int64_t begin, std::int64_t end, RangeFn fn, void* context) {
  const ParallelFor run = g_parallel_for.load(std::memory_order_relaxed);
  if (run == nullptr || run(begin, end, 1, fn, context) != 0) fn(begin, end, context);
}

}  // namespace ranvier
