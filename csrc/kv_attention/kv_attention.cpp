// The call around the kernels: queries as two bytes a channel, chunks of tokens shared among threads, partial results merged
// in the order of the tokens. Chunks and the order of every sum depend on the token's position alone, so the result of a
// query is the same bits in any batch, beside any other query and on any number of threads.
#include "kv_attention/kv_attention.h"

#include "core/isa.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "kv_attention/kv_order.h"
#include "kv_attention/kv_softmax.h"

namespace ranvier {
namespace {

// Below this many multiply-accumulates waking a second thread costs more than it saves.
constexpr std::int64_t kSerialProducts = 500'000;
constexpr float kQueryLowest = 1e-30f;  // a query whose steps are smaller counts as 0

template <class T>
const T* at(std::int64_t address) {
  return reinterpret_cast<const T*>(address);
}

// The rows of one (batch, kv head): `group` query heads x `queries`; row r is query r / group of head r % group.
struct Rows {
  const KvAttention& c;
  std::int64_t b, h, group;

  Rows(const KvAttention& call, std::int64_t head)
      : c(call), b(head / call.kv_heads), h(head % call.kv_heads), group(call.heads / call.kv_heads) {}

  std::int64_t head(std::int64_t r) const { return h * group + r % group; }
  std::int64_t query(std::int64_t r) const { return r / group; }
  std::int64_t length() const { return at<std::int64_t>(c.lengths)[b]; }
};

struct Buffers {
  std::int8_t* codes;   // [rows][2][Dp]
  KvQuery* queries;     // [rows]
  KvPartial* partials;  // [heads][chunks][rows of a head]
  float* out;           // [heads][chunks][rows of a head][Dp]
};

void prepare(const Rows& rows, std::int64_t r, const HeadOrder& order, float scale, std::int8_t* codes, KvQuery& q) {
  const KvAttention& c = rows.c;
  const std::int64_t D = c.format.D, Dp = c.format.padded(), i = rows.query(r);
  const std::int64_t from = rows.b * c.query_stride[0] + rows.head(r) * c.query_stride[1] + i * c.query_stride[2];
  float x[kKvMaxD], top = 0.0f;
  std::uint32_t largest = 0;
  for (std::int64_t d = 0; d < D; ++d) x[d] = load_float(at<void>(c.query), from + d, static_cast<DType>(c.dtype));
  for (std::int64_t d = 0; d < D; ++d) {
    const std::uint32_t size = bits_of(x[d]) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  q.bad = largest >= 0x7f800000u;
  top = q.bad ? 0.0f : float_of(largest);
  const float step = top / kKvQueryTop;
  const bool zero = step < kQueryLowest;
  const float inverse = zero ? 0.0f : 1.0f / step;
  std::int8_t* low = codes + Dp;
  std::int64_t sum = 0;
  std::memset(codes, 0, static_cast<std::size_t>(2 * Dp));
  if (!q.bad) {
    for (std::int64_t d = 0; d < D; ++d) x[d] = round_even(x[d] * inverse);
    for (std::int64_t j = 0; j < D; ++j) {
      const auto whole = static_cast<std::int32_t>(x[order.channel[j]]), upper = (whole + 128) >> 8;
      codes[j] = static_cast<std::int8_t>(upper);
      low[j] = static_cast<std::int8_t>(whole - 256 * upper);
      sum += whole;
    }
  }
  q.high = codes, q.low = low;
  q.step = zero ? 0.0f : step * (scale * kLog2E);
  q.sum = q.step * static_cast<float>(sum);
  q.begin = c.starts == 0 ? 0 : at<std::int64_t>(c.starts)[rows.b];
  q.end = rows.length() - c.queries + i + 1;
  q.mask = c.mask == 0 ? nullptr
                       : at<float>(c.mask) + rows.b * c.mask_stride[0] + rows.head(r) * c.mask_stride[1] + i * c.mask_stride[2];
}

// Adds the sums of later tokens; every chunk is merged in the order of the tokens.
void merge(KvPartial& total, const KvPartial& next, std::int64_t Dp) {
  total.bad |= next.bad;
  if (next.max == -__builtin_inff()) return;
  const float max = next.max > total.max ? next.max : total.max;
  const float a = exp2_one(total.max - max), b = exp2_one(next.max - max);
  for (std::int64_t d = 0; d < Dp; ++d) total.out[d] = total.out[d] * a + next.out[d] * b;
  total.sum = total.sum * a + next.sum * b;
  total.max = max;
}

void clear(KvPartial& total, std::int64_t Dp) {
  total.max = -__builtin_inff(), total.sum = 0.0f, total.bad = 0;
  for (std::int64_t d = 0; d < Dp; ++d) total.out[d] = 0.0f;
}

void write(const Rows& rows, std::int64_t r, const HeadOrder& order, const KvPartial& total, bool bad) {
  const KvAttention& c = rows.c;
  const std::int64_t D = c.format.D, to = ((rows.b * c.heads + rows.head(r)) * c.queries + rows.query(r)) * D;
  auto* out = reinterpret_cast<void*>(c.out);
  const bool nan = bad || total.bad != 0, none = total.max == -__builtin_inff();
  const float inverse = none ? 0.0f : 1.0f / total.sum;
  for (std::int64_t j = 0; j < D; ++j) {
    const float y = nan ? __builtin_nanf("") : (none ? 0.0f : total.out[j] * inverse);
    store_float(out, to + order.channel[j], static_cast<DType>(c.dtype), y);
  }
}

Status check(const KvAttention& c) {
  const KvFormat& f = c.format;
  if (f.D <= 0 || f.D > kKvMaxD || c.batch < 0 || c.kv_heads <= 0 || c.heads % c.kv_heads != 0 || c.queries < 0 || c.blocks < 0)
    return Status::bad_shape;
  if (f.key_salient < 0 || f.key_salient > f.D || f.value_salient < 0 || f.value_salient > f.D) return Status::bad_shape;
  if (c.batch == 0 || c.queries == 0 || c.heads == 0) return Status::ok;
  if (c.query == 0 || c.key_mask == 0 || c.value_mask == 0 || c.lengths == 0 || c.out == 0) return Status::null_pointer;
  if (!masks_fit(f, c.kv_heads, c.key_mask, c.value_mask)) return Status::bad_mask;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    const std::int64_t length = at<std::int64_t>(c.lengths)[b], start = c.starts == 0 ? 0 : at<std::int64_t>(c.starts)[b];
    if (length < c.queries || length > c.blocks * kKvTokens || start < 0) return Status::bad_shape;
    if (c.mask != 0 && length > c.mask_width) return Status::bad_shape;
    if (length > 0 && c.cache == 0) return Status::null_pointer;
  }
  return Status::ok;
}

// Where the work of one (batch, kv head) is split: tiles of rows, chunks of tokens.
struct Plan {
  std::int64_t heads, rows, tiles, chunks, longest;

