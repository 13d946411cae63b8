// Walking the groups of a product, shared by the kernels of every level (internal linkage, see core/numeric.h).
#pragma once

#include "spike_linear/spike_linear.h"

namespace ranvier {
namespace {

// Groups of channels that share a weight scale, in the order of the codes. Blocks [begin, end) lie in one range.
struct WeightGroup {
  std::int64_t range, index, begin, end;
  bool first, last;  // of its range
};

// fn(group)
template <class Fn>
RANVIER_INLINE void for_each_weight_group(const SpikeFormat& f, const Fn& fn) {
  std::int64_t index = 0, first = 0;
  for (std::int64_t r = 0; r < f.ranges; ++r) {
    const std::int64_t end = first + f.blocks(r), step = f.group == 0 ? f.blocks(r) : f.group / 4;
    for (std::int64_t b = first; b < end; b += step, ++index) {
      fn(WeightGroup{r, index, b, b + step < end ? b + step : end, b == first, b + step >= end});
    }
    first = end;
  }
}

}  // namespace
}  // namespace ranvier
