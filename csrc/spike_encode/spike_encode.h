// spike_encode: one token [K] becomes int8 spike codes, a scale per channel range and a code sum per group.
//
// Codes follow the Generalized Integrate-and-Fire rule: `steps` time steps of 2^act_bits levels on salient channels, one
// step elsewhere. With one range the channels keep their order; with two, the channels that are not salient come first and
// the salient ones after them, both in ascending order.
#pragma once

#include <cstdint>

#include "core/numeric.h"

namespace ranvier {

struct SpikeFormat {
  std::int64_t K;         // channels
  std::int64_t low;       // channels that are not salient
  std::int64_t ranges;    // 1, or 2 when salient channels have a scale of their own
  std::int64_t group;     // channels per code sum, a multiple of 4; 0: one sum per range
  std::int64_t act_bits;  // 8: symmetric
  std::int64_t steps;     // T
  std::int64_t separate;  // salient channels take a symmetric 8-bit range of their own
  std::int64_t compat;    // raw unsigned codes and the released quantizer's range
  float act_clip = 1.0f;  // share of a range that codes span, above 0 to 1; values beyond it saturate
  std::int32_t padding = 0;

  RANVIER_INLINE std::int64_t range_length(std::int64_t r) const { return ranges == 1 ? K : (r == 0 ? low : K - low); }
  RANVIER_INLINE std::int64_t groups(std::int64_t r) const { return group == 0 ? 1 : (range_length(r) + group - 1) / group; }
  RANVIER_INLINE std::int64_t group_count() const { return groups(0) + (ranges == 2 ? groups(1) : 0); }
  RANVIER_INLINE bool grouped() const { return group_count() > ranges; }
  // Four channels share one 32-bit lane of a dot product; a range's last block is filled up with zero codes.
  RANVIER_INLINE std::int64_t blocks(std::int64_t r) const { return (range_length(r) + 3) / 4; }
  RANVIER_INLINE std::int64_t block_count() const { return blocks(0) + (ranges == 2 ? blocks(1) : 0); }

  RANVIER_INLINE std::int64_t level_count() const { return (std::int64_t{1} << act_bits) - 1; }
  RANVIER_INLINE bool symmetric(std::int64_t r) const {
    if (act_bits == 8) return true;
    return separate != 0 && (ranges == 2 ? r == 1 : low == 0);
  }
  // The largest magnitude that a code of range r can have.
  RANVIER_INLINE std::int64_t code_bound(std::int64_t r) const {
    if (symmetric(r)) return 127;
    if (separate != 0) return level_count();
    if (compat == 0) return steps * level_count();
    const bool salient = ranges == 2 ? r == 1 : low == 0;
    return salient ? (steps << act_bits) - 1 : level_count();
  }
};

struct SpikeRow {
  const void* x;
  DType dtype;
  const std::uint8_t* mask;     // [K], non-zero where salient; nullptr: nowhere
  std::int8_t* codes;           // [K]
  std::int64_t salient_offset;  // where the second range's codes start
  float* scale;                 // [ranges]
  std::int32_t* sums;           // [groups]
  std::int32_t* zero;           // [ranges]; written for compat only, may be nullptr otherwise
};

using SpikeEncodeRow = void (*)(const SpikeFormat&, const SpikeRow&);

// The implementation of the active level.
SpikeEncodeRow spike_encode_row();

extern "C" {
void spike_encode_row_scalar(const SpikeFormat& format, const SpikeRow& row);
void spike_encode_row_avx2(const SpikeFormat& format, const SpikeRow& row);
void spike_encode_row_avx512(const SpikeFormat& format, const SpikeRow& row);
}

}  // namespace ranvier
