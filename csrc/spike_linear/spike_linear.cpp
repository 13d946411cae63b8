// The calls around the kernels: panels, scratch memory, how the work is shared among threads.
#include "spike_linear/spike_linear.h"

#include <utility>

#include "core/isa.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "ternary_linear/ternary_linear.h"

namespace ranvier {
namespace {

// Below this many multiply-accumulates (or encoded channels) waking a second thread costs more than it saves.
constexpr std::int64_t kSerialProducts = 1'000'000, kSerialChannels = 32'768;

std::int64_t align64(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Encoding {
  float* scale;
  std::int32_t* sums;
  std::int32_t* zero;
  std::int8_t* panels;
  std::int64_t bytes;
};

Encoding encoding_at(const SpikeFormat& f, std::int64_t M, void* base) {
  char* at = static_cast<char*>(base);
  const auto take = [&at](std::int64_t bytes) { return std::exchange(at, at + align64(bytes)); };
  Encoding e{};
  e.scale = reinterpret_cast<float*>(take(M * f.ranges * 4));
  e.sums = reinterpret_cast<std::int32_t*>(take(M * f.group_count() * 4));
  e.zero = f.compat ? reinterpret_cast<std::int32_t*>(take(M * f.ranges * 4)) : nullptr;
  e.panels = reinterpret_cast<std::int8_t*>(take(M * 4 * f.block_count()));
  e.bytes = at - static_cast<char*>(base);
  return e;
}

Status check_format(const SpikeFormat& f) {
  const bool ok = f.K > 0 && f.low >= 0 && f.low <= f.K && (f.ranges == 1 || (f.ranges == 2 && f.low > 0 && f.low < f.K)) &&
                  f.group >= 0 && f.group % 4 == 0 && f.act_bits >= 1 && f.act_bits <= 8 && f.steps >= 1 && f.act_clip > 0.0f &&
                  f.act_clip <= 1.0f && f.code_bound(0) <= 127 && f.code_bound(f.ranges - 1) <= 127;
  return ok ? Status::ok : Status::bad_shape;
}

// The kernels place a token's codes by its mask: one that marks other than K - low channels would lead them out of the row.
Status check_tokens(const SpikeFormat& f, const std::uint8_t* mask) {
  if (const Status s = check_format(f); s != Status::ok) return s;
  if (mask == nullptr) return f.ranges == 1 && f.low == f.K ? Status::ok : Status::null_pointer;
  std::int64_t marked = 0;
  for (std::int64_t k = 0; k < f.K; ++k) marked += mask[k] != 0;
  return marked == f.K - f.low ? Status::ok : Status::bad_mask;
}

SpikeProduct product(const SpikeLayer& layer, std::int64_t M, const Encoding& e, void* y, DType y_dtype) {
  SpikeProduct p{};
  p.format = layer.format;
  p.M = M, p.N = layer.N;
  p.panels = e.panels, p.scale = e.scale, p.sums = e.sums, p.zero = e.zero;
  p.weight = reinterpret_cast<const std::uint8_t*>(layer.weight);
  p.weight_scale = reinterpret_cast<const float*>(layer.weight_scale);
  p.weight_zero = reinterpret_cast<const std::uint8_t*>(layer.weight_zero);
  p.weight_sum = reinterpret_cast<const std::int32_t*>(layer.weight_sum);
  p.bias = reinterpret_cast<const void*>(layer.bias);
  p.bias_dtype = static_cast<DType>(layer.bias_dtype);
  p.y = y, p.y_dtype = y_dtype;
  return p;
}

// A layer's kernel; nullptr where its weights do not go with its format.
SpikeLinearBlock kernel_of(const SpikeLayer& layer) {
  if (layer.weight_bits == 4) return spike_linear_block();
  return layer.weight_bits == 2 && is_ternary_format(layer.format) ? ternary_linear_block() : nullptr;
}

Status check_product(const SpikeProduct& p) {
  if (p.M == 0 || p.N == 0) return Status::ok;
  if (p.weight == nullptr || p.weight_scale == nullptr || p.weight_zero == nullptr || p.y == nullptr)
    return Status::null_pointer;
  return p.format.compat && p.weight_sum == nullptr ? Status::null_pointer : Status::ok;
}

// Products of the same tokens, one after the other in one sequence of tasks.
Status run(const SpikeProduct* products, const SpikeLinearBlock* kernels, std::int64_t count) {
  std::int64_t blocks = 0, outputs = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (kernels[i] == nullptr) return Status::bad_shape;
    if (const Status s = check_product(products[i]); s != Status::ok) return s;
    blocks += (products[i].N + kOutputBlock - 1) / kOutputBlock;
    outputs += products[i].N;
  }
  const SpikeProduct& shape = products[0];
  if (shape.M == 0 || outputs == 0) return Status::ok;
  const std::int64_t tiles = shape.tiles();
  // Few outputs: share the tokens too, so that every thread finds several tasks.
  const std::int64_t wanted = 8 * num_threads(), most = tiles < 1 ? 1 : tiles;
  std::int64_t parts = blocks >= wanted ? 1 : (wanted + blocks - 1) / blocks;
  parts = parts < most ? parts : most;
  parallel_tasks(blocks * parts, shape.M * outputs * shape.format.K < kSerialProducts, [&](std::int64_t task) {
    std::int64_t block = task / parts;
    const std::int64_t part = task % parts;
    std::int64_t i = 0;
    for (std::int64_t own; block >= (own = (products[i].N + kOutputBlock - 1) / kOutputBlock); ++i) block -= own;
    kernels[i](products[i], block, part * tiles / parts, (part + 1) * tiles / parts);
  });
  return Status::ok;
}

Status run_one(const SpikeProduct& p, SpikeLinearBlock kernel) { return run(&p, &kernel, 1); }

void clear_padding(const SpikeFormat& f, std::int8_t* row) {
  for (std::int64_t r = 0, at = 0; r < f.ranges; ++r) {
    for (std::int64_t k = f.range_length(r); k < 4 * f.blocks(r); ++k) row[at + k] = 0;
    at += 4 * f.blocks(r);
  }
}

void interleave(const std::int8_t* rows, std::int64_t count, std::int64_t blocks, std::int8_t* panel) {
  const std::int32_t* from = reinterpret_cast<const std::int32_t*>(rows);
  std::int32_t* to = reinterpret_cast<std::int32_t*>(panel);
  for (std::int64_t b = 0; b < blocks; ++b) {
    for (std::int64_t i = 0; i < count; ++i) to[b * count + i] = from[i * blocks + b];
  }
}

// Whether no code is larger than the kernels' 16-bit sums have room for; 8-bit codes all are.
bool within(const std::int8_t* codes, std::int64_t count, std::int64_t bound) {
  if (bound >= 127) return true;
  std::int8_t low = 0, high = 0;
  for (std::int64_t k = 0; k < count; ++k) {
    low = codes[k] < low ? codes[k] : low;
    high = codes[k] > high ? codes[k] : high;
  }
  return low >= -bound && high <= bound;
}

// Fills the panel of every tile; write(token, destination of its padded row).
template <class Write>
Status fill_panels(const SpikeFormat& f, std::int64_t M, std::int8_t* panels, const Write& write) {
  SpikeProduct shape{};
  shape.format = f, shape.M = M;
  const std::int64_t row_bytes = 4 * f.block_count();
  std::atomic<bool> failed{false};
  parallel_tasks(shape.tiles(), M * f.K < kSerialChannels, [&](std::int64_t t) {
    const std::int64_t begin = shape.tile_begin(t), count = shape.tile_begin(t + 1) - begin;
    std::int8_t* panel = panels + begin * row_bytes;
    static thread_local Scratch scratch;
    std::int8_t* rows =
        count == 1 ? panel : static_cast<std::int8_t*>(scratch.reserve(static_cast<std::size_t>(count * row_bytes)));
    if (rows == nullptr) {
      failed = true;
      return;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      write(begin + i, rows + i * row_bytes);
      clear_padding(f, rows + i * row_bytes);
    }
    if (count > 1) interleave(rows, count, f.block_count(), panel);
  });
  return failed ? Status::out_of_memory : Status::ok;
}

const char* offset(const void* base, std::int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * (dtype == DType::float32 ? 4 : 2);
}

struct PlainRows {
  const void* x;
  std::int64_t stride;
  DType dtype;
};

const void* plain_row(const void* context, std::int64_t m) {
  const auto& rows = *static_cast<const PlainRows*>(context);
  return offset(rows.x, m * rows.stride, rows.dtype);
}

}  // namespace

SpikeLinearBlock spike_linear_block() {
#if defined(RANVIER_X86)
  const Isa isa = active_isa();
  if (isa >= Isa::avx512vnni) return spike_linear_block_avx512vnni;
  if (isa >= Isa::avx2) return spike_linear_block_avx2;
#endif
  return spike_linear_block_scalar;
}

Status spike_encode(const SpikeFormat& f, const std::uint8_t* mask, const void* x, std::int64_t x_stride, DType dtype,
                    std::int64_t M, std::int8_t* codes, float* scale, std::int32_t* sums, std::int32_t* zero) {
  if (M > 0 && x == nullptr) return Status::null_pointer;
  const PlainRows rows{x, x_stride, dtype};
  return spike_encode(f, mask, SpikeSource{plain_row, &rows, dtype}, M, codes, scale, sums, zero);
}

Status spike_encode(const SpikeFormat& f, const std::uint8_t* mask, const SpikeSource& source, std::int64_t M,
                    std::int8_t* codes, float* scale, std::int32_t* sums, std::int32_t* zero) {
  if (const Status s = check_tokens(f, mask); s != Status::ok) return s;
  const SpikeEncodeRow encode = spike_encode_row();
  const std::int64_t groups = f.group_count();
  parallel_tasks(M, M * f.K < kSerialChannels, [&](std::int64_t m) {
    encode(f, SpikeRow{source.row(source.context, m), source.dtype, mask, codes + m * f.K, f.low, scale + m * f.ranges,
                       sums + m * groups, zero == nullptr ? nullptr : zero + m * f.ranges});
  });
  return Status::ok;
}

Status spike_linear(const SpikeLayer& layer, const std::int8_t* codes, const float* scale, const std::int32_t* sums,
                    const std::int32_t* zero, std::int64_t M, void* y, DType y_dtype) {
  const SpikeFormat& f = layer.format;
  if (const Status s = check_format(f); s != Status::ok) return s;
  static thread_local Scratch scratch;
  void* memory = scratch.reserve(static_cast<std::size_t>(M * 4 * f.block_count()));
  if (memory == nullptr) return Status::out_of_memory;
  Encoding e{const_cast<float*>(scale), const_cast<std::int32_t*>(sums), f.compat ? const_cast<std::int32_t*>(zero) : nullptr,
             static_cast<std::int8_t*>(memory), 0};
  std::atomic<bool> too_large{false};
  const Status filled = fill_panels(f, M, e.panels, [&](std::int64_t m, std::int8_t* row) {
    const std::int8_t* from = codes + m * f.K;
    for (std::int64_t r = 0; r < f.ranges; ++r) {
      std::int8_t* to = row + (r == 0 ? 0 : 4 * f.blocks(0));
      const std::int64_t length = f.range_length(r);
      std::memcpy(to, from, static_cast<std::size_t>(length));
      if (!within(to, length, f.code_bound(r))) too_large = true;
      from += length;
    }
  });
  if (too_large) return Status::bad_codes;
  return filled == Status::ok ? run_one(product(layer, M, e, y, y_dtype), kernel_of(layer)) : filled;
}

std::int64_t spike_encoding_bytes(const SpikeFormat& f, std::int64_t M) { return encoding_at(f, M, nullptr).bytes; }

Status spike_encode_panels(const SpikeFormat& f, const std::uint8_t* mask, const void* x, std::int64_t x_stride, DType dtype,
                           std::int64_t M, void* encoding) {
  if (M > 0 && x == nullptr) return Status::null_pointer;
  const PlainRows rows{x, x_stride, dtype};
  return spike_encode_panels(f, mask, SpikeSource{plain_row, &rows, dtype}, M, encoding);
}

Status spike_encode_panels(const SpikeFormat& f, const std::uint8_t* mask, const SpikeSource& source, std::int64_t M,
                           void* encoding) {
  if (const Status s = check_tokens(f, mask); s != Status::ok) return s;
  const Encoding e = encoding_at(f, M, encoding);
  const SpikeEncodeRow encode = spike_encode_row();
  const std::int64_t groups = f.group_count();
  return fill_panels(f, M, e.panels, [&](std::int64_t m, std::int8_t* row) {
    encode(f, SpikeRow{source.row(source.context, m), source.dtype, mask, row, 4 * f.blocks(0), e.scale + m * f.ranges,
                       e.sums + m * groups, e.zero == nullptr ? nullptr : e.zero + m * f.ranges});
  });
}

Status spike_linear_panels(const SpikeLayer& layer, const void* encoding, std::int64_t M, void* y, DType y_dtype) {
  if (const Status s = check_format(layer.format); s != Status::ok) return s;
  const Encoding e = encoding_at(layer.format, M, const_cast<void*>(encoding));
  return run_one(product(layer, M, e, y, y_dtype), kernel_of(layer));
}

Status spike_linear_pair(const SpikeLayer& first, const SpikeLayer& second, const void* encoding, std::int64_t M, void* y_first,
                         void* y_second, DType y_dtype) {
  if (std::memcmp(&first.format, &second.format, sizeof(SpikeFormat)) != 0) return Status::bad_shape;
  if (const Status s = check_format(first.format); s != Status::ok) return s;
  const Encoding e = encoding_at(first.format, M, const_cast<void*>(encoding));
  const SpikeProduct products[2] = {product(first, M, e, y_first, y_dtype), product(second, M, e, y_second, y_dtype)};
  const SpikeLinearBlock kernels[2] = {kernel_of(first), kernel_of(second)};
  return run(products, kernels, 2);
}

Status spike_linear_dynamic(const SpikeLayer& layer, const void* x, std::int64_t x_stride, DType dtype, std::int64_t M, void* y,
                            DType y_dtype) {
  static thread_local Scratch scratch;
  void* encoding = scratch.reserve(static_cast<std::size_t>(spike_encoding_bytes(layer.format, M)));
  if (encoding == nullptr) return Status::out_of_memory;
  const auto* mask = reinterpret_cast<const std::uint8_t*>(layer.mask);
  const Status encoded = spike_encode_panels(layer.format, mask, x, x_stride, dtype, M, encoding);
  return encoded == Status::ok ? spike_linear_panels(layer, encoding, M, y, y_dtype) : encoded;
}

}  // namespace ranvier
