// The call around the tiles: keys and values of some heads packed as float32, then tiles shared among threads, the longest
// first.
#include "flash_attention/flash_attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include "core/exp2.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace ranvier {
namespace {

constexpr std::int64_t kSerialProducts = 300'000;              // below, waking a thread costs more than it saves
constexpr std::int64_t kPackedFloats = std::int64_t{4} << 20;  // packed at once: heads are taken in rounds that fit

FlashTileRun flash_tile() {
#if defined(RANVIER_X86)
  const Isa isa = active_isa();
  if (isa >= Isa::avx512) return flash_attention_tile_avx512;
  if (isa >= Isa::avx2) return flash_attention_tile_avx2;
#endif
  return flash_attention_tile_scalar;
}

template <DType D>
void pack_keys(const void* from, std::int64_t stride, std::int64_t tokens, std::int64_t channels, float* to) {
  for (std::int64_t t = 0; t < kFlashKeys; ++t) {
    for (std::int64_t d = 0; d < channels; ++d) {
      to[d * kFlashKeys + t] = t < tokens ? load_float(from, t * stride + d, D) : 0.0f;
    }
  }
}

template <DType D>
void pack_rows(const void* from, std::int64_t stride, std::int64_t tokens, std::int64_t channels, std::int64_t padded,
               float scale, float* to) {
  for (std::int64_t t = 0; t < tokens; ++t, to += padded) {
    for (std::int64_t d = 0; d < channels; ++d) to[d] = load_float(from, t * stride + d, D) * scale;
    for (std::int64_t d = channels; d < padded; ++d) to[d] = 0.0f;
  }
}

template <class Fn>
void by_dtype(std::int64_t dtype, const Fn& fn) {
  switch (static_cast<DType>(dtype)) {
    case DType::float32: return fn(std::integral_constant<DType, DType::float32>{});
    case DType::bfloat16: return fn(std::integral_constant<DType, DType::bfloat16>{});
    case DType::float16: return fn(std::integral_constant<DType, DType::float16>{});
  }
}

class Attention {
 public:
  Attention(const FlashAttention& call, float scale)
      : c_(call),
        scale_(scale * kLog2E),
        run_(flash_tile()),
        padded_((call.D + 15) / 16 * 16),
        blocks_((call.keys + kFlashKeys - 1) / kFlashKeys),
        key_floats_(blocks_ * kFlashKeys * call.D),
        head_floats_(key_floats_ + blocks_ * kFlashKeys * padded_),
        tiles_((call.queries + kFlashRows - 1) / kFlashRows) {}

  Status run() {
    const std::int64_t heads = c_.batch * c_.kv_heads;
    serial_ = heads * (c_.heads / c_.kv_heads) * c_.queries * c_.keys * c_.D < kSerialProducts;
    const std::int64_t round = std::max<std::int64_t>(1, std::min(heads, kPackedFloats / head_floats_));
    static thread_local Scratch scratch;
    packed_ = static_cast<float*>(scratch.reserve(static_cast<std::size_t>(round * head_floats_) * sizeof(float)));
    if (packed_ == nullptr) return Status::out_of_memory;
    for (std::int64_t first = 0; first < heads; first += round) {
      if (const Status s = run_heads(first, std::min(round, heads - first)); s != Status::ok) return s;
    }
    return Status::ok;
  }

 private:
  Status run_heads(std::int64_t first, std::int64_t count) {
    parallel_tasks(count * blocks_, serial_,
                   [&](std::int64_t task) { pack(first + task / blocks_, task / blocks_, task % blocks_); });
    std::atomic<bool> failed{false};
    const std::int64_t group = c_.heads / c_.kv_heads, each = count * group;
    parallel_tasks(each * tiles_, serial_, [&](std::int64_t task) {
      const std::int64_t tile = tiles_ - 1 - task / each, index = task % each / group;
      if (!attend(first + index, index, task % group, tile)) failed = true;
    });
    return failed ? Status::out_of_memory : Status::ok;
  }

  const char* token(std::int64_t base, const std::int64_t* stride, std::int64_t b, std::int64_t h, std::int64_t t) const {
    const std::int64_t size = static_cast<DType>(c_.dtype) == DType::float32 ? 4 : 2;
    return reinterpret_cast<const char*>(base) + size * (b * stride[0] + h * stride[1] + t * stride[2]);
  }

