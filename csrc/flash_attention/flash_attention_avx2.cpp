// flash_attention, AVX2 + FMA: twelve registers of sums.
#include "core/lanes_avx2.h"
#include "flash_attention/flash_tile.h"

namespace ranvier {
namespace {

struct Lanes : FloatLanes {
  static constexpr int kVectors = 1;
};

}  // namespace

extern "C" void flash_attention_tile_avx2(const FlashTile& tile) { attend_tile<Lanes>(tile); }

}  // namespace ranvier
