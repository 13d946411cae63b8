// Threads are torch's own: the addresses of torch_parallel_for and torch_get_num_threads are handed in once, so that
// torch.set_num_threads is obeyed and one OpenMP runtime lives in the process. Without them, and in a forked child,
// everything runs serially.
#pragma once

#include <atomic>
#include <cstdint>

namespace ranvier {

using RangeFn = void (*)(std::int64_t begin, std::int64_t end, void* context);
using ParallelFor = std::int32_t (*)(std::int64_t begin, std::int64_t end, std::int64_t grain, RangeFn fn, void* context);
using NumThreads = std::int32_t (*)(std::uint32_t* count);

void set_parallel(ParallelFor parallel_for, NumThreads num_threads);
std::int64_t num_threads();
void parallel_range(std::int64_t begin, std::int64_t end, RangeFn fn, void* context);

// fn(i) for i in [0, tasks), handed out one at a time: a core that is busy elsewhere takes fewer. Which thread runs a
// task never changes its result.
template <class Fn>
void parallel_tasks(std::int64_t tasks, bool serial, const Fn& fn) {
  const std::int64_t threads = serial ? 1 : num_threads();
  if (threads <= 1 || tasks <= 1) {
    for (std::int64_t i = 0; i < tasks; ++i) fn(i);
    return;
  }
  struct Context {
    const Fn* fn;
    std::int64_t tasks;
    std::atomic<std::int64_t> next;
  } context{&fn, tasks, {0}};
  parallel_range(
      0, threads < tasks ? threads : tasks,
      [](std::int64_t begin, std::int64_t end, void* opaque) {
        auto& shared = *static_cast<Context*>(opaque);
        (void)begin, (void)end;
        for (std::int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.tasks;) (*shared.fn)(i);
      },
      &context);
}

}  // namespace ranvier
