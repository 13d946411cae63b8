#include "core/parallel.h"

#include <pthread.h>

namespace ranvier {
namespace {

std::atomic<ParallelFor> g_parallel_for{nullptr};
std::atomic<NumThreads> g_num_threads{nullptr};

// A forked child has the pool's book-keeping and none of its threads: it would wait for them for ever.
void forget_pool() { g_parallel_for.store(nullptr); }

}  // namespace

void set_parallel(ParallelFor parallel_for, NumThreads num_threads) {
  [[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
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
