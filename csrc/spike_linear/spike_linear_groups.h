// Walking the ranges and groups of a product, shared by the kernels of every level (internal linkage, see core/numeric.h).
#pragma once

#include "spike_linear/spike_linear.h"

namespace ranvier {
namespace {

// One range of channels: blocks [begin, end), in groups of `step` blocks, the last one shorter. A group shares a weight scale.
struct WeightRange {
  std::int64_t range, begin, end, step;
  std::int64_t index;  // of its first group
};

// fn(range), in the order of the codes
template <class Fn>
RANVIER_INLINE void for_each_range(const SpikeFormat& f, const Fn& fn) {
  std::int64_t begin = 0, index = 0;
  for (std::int64_t r = 0; r < f.ranges; ++r) {
    const std::int64_t end = begin + f.blocks(r);
    fn(WeightRange{r, begin, end, f.group == 0 ? f.blocks(r) : f.group / 4, index});
    begin = end, index += f.groups(r);
  }
}

// fn(index, first block, one past the last block) for every group
template <class Fn>
RANVIER_INLINE void for_each_group(const WeightRange& w, const Fn& fn) {
  std::int64_t index = w.index;
  for (std::int64_t b = w.begin; b < w.end; b += w.step, ++index) fn(index, b, b + w.step < w.end ? b + w.step : w.end);
}

}  // namespace
}  // namespace ranvier
