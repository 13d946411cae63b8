// flash_attention, any processor.
#include "core/lanes_scalar.h"
#include "flash_attention/flash_tile.h"

namespace ranvier {
namespace {

struct Lanes : FloatLanes {
  static constexpr int kVectors = 1;
};

}  // namespace

extern "C" void flash_attention_tile_scalar(const FlashTile& tile) { attend_tile<Lanes>(tile); }

}  // namespace ranvier