  explicit Plan(const KvAttention& c) : heads(c.batch * c.kv_heads), rows(c.heads / c.kv_heads * c.queries), longest(0) {
    for (std::int64_t b = 0; b < c.batch; ++b) {
      const std::int64_t length = at<std::int64_t>(c.lengths)[b];
      longest = length > longest ? length : longest;
    }
    tiles = (rows + kKvQueries - 1) / kKvQueries;
    chunks = (longest + kKvChunk - 1) / kKvChunk;
  }
};

class Attention {
 public:
  Attention(const KvAttention& call, float scale) : c_(call), plan_(call), scale_(scale), kernel_(kv_attention_chunk()) {}

  Status run() {
    const std::int64_t Dp = c_.format.padded(), rows = plan_.heads * plan_.rows;
    serial_ = rows * plan_.longest * c_.format.D < kSerialProducts;
    static thread_local Scratch scratch;
    auto* memory = static_cast<char*>(scratch.reserve(static_cast<std::size_t>(rows) * (sizeof(KvQuery) + 2 * Dp)));
    if (memory == nullptr) return Status::out_of_memory;
    queries_ = reinterpret_cast<KvQuery*>(memory);
    codes_ = reinterpret_cast<std::int8_t*>(queries_ + rows);
    parallel_tasks(plan_.heads, serial_, [&](std::int64_t head) {
      const Rows in(c_, head);
      const HeadOrder order(c_.format.D, at<std::uint8_t>(c_.key_mask) + in.h * c_.format.D);
      for (std::int64_t r = 0, n = head * plan_.rows; r < plan_.rows; ++r, ++n) {
        prepare(in, r, order, scale_, codes_ + 2 * Dp * n, queries_[n]);
      }
    });
    // Few rows: the chunks are tasks of their own, and their results are kept until all are there.
    return plan_.heads * plan_.tiles >= 4 * num_threads() || plan_.chunks <= 1 ? run_tiles() : run_chunks();
  }

 private:
  void chunk(std::int64_t head, std::int64_t tile, std::int64_t n, KvPartial* partials) const {
    const Rows in(c_, head);
    const std::int64_t bytes = c_.format.block_bytes(), first = n * kKvChunk, length = in.length();
    const std::int64_t last = first + kKvChunk < length ? first + kKvChunk : length;
    const auto* blocks = at<std::uint8_t>(c_.cache) + (head * c_.blocks + first / kKvTokens) * bytes;
    kernel_({c_.format, blocks, first, last}, queries_ + head * plan_.rows + tile * kKvQueries, rows_of(tile), partials);
  }

  std::int64_t rows_of(std::int64_t tile) const {
    const std::int64_t left = plan_.rows - tile * kKvQueries;
    return left < kKvQueries ? left : kKvQueries;
  }

