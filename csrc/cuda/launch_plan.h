// The chunk table and the planning of launches: many tensors in few launches. Plain C++ for any host compiler, raw
// pointers, no torch; the device code that reads the tables is in multi_tensor.cuh.
//
// Note [Chunks]
//   A tensor is cut into chunks of 32 KiB that start on a 128-byte line; a block of 256 threads owns one chunk.
//
//     tensor   |head|........body........|........body........|...body...|tail|
//     chunk    '-------- 0 --------------'-------- 1 ---------'------ 2 ------'
//     body     word 0 -> lane 0, word 1 -> lane 1, ... word 255 -> lane 255, word 256 -> lane 0, ...
//              (words of 16 bytes; a thread has kUnroll of them in flight before its first store)
//     head, tail: fewer than 16 bytes each, one element per lane
//
//   Of a row-strided block a chunk is a few whole rows, or a piece of one; a power-of-two group of lanes walks a row.
//   The block finds its tensor by a binary search over the first chunk of every tensor of the launch. So the parameters
//   bound the number of tensors in a launch; nothing bounds their size or the number of blocks.
//
// Note [Parameters]
//   The table travels by value in the kernel's parameters: no allocation, no copy, no lifetime to keep, capturable in a
//   graph. An entry (pointer, extent, first chunk) costs 24 bytes; the rest, coefficients and geometry, is a form, and
//   tensors that agree in it share it. CUDA 12.1 raised the limit from 4 KiB to 32,764 bytes for sm_70 and later, which
//   is every architecture that we ship (7.5 and up; the driver must be 530 or later); an older toolkit gets the 4 KiB
//   tables alone. Short lists take the 4 KiB kernel, because a launch copies all of its parameters.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../affine.h"
#include "../matrix.h"

namespace neutralize {
namespace cuda {

// ---- what is asked for ---------------------------------------------------------------------------------------------
// The planners take any struct with the members of checks.h's Rewrite (matrix, scale, diagonal, fill, ones) and
// RescaleFold (weight, bias, scale, shift).
constexpr int kStorages = 6;

template <typename Body>
auto with_storage(Storage storage, Body&& body) {
  switch (storage) {
    case Storage::kFloat64: return body(TypeTag<double>{});
    case Storage::kFloat32: return body(TypeTag<float>{});
    case Storage::kFloat16: return body(TypeTag<half_bits>{});
    case Storage::kBFloat16: return body(TypeTag<bfloat16_bits>{});
    case Storage::kE4m3: return body(TypeTag<e4m3_bits>{});
    case Storage::kE5m2: break;
  }
  return body(TypeTag<e5m2_bits>{});
}

// ---- geometry ------------------------------------------------------------------------------------------------------
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;                   // independent 16-byte accesses in flight per thread
constexpr int kWord = 16;                    // bytes of one vector access
constexpr int kLine = 128;                   // chunks start on a cache line
constexpr int kChunkBytes = 32768;           // two unrolled sweeps of a block: short enough for an even last wave
constexpr int64_t kMostChunks = 0x7fffffff;  // gridDim.x

constexpr int kSmallTableBytes = 4096;
#if defined(NEUTRALIZE_EMULATE_CUDA) || !defined(CUDART_VERSION) || CUDART_VERSION >= 12010
constexpr int kLargeTableBytes = 32760;
#else
constexpr int kLargeTableBytes = kSmallTableBytes;
#endif

struct RewriteEntry {
  unsigned char* data;
  int64_t extent;  // contiguous: bytes; row-strided: rows
  uint32_t first_chunk;
  uint32_t form;
};

// Everything in bytes, so that one fill kernel serves every storage type.
struct RewriteForm {
  uint64_t scale, fill, diagonal_fill;  // bits of the compute type; in a fill, 8 bytes of stored elements
  int64_t row_stride;                   // 0: contiguous
  int64_t row_bytes;
  // The ones of D. Contiguous: their flat positions, hit_first + k * hit_distance for 0 <= k < hit_count. Row-strided:
  // the column of row hit_row + k.
  int64_t hit_first, hit_distance, hit_count, hit_row;
  uint64_t hit_reciprocal;        // floor(2^64 / hit_distance)
  uint32_t chunk_hit_distance;    // the same within a chunk: no longer than one
  uint32_t chunk_hit_reciprocal;  // floor(2^32 / chunk_hit_distance)
  uint32_t pieces;                // row-strided: chunks per row
  uint32_t rows_per_chunk;
  uint32_t lanes_log2;  // threads that walk one row together
  uint32_t element_bytes;
};

struct RescaleFoldEntry {
  unsigned char* weight;
  unsigned char* bias;
  int64_t rows;
  uint32_t first_chunk;
  uint32_t form;
};

struct RescaleFoldForm {
  uint64_t scale, shift;  // bits of the compute type
  int64_t cols;           // elements
  int64_t row_stride;     // bytes
  int64_t bias_stride;    // bytes
  uint32_t rows_per_chunk;
  uint32_t writes_weight;
};

struct RewriteLayout {
  using Entry = RewriteEntry;
  using Form = RewriteForm;
};
struct RescaleFoldLayout {
  using Entry = RescaleFoldEntry;
  using Form = RescaleFoldForm;
};

// Entries first, forms after them.
template <typename Layout, int Bytes>
struct Table {
  using Entry = typename Layout::Entry;
  using Form = typename Layout::Form;
  static constexpr int kBytes = Bytes;
  static constexpr int kPayload = Bytes - 8;
  uint32_t entries;
  uint32_t forms_at;  // offset of the first form in payload
  alignas(8) unsigned char payload[kPayload];

