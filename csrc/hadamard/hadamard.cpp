#include "hadamard/hadamard.h"

#include <atomic>
#include <cmath>

#include "core/isa.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace ranvier {
namespace {

constexpr std::int64_t kSerialValues = 1 << 15;  // below, waking a thread costs more than it saves
constexpr std::int64_t kTaskValues = 1 << 14;

HadamardRun hadamard_rows() {
#if defined(RANVIER_X86)
  const Isa isa = active_isa();
  if (isa >= Isa::avx512) return hadamard_rows_avx512;
  if (isa >= Isa::avx2) return hadamard_rows_avx2;
#endif
  return hadamard_rows_scalar;
}

bool fits(std::int64_t rows, std::int64_t n, std::int64_t core) {
  if (rows < 0 || n < 1 || core < 1 || n % core != 0) return false;
  const std::int64_t piece = n / core;
  return (piece & (piece - 1)) == 0;
}

}  // namespace

Status hadamard(const void* x, void* y, std::int64_t rows, std::int64_t n, std::int64_t core, const float* matrix,
                DType dtype) {
  if (!fits(rows, n, core)) return Status::bad_shape;
  if (dtype != DType::float32 && dtype != DType::bfloat16 && dtype != DType::float16) return Status::bad_dtype;
  if (rows == 0) return Status::ok;
  if (x == nullptr || y == nullptr || (core > 1 && matrix == nullptr)) return Status::null_pointer;
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
  const HadamardRows h{x, y, dtype, rows, n, core, matrix, scale};
  const HadamardRun run = hadamard_rows();
  const std::int64_t step = n < kTaskValues ? kTaskValues / n : 1;
  std::atomic<bool> failed{false};
  parallel_tasks((rows + step - 1) / step, rows * n < kSerialValues, [&](std::int64_t task) {
    static thread_local Scratch scratch;
    float* work = static_cast<float*>(scratch.reserve(static_cast<std::size_t>(n) * sizeof(float)));
    if (work == nullptr) {
      failed = true;
      return;
    }
    const std::int64_t begin = task * step, end = begin + step < rows ? begin + step : rows;
    run(h, begin, end, work);
  });
  return failed ? Status::out_of_memory : Status::ok;
}

}  // namespace ranvier
