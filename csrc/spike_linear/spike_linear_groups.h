// Walking the groups of a product, shared by the kernels of every level (internal linkage, see core/numeric.h).
#pragma once

#include "spike_linear/spike_linear.h"

namespace ranvier {
namespace {

// fn(range, index of the group, first block, one past the last block)
template <class Fn>
RANVIER_INLINE void for_each_weight_group(const SpikeFormat& f, const Fn& fn) {
  std::int64_t index = 0, first = 0;
  for (std::int64_t r = 0; r < f.ranges; ++r) {
    const std::int64_t end = first + f.blocks(r), step = f.group == 0 ? f.blocks(r) : f.group / 4;
    for (std::int64_t b = first; b < end; b += step, ++index) fn(r, index, b, b + step < end ? b + step : end);
    first = end;
  }
}

}  // namespace
}  // namespace ranvier