  NEUTRALIZE_HD const Entry& entry(uint32_t index) const { return reinterpret_cast<const Entry*>(payload)[index]; }
  NEUTRALIZE_HD const Form& form(uint32_t index) const {
    return reinterpret_cast<const Form*>(payload + forms_at)[index];
  }
};
static_assert(sizeof(RewriteEntry) == 24 && sizeof(RewriteForm) % 8 == 0, "entries and forms pack without gaps");
static_assert(sizeof(RescaleFoldEntry) == 32 && sizeof(RescaleFoldForm) % 8 == 0, "and so do the fold's");
static_assert(sizeof(Table<RewriteLayout, kLargeTableBytes>) <= 32764, "the limit on kernel parameters");

// ---- planning: host only, pure -------------------------------------------------------------------------------------
// What a call moves through device memory, and in how many launches. Each input is read once and each output written
// once; a rewrite with scale 0 reads nothing, one that changes nothing is not launched.
struct Traffic {
  int64_t bytes_read = 0;
  int64_t bytes_written = 0;
  int64_t launches = 0;
  int64_t blocks = 0;
};

template <typename Compute>
inline uint64_t coefficient_bits(Compute value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

// Eight bytes of one stored value, repeated.
template <typename T>
inline uint64_t pattern_of(typename Element<T>::compute value) {
  const T stored = Element<T>::store(value);
  unsigned char bytes[8];
  for (size_t at = 0; at < sizeof bytes; at += sizeof(T)) std::memcpy(bytes + at, &stored, sizeof(T));
  uint64_t pattern;
  std::memcpy(&pattern, bytes, sizeof pattern);
  return pattern;
}

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// One launch in the making: entries and forms, within what the parameters hold.
template <typename Layout>
class TableBuilder {
 public:
  using Entry = typename Layout::Entry;
  using Form = typename Layout::Form;

  bool empty() const { return entries_.empty(); }
  uint32_t blocks() const { return static_cast<uint32_t>(chunks_); }

  // False where this launch is full: flush it and add again.
  bool add(Entry entry, const Form& form, int64_t chunks) {
    if (chunks_ + chunks > kMostChunks) return false;
    // Tensors of one kind tend to follow each other, so looking back a little finds nearly every form to share.
    constexpr size_t kLookBack = 8;
    size_t index = forms_.size();
    for (size_t back = 1; back <= std::min(kLookBack, forms_.size()); ++back) {
      if (std::memcmp(&forms_[forms_.size() - back], &form, sizeof form) == 0) {
        index = forms_.size() - back;
        break;
      }
    }
    const size_t forms = std::max(forms_.size(), index + 1);
    if (payload_bytes(entries_.size() + 1, forms) > Table<Layout, kLargeTableBytes>::kPayload) return false;
    if (index == forms_.size()) forms_.push_back(form);
    entry.first_chunk = static_cast<uint32_t>(chunks_);
    entry.form = static_cast<uint32_t>(index);
    entries_.push_back(entry);
    chunks_ += chunks;
    return true;
  }

  bool fits_small() const {
    return payload_bytes(entries_.size(), forms_.size()) <= Table<Layout, kSmallTableBytes>::kPayload;
  }

  template <int Bytes>
  void pack(Table<Layout, Bytes>& table) const {
    table.entries = static_cast<uint32_t>(entries_.size());
    table.forms_at = static_cast<uint32_t>(entries_.size() * sizeof(Entry));
    std::memcpy(table.payload, entries_.data(), entries_.size() * sizeof(Entry));
    std::memcpy(table.payload + table.forms_at, forms_.data(), forms_.size() * sizeof(Form));
  }

  void clear() {
    entries_.clear();
    forms_.clear();
    chunks_ = 0;
  }

 private:
  static int64_t payload_bytes(size_t entries, size_t forms) {
    return static_cast<int64_t>(entries * sizeof(Entry) + forms * sizeof(Form));
  }

  std::vector<Entry> entries_;
  std::vector<Form> forms_;
  int64_t chunks_ = 0;
};

// Which kernel a rewrite takes: the fill, for every storage type, or the rescale of one of them.
constexpr int kFillKernel = kStorages;
constexpr int kRewriteKernels = kStorages + 1;

struct RewriteItem {
  RewriteEntry entry;
  RewriteForm form;
  int64_t chunks;
  int kernel;  // kFillKernel, or a Storage; -1: nothing to do
};

template <typename Rewrite>
RewriteItem plan_item(const Rewrite& request) {
  const Matrix& matrix = request.matrix;
  RewriteItem item{};
  RewriteForm& form = item.form;
  const int64_t size = matrix.itemsize();
  bool has_diagonal = false;
  with_storage(matrix.storage, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Compute = typename Element<T>::compute;
    const AffineRule<Compute> rule(request.scale, request.diagonal, request.fill);
    has_diagonal = rule.writes_diagonal();
    const bool identity = rule.scale == Compute(1) && rule.fill == Compute(0) && !has_diagonal;
    item.kernel = identity ? -1 : rule.reads() ? static_cast<int>(matrix.storage) : kFillKernel;
    form.scale = coefficient_bits(rule.scale);
    form.fill = rule.reads() ? coefficient_bits(rule.fill) : pattern_of<T>(rule.fill);
    form.diagonal_fill = rule.reads() ? coefficient_bits(rule.diagonal_fill) : pattern_of<T>(rule.diagonal_fill);
  });
  if (matrix.rows <= 0 || matrix.cols <= 0) item.kernel = -1;
  if (item.kernel < 0) return item;

  item.entry.data = reinterpret_cast<unsigned char*>(matrix.data);
  form.element_bytes = static_cast<uint32_t>(size);
  const bool contiguous = matrix.contiguous();
  const int64_t lead = static_cast<int64_t>(matrix.begin() % kLine);
  form.pieces = form.rows_per_chunk = 1;
  form.lanes_log2 = 8;
  static_assert(kThreads == 1 << 8, "lanes_log2 of a whole block");
  if (contiguous) {
    item.entry.extent = matrix.rows * matrix.cols * size;
    item.chunks = ceil_div(item.entry.extent + lead, kChunkBytes);
  } else {
    item.entry.extent = matrix.rows;
    form.row_stride = matrix.stride_bytes();
    form.row_bytes = matrix.row_bytes();
    if (form.row_bytes > kChunkBytes) {
      form.pieces = static_cast<uint32_t>(ceil_div(form.row_bytes + lead, kChunkBytes));
    } else {
      form.rows_per_chunk = static_cast<uint32_t>(kChunkBytes / form.row_bytes);
      // As few lanes per row as keep kUnroll words in flight, but a whole cache line side by side where there is one.
      const int64_t words = ceil_div(form.row_bytes, kWord);
      const int64_t wanted = std::max(ceil_div(words, kUnroll), std::min<int64_t>(words, kLine / kWord));
      form.lanes_log2 = 0;
      while ((int64_t{1} << form.lanes_log2) < std::min<int64_t>(wanted, kThreads)) ++form.lanes_log2;
    }
    item.chunks = ceil_div(matrix.rows, form.rows_per_chunk) * form.pieces;
  }

  form.hit_distance = form.chunk_hit_distance = kChunkBytes;
  if (has_diagonal) {
    const RowRange hit = diagonal_rows(matrix.rows, matrix.cols, request.ones);
    form.hit_count = hit.last - hit.first;
    if (form.hit_count > 0) {
      const int64_t column = request.ones.column(hit.first);
      form.hit_row = contiguous ? 0 : hit.first;
      form.hit_first = (contiguous ? hit.first * matrix.cols + column : column) * size;
      // With two ones or more |step| < cols, so a contiguous distance is positive; with one there is none to keep.
      if (form.hit_count > 1) form.hit_distance = ((contiguous ? matrix.cols : 0) + request.ones.step) * size;
    }
    if (contiguous) form.chunk_hit_distance = static_cast<uint32_t>(std::min<int64_t>(form.hit_distance, kChunkBytes));
  }
  const auto reciprocal = [](uint64_t most, uint64_t divisor) { return most / divisor; };
  if (contiguous) form.hit_reciprocal = reciprocal(~uint64_t{0}, static_cast<uint64_t>(form.hit_distance));
  form.chunk_hit_reciprocal = static_cast<uint32_t>(reciprocal(~uint32_t{0}, form.chunk_hit_distance));
  return item;
}

// launch(kernel, builder): called for each launch, in order; kernel is kFillKernel or a Storage.
template <typename Rewrite, typename Launch>
Traffic plan_rewrite(const Rewrite* requests, size_t count, Launch&& launch) {
  using Builder = TableBuilder<RewriteLayout>;
  Builder builders[kRewriteKernels];
  Traffic traffic;
  const auto flush = [&](int kernel) {
    ++traffic.launches;
    traffic.blocks += builders[kernel].blocks();
    launch(kernel, static_cast<const Builder&>(builders[kernel]));
    builders[kernel].clear();
  };
  for (size_t index = 0; index < count; ++index) {
    const RewriteItem item = plan_item(requests[index]);
    if (item.kernel < 0) continue;
    Builder& builder = builders[item.kernel];
    if (!builder.add(item.entry, item.form, item.chunks)) {
      flush(item.kernel);
      builder.add(item.entry, item.form, item.chunks);
    }
    const Matrix& matrix = requests[index].matrix;
    const int64_t bytes = matrix.numel() * matrix.itemsize();
    traffic.bytes_written += bytes;
    if (item.kernel != kFillKernel) traffic.bytes_read += bytes;
  }
  for (int kernel = 0; kernel < kRewriteKernels; ++kernel) {
    if (!builders[kernel].empty()) flush(kernel);
  }
  return traffic;
}

// launch(storage, builder): called for each launch, in order.
template <typename RescaleFold, typename Launch>
Traffic plan_rescale_fold(const RescaleFold* requests, size_t count, Launch&& launch) {
  using Builder = TableBuilder<RescaleFoldLayout>;
  Builder builders[kStorages];
  Traffic traffic;
  const auto flush = [&](int storage) {
    ++traffic.launches;
    traffic.blocks += builders[storage].blocks();
    launch(static_cast<Storage>(storage), static_cast<const Builder&>(builders[storage]));
    builders[storage].clear();
  };
  for (size_t index = 0; index < count; ++index) {
    const RescaleFold& request = requests[index];
    const Matrix& weight = request.weight;
    if (weight.rows <= 0) continue;
    const int64_t size = weight.itemsize();
    RescaleFoldForm form{};
    with_storage(weight.storage, [&](auto tag) {
      using Compute = typename Element<typename decltype(tag)::type>::compute;
      form.scale = coefficient_bits(static_cast<Compute>(request.scale));
      form.shift = coefficient_bits(static_cast<Compute>(request.shift));
      form.writes_weight = static_cast<Compute>(request.scale) != Compute(1);
    });
    form.cols = weight.cols;
    form.row_stride = weight.stride_bytes();
    form.bias_stride = request.bias.stride_bytes();
    // A warp sums a row; a chunk is as many rounds of the block's warps as fill it.
    const int64_t round_bytes = std::max<int64_t>(kWarps * weight.cols * size, 1);
    const int64_t rounds = std::min<int64_t>(std::max<int64_t>(kChunkBytes / round_bytes, 1), 64);
    form.rows_per_chunk = static_cast<uint32_t>(rounds * kWarps);
    const RescaleFoldEntry entry{reinterpret_cast<unsigned char*>(weight.data),
                                 reinterpret_cast<unsigned char*>(request.bias.data), weight.rows, 0, 0};
    const int64_t chunks = ceil_div(weight.rows, form.rows_per_chunk);
    Builder& builder = builders[static_cast<int>(weight.storage)];
    if (!builder.add(entry, form, chunks)) {
      flush(static_cast<int>(weight.storage));
      builder.add(entry, form, chunks);
    }
    const int64_t weight_bytes = weight.numel() * size, bias_bytes = weight.rows * size;
    traffic.bytes_read += weight_bytes + bias_bytes;
    traffic.bytes_written += (form.writes_weight != 0 ? weight_bytes : 0) + bias_bytes;
  }
  for (int storage = 0; storage < kStorages; ++storage) {
    if (!builders[storage].empty()) flush(storage);
  }
  return traffic;
}

}  // namespace cuda
}  // namespace neutralize