  void finish(std::int64_t head, std::int64_t tile, const HeadOrder& order, const KvPartial* totals) const {
    const Rows in(c_, head);
    for (std::int64_t i = 0; i < rows_of(tile); ++i) {
      const std::int64_t r = tile * kKvQueries + i;
      write(in, r, order, totals[i], queries_[head * plan_.rows + r].bad);
    }
  }

  HeadOrder value_order(std::int64_t head) const {
    return HeadOrder(c_.format.D, at<std::uint8_t>(c_.value_mask) + head % c_.kv_heads * c_.format.D);
  }

  // One task a tile: it walks over all chunks that one of its queries can see.
  Status run_tiles() {
    const std::int64_t Dp = c_.format.padded();
    std::atomic<bool> failed{false};
    parallel_tasks(plan_.heads * plan_.tiles, serial_, [&](std::int64_t task) {
      const std::int64_t head = task / plan_.tiles, tile = task % plan_.tiles, rows = rows_of(tile);
      static thread_local Scratch scratch;
      auto* sums = static_cast<float*>(scratch.reserve(static_cast<std::size_t>(2 * rows * Dp) * sizeof(float)));
      if (sums == nullptr) {
        failed = true;
        return;
      }
      KvPartial totals[kKvQueries], next[kKvQueries];
      for (std::int64_t i = 0; i < rows; ++i) {
        totals[i].out = sums + i * Dp, next[i].out = sums + (rows + i) * Dp;
        clear(totals[i], Dp);
      }
      const KvQuery* queries = queries_ + head * plan_.rows + tile * kKvQueries;
      const std::int64_t begin = queries[0].begin, end = queries[rows - 1].end;
      for (std::int64_t n = begin / kKvChunk; n * kKvChunk < end; ++n) {
        chunk(head, tile, n, next);
        for (std::int64_t i = 0; i < rows; ++i) merge(totals[i], next[i], Dp);
      }
      finish(head, tile, value_order(head), totals);
    });
    return failed ? Status::out_of_memory : Status::ok;
  }

  Status run_chunks() {
    const std::int64_t Dp = c_.format.padded(), all = plan_.heads * plan_.tiles * plan_.chunks * kKvQueries;
    static thread_local Scratch scratch;
    auto* memory = static_cast<char*>(scratch.reserve(static_cast<std::size_t>(all) * (sizeof(KvPartial) + 4 * Dp)));
    if (memory == nullptr) return Status::out_of_memory;
    auto* partials = reinterpret_cast<KvPartial*>(memory);
    auto* sums = reinterpret_cast<float*>(partials + all);
    parallel_tasks(plan_.heads * plan_.tiles * plan_.chunks, serial_, [&](std::int64_t task) {
      KvPartial* mine = partials + task * kKvQueries;
      const std::int64_t n = task % plan_.chunks, tile = task / plan_.chunks % plan_.tiles;
      for (std::int64_t i = 0; i < rows_of(tile); ++i) mine[i].out = sums + (task * kKvQueries + i) * Dp;
      const std::int64_t head = task / plan_.chunks / plan_.tiles;
      if (n * kKvChunk < Rows(c_, head).length()) return chunk(head, tile, n, mine);
      for (std::int64_t i = 0; i < rows_of(tile); ++i) clear(mine[i], Dp);
    });
    parallel_tasks(plan_.heads * plan_.tiles, serial_, [&](std::int64_t task) {
      const std::int64_t tile = task % plan_.tiles;
      KvPartial* first = partials + task * plan_.chunks * kKvQueries;
      float total[kKvMaxD];
      KvPartial totals[kKvQueries];
      const HeadOrder order = value_order(task / plan_.tiles);
      for (std::int64_t i = 0; i < rows_of(tile); ++i) {
        totals[i].out = total;
        clear(totals[i], Dp);
        for (std::int64_t n = 0; n < plan_.chunks; ++n) merge(totals[i], first[n * kKvQueries + i], Dp);
        const Rows in(c_, task / plan_.tiles);
        const std::int64_t r = tile * kKvQueries + i;
        write(in, r, order, totals[i], queries_[task / plan_.tiles * plan_.rows + r].bad);
      }
    });
    return Status::ok;
  }

  const KvAttention& c_;
  const Plan plan_;
  const float scale_;
  const KvAttentionChunk kernel_;
  bool serial_ = false;
  KvQuery* queries_ = nullptr;
  std::int8_t* codes_ = nullptr;
};

}  // namespace

KvAttentionChunk kv_attention_chunk() {
#if defined(RANVIER_X86)
  const Isa isa = active_isa();
  if (isa >= Isa::avx512vnni) return kv_attention_chunk_avx512vnni;
  if (isa >= Isa::avx2) return kv_attention_chunk_avx2;
#endif
  return kv_attention_chunk_scalar;
}

Status kv_attention(const KvAttention& c, float scale) {
  if (const Status s = check(c); s != Status::ok) return s;
  if (c.batch == 0 || c.queries == 0 || c.heads == 0) return Status::ok;
  return Attention(c, scale).run();
}

}  // namespace ranvier
