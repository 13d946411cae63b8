// hadamard, portable C++: the twin that every other level equals bit for bit.
#include "hadamard/hadamard_row.h"

namespace ranvier {

extern "C" void hadamard_rows_scalar(const HadamardRows& h, std::int64_t begin, std::int64_t end, float* work) {
  for (std::int64_t row = begin; row < end; ++row) hadamard_row(h, row, work);
}

}  // namespace ranvier
