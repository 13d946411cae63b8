// The limits a kernel is judged by, measured with the library's own threads: how fast registers-only dot products issue
// and how fast memory is read.
#pragma once

#include <cstdint>

namespace ranvier {

// Multiply-accumulates done by each thread in one call of its level's dot loop (8-bit operands, 32-bit sums).
std::int64_t machine_dot(std::int64_t iterations);
// Reads `bytes` once, shared among the threads; returns a checksum so that no read can be dropped.
std::int64_t machine_read(const void* data, std::int64_t bytes);

extern "C" {
std::int64_t machine_dot_avx512vnni(std::int64_t iterations);
std::int64_t machine_dot_avx2(std::int64_t iterations);
std::int64_t machine_read_avx512(const void* data, std::int64_t bytes);
}

}  // namespace ranvier
