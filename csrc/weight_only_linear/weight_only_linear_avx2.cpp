#include "weight_only_linear/encode_digits.h"

namespace ranvier {

extern "C" void encode_digits_avx2(const DigitRow& row) { encode_digits_here(row); }

}  // namespace ranvier