  void pack(std::int64_t head, std::int64_t index, std::int64_t block) const {
    const std::int64_t b = head / c_.kv_heads, h = head % c_.kv_heads, t = block * kFlashKeys;
    const std::int64_t tokens = std::min(kFlashKeys, c_.keys - t);
    float* keys = packed_ + index * head_floats_ + t * c_.D;
    float* values = packed_ + index * head_floats_ + key_floats_ + t * padded_;
    by_dtype(c_.dtype, [&](auto d) {
      pack_keys<d()>(token(c_.k, c_.k_stride, b, h, t), c_.k_stride[2], tokens, c_.D, keys);
      pack_rows<d()>(token(c_.v, c_.v_stride, b, h, t), c_.v_stride[2], tokens, c_.D, padded_, 1.0f, values);
    });
  }

  bool attend(std::int64_t kv_head, std::int64_t index, std::int64_t in_group, std::int64_t tile) const {
    static thread_local Scratch scratch;
    const std::int64_t floats = kFlashRows * padded_;
    auto* q = static_cast<float*>(scratch.reserve(static_cast<std::size_t>(2 * floats + kFlashRows) * sizeof(float)));
    if (q == nullptr) return false;
    float *out = q + floats, *sum = out + floats;
    const std::int64_t b = kv_head / c_.kv_heads, h = kv_head % c_.kv_heads * (c_.heads / c_.kv_heads) + in_group;
    const std::int64_t first = tile * kFlashRows, rows = std::min(kFlashRows, c_.queries - first);
    const std::int64_t padding = (rows + kFlashGroup - 1) / kFlashGroup * kFlashGroup - rows;
    by_dtype(c_.dtype, [&](auto d) {
      pack_rows<d()>(token(c_.q, c_.q_stride, b, h, first), c_.q_stride[2], rows, c_.D, padded_, scale_, q);
    });
    std::memset(q + rows * padded_, 0, static_cast<std::size_t>(padding * padded_) * sizeof(float));
    const std::int64_t visible = c_.causal != 0 ? c_.keys - c_.queries + first + 1 : c_.keys;
    const float* keys = packed_ + index * head_floats_;
    run_({c_.D, padded_, rows, visible, c_.causal, q, keys, keys + key_floats_, out, sum});
    auto* to = const_cast<char*>(token(c_.out, c_.out_stride, b, h, first));
    by_dtype(c_.dtype, [&](auto d) {
      for (std::int64_t r = 0; r < rows; ++r) {
        const float inverse = 1.0f / sum[r];
        for (std::int64_t i = 0; i < c_.D; ++i) {
          store_float(to, r * c_.out_stride[2] + i, d(), out[r * padded_ + i] * inverse);
        }
      }
    });
    return true;
  }

  const FlashAttention& c_;
  const float scale_;
  const FlashTileRun run_;
  const std::int64_t padded_, blocks_, key_floats_, head_floats_, tiles_;
  bool serial_ = false;
  float* packed_ = nullptr;
};

Status check(const FlashAttention& c) {
  if (c.batch < 0 || c.kv_heads <= 0 || c.heads < 0 || c.heads % c.kv_heads != 0 || c.queries < 0 || c.keys < 0) {
    return Status::bad_shape;
  }
  if (c.D < 1 || c.D > kFlashMaxD || (c.causal != 0 && c.causal != 1)) return Status::bad_shape;
  if (c.queries > 0 && (c.keys == 0 || (c.causal != 0 && c.keys < c.queries))) return Status::bad_shape;
  if (c.dtype < 0 || c.dtype > 2) return Status::bad_dtype;
  if (c.batch * c.heads * c.queries > 0 && (c.q == 0 || c.k == 0 || c.v == 0 || c.out == 0)) return Status::null_pointer;
  return Status::ok;
}

}  // namespace

Status flash_attention(const FlashAttention& c, float scale) {
  if (const Status s = check(c); s != Status::ok) return s;
  if (c.batch * c.heads * c.queries == 0) return Status::ok;
  return Attention(c, scale).run();
}

}  // namespace ranvier
