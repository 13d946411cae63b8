// flash_attention, AVX-512: twenty-four registers of sums.
#include "core/lanes_avx512.h"
#include "flash_attention/flash_tile.h"

namespace ranvier {
namespace {

struct Lanes : FloatLanes {
  static constexpr int kVectors = 4;
};

}  // namespace

extern "C" void flash_attention_tile_avx512(const FlashTile& tile) { attend_tile<Lanes>(tile); }

}  // namespace ranvier
