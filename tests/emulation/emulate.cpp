// Runs the CUDA kernels on the CPU, over ops x storage types x shapes, and compares bit for bit with a plain loop over
// the rule of affine.h. Exit status 0: everything held. Built and run by tests/test_emulation.py under ASan and UBSan.
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <string>

#include "emulation.h"
#include "grid.h"

namespace {

using namespace neutralize;
using emulation::RescaleFold;
using emulation::Rewrite;
namespace cuda = neutralize::cuda;

std::mt19937_64 random_bits(20240229);
int64_t cases = 0, failures = 0;

void fail(const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "FAIL %s\n", what.c_str());
}

// An allocation of exactly the bytes that a tensor spans, `lead` bytes past a 128-byte line, so that ASan sees the
// first byte too far on both sides.
class Buffer {
 public:
  Buffer(int64_t bytes, int64_t lead) : bytes_(bytes), lead_(bytes == 0 ? 0 : lead) {
    // The allocator aligns to 16 bytes at most by itself; the lead is poisoned by hand.
    base_ = static_cast<unsigned char*>(
        std::aligned_alloc(128, static_cast<size_t>((bytes + lead_ + 127) / 128 * 128 + 128)));
    original_.resize(static_cast<size_t>(bytes));
  }
  ~Buffer() {
    poison(false);
    std::free(base_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  unsigned char* data() { return base_ + lead_; }
  int64_t bytes() const { return bytes_; }
  const unsigned char* original() const { return original_.data(); }
  void remember() { std::copy(data(), data() + bytes_, original_.begin()); }
  void poison(bool on);

 private:
  unsigned char* base_;
  int64_t bytes_, lead_;
  std::vector<unsigned char> original_;
};

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(const volatile void*, size_t);
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif
void Buffer::poison(bool on) {
#if defined(__SANITIZE_ADDRESS__)
  const size_t whole = static_cast<size_t>((bytes_ + lead_ + 127) / 128 * 128 + 128);
  __asan_unpoison_memory_region(base_, whole);
  if (on) {
    // ASan can poison the end of eight bytes, never their begin alone: what precedes the tensor inside its first eight
    // bytes stays open to it, and is the watch's business.
    __asan_poison_memory_region(base_, static_cast<size_t>(lead_ / 8 * 8));
    __asan_poison_memory_region(base_ + lead_ + bytes_, whole - static_cast<size_t>(lead_ + bytes_));
  }
#else
  (void)on;
#endif
}

struct Shape { int64_t rows, cols, row_stride; };

struct Case {
  Buffer buffer;
  Rewrite rewrite;
  Case(const Shape& shape, int64_t lead, Storage storage)
      : buffer(shape.rows * shape.cols == 0 ? 0
                                            : ((shape.rows - 1) * shape.row_stride + shape.cols) * itemsize_of(storage),
               lead * itemsize_of(storage)),
        rewrite{} {
    rewrite.matrix = {reinterpret_cast<char*>(buffer.data()), shape.rows, shape.cols, shape.row_stride, storage};
  }
};

// `tame`: moderate finite values; otherwise every bit pattern, NaN, infinities and subnormals among them.
template <typename T>
void randomize(Buffer& buffer, bool tame) {
  for (int64_t at = 0; at < buffer.bytes(); at += static_cast<int64_t>(sizeof(T))) {
    const uint64_t bits = random_bits();
    T value;
    if (tame) {
      const double uniform = static_cast<double>(bits >> 11) * 0x1p-53 * 4 - 2;
      value = Element<T>::store(static_cast<typename Element<T>::compute>(uniform));
    } else {
      std::memcpy(&value, &bits, sizeof value);
    }
    std::memcpy(buffer.data() + at, &value, sizeof value);
  }
}

void randomize(Storage storage, Buffer& buffer, bool tame) {
  cuda::with_storage(storage, [&](auto tag) { randomize<typename decltype(tag)::type>(buffer, tame); });
  buffer.remember();
}

// ---- the oracle: one element after the other -----------------------------------------------------------------------
template <typename T>
std::vector<unsigned char> expected_rewrite(const Case& test) {
  using Compute = typename Element<T>::compute;
  const Rewrite& rewrite = test.rewrite;
  const Matrix& matrix = rewrite.matrix;
  std::vector<unsigned char> bytes(test.buffer.original(), test.buffer.original() + test.buffer.bytes());
  const AffineRule<Compute> rule(rewrite.scale, rewrite.diagonal, rewrite.fill);
  for (int64_t row = 0; row < matrix.rows; ++row) {
    __extension__ const auto one =
        static_cast<__int128>(rewrite.ones.start) + static_cast<__int128>(row) * rewrite.ones.step;
    for (int64_t col = 0; col < matrix.cols; ++col) {
      unsigned char* at = bytes.data() + (row * matrix.row_stride + col) * static_cast<int64_t>(sizeof(T));
      const Compute offset = col == one && rule.writes_diagonal() ? rule.diagonal_fill : rule.fill;
      T value;
      std::memcpy(&value, at, sizeof value);
      value = Element<T>::store(rule.reads() ? rule.apply(Element<T>::load(value), offset) : offset);
      std::memcpy(at, &value, sizeof value);
    }
  }
  return bytes;
}

std::string describe(const Rewrite& rewrite) {
  const Matrix& m = rewrite.matrix;
  char text[256];
  std::snprintf(text, sizeof text,
                "storage %d, (%ld, %ld) stride %ld, address mod 128 = %d, scale %g diagonal %g fill %g ones %ld %ld",
                static_cast<int>(m.storage), long(m.rows), long(m.cols), long(m.row_stride), int(m.begin() % 128),
                rewrite.scale, rewrite.diagonal, rewrite.fill, long(rewrite.ones.start), long(rewrite.ones.step));
  return text;
}

bool changes_nothing(const Rewrite& rewrite) {
  return rewrite.scale == 1 && rewrite.fill == 0 && static_cast<float>(rewrite.diagonal) == 0;
}

// The bytes of [address, address + bytes) that whole 16-byte words cover: all but a head and a tail.
int64_t bytes_in_words(uintptr_t address, int64_t bytes) {
  const auto begin = static_cast<int64_t>((address + 15) / 16 * 16);
  const int64_t end = (static_cast<int64_t>(address) + bytes) / 16 * 16;
  return std::max<int64_t>(end - begin, 0);
}

// The least and the most that a rewrite's accesses of 16 bytes may add up to in one direction. Rows are walked one by
// one, unless they are contiguous; where a row is cut into chunks, a word may be cut too.
std::pair<int64_t, int64_t> wide_bytes(const Matrix& matrix) {
  const bool flat = matrix.row_stride == matrix.cols || matrix.rows == 1;
  const int64_t rows = flat ? 1 : matrix.rows, bytes = matrix.numel() * matrix.itemsize() / rows;
  int64_t most = 0;
  for (int64_t row = 0; row < rows; ++row) {
    most += bytes_in_words(matrix.begin() + static_cast<uintptr_t>(row * matrix.stride_bytes()), bytes);
  }
  return {flat ? most : most - rows * (bytes / cuda::kChunkBytes) * 16, most};
}

// Runs a list in one call; returns the number of launches.
int64_t check_rewrites(const std::vector<Case*>& tests, bool descending) {
  std::vector<Rewrite> rewrites;
  emulation::watch.regions.clear();
  cuda::Traffic minimum;
  std::pair<int64_t, int64_t> wide{0, 0};
  for (Case* test : tests) {
    const Rewrite& rewrite = test->rewrite;
    rewrites.push_back(rewrite);
    if (test->buffer.bytes() > 0) emulation::watch.add(test->buffer.data(), test->buffer.bytes());
    test->buffer.poison(true);
    if (changes_nothing(rewrite) || rewrite.matrix.numel() == 0) continue;
    const auto [least, most] = wide_bytes(rewrite.matrix);
    const int64_t directions = rewrite.scale != 0 ? 2 : 1;
    wide.first += directions * least;
    wide.second += directions * most;
    minimum.bytes_written += rewrite.matrix.numel() * rewrite.matrix.itemsize();
    if (rewrite.scale != 0) minimum.bytes_read += rewrite.matrix.numel() * rewrite.matrix.itemsize();
  }
  const int64_t watched = emulation::watch.failures;
  emulation::watch.begin_call();
  const cuda::Traffic traffic = emulation::rewrite(rewrites.data(), rewrites.size(), descending);
  const std::string what =
      rewrites.size() == 1 ? describe(rewrites[0]) : "a list of " + std::to_string(rewrites.size());
  if (emulation::watch.failures != watched) fail("rewrite_, memory accesses: " + what);
  if (traffic.bytes_read != minimum.bytes_read || traffic.bytes_written != minimum.bytes_written ||
      emulation::watch.bytes_read != minimum.bytes_read || emulation::watch.bytes_written != minimum.bytes_written) {
    fail("rewrite_, traffic: " + what);
  }
  if (emulation::watch.word_bytes < wide.first || emulation::watch.word_bytes > wide.second) {
    fail("rewrite_, bytes beside the 16-byte words: " + what);
  }
  for (Case* test : tests) {
    ++cases;
    if (changes_nothing(test->rewrite)) continue;
    const auto expected = cuda::with_storage(
        test->rewrite.matrix.storage, [&](auto tag) { return expected_rewrite<typename decltype(tag)::type>(*test); });
    test->buffer.poison(false);
    if (test->buffer.bytes() > 0 && std::memcmp(expected.data(), test->buffer.data(), expected.size()) != 0) {
      fail("rewrite_: " + describe(test->rewrite));
    }
  }
  return traffic.launches;
}

constexpr Storage kAll[] = {Storage::kFloat64,  Storage::kFloat32, Storage::kFloat16,
                            Storage::kBFloat16, Storage::kE4m3,    Storage::kE5m2};

struct Coefficients { double scale, diagonal, fill; };
constexpr Coefficients kCoefficients[] = {
    {0, 0, 0}, {0, 1, 0}, {0, 0.75, 0.01}, {0, 0, -0.0}, {0.5, 0, 0},      {-1.25, 1, 0},
    {1, 1, 0}, {1, 0, 0}, {3, 0, 1.001},   {1, 0, 0.25}, {0.999, -2, 0.5}, {1e-30, 1e-3, 0},
};
constexpr int64_t kHuge = (int64_t{1} << 62) - 1;

void rewrite_shapes() {
  const int64_t flat[] = {0, 1, 2, 3, 15, 16, 17, 63, 1000, 4095, 32767, 32769, 65535, 65536, 65537};
  const int64_t leads[] = {0, 1, 3, 8, 13};
  for (Storage storage : kAll) {
    int turn = static_cast<int>(storage);
    for (int64_t size : flat) {
      for (int64_t lead : leads) {
        // Small shapes take all coefficients, long ones two each, in turn.
        for (const Coefficients& each : kCoefficients) {
          if (size > 4096 && turn++ % 11 != 0) continue;
          for (int64_t cols : {size, int64_t{1}, int64_t{5}}) {
            if (size == 0 ? cols != 0 : size % cols != 0) continue;
            Case test({size == 0 ? 1 : size / cols, cols, cols}, lead, storage);
            test.rewrite = {
                test.rewrite.matrix, each.scale, each.diagonal, each.fill, {cols == 5 ? 1 : 0, cols == 1 ? 0 : 1}};
            randomize(storage, test.buffer, false);
            check_rewrites({&test}, turn % 2 != 0);
          }
        }
      }
    }
  }
}

void rewrite_diagonals() {
  const Shape shapes[] = {{7, 5, 5},       {33, 129, 129},   {256, 256, 256},   {64, 9 * 17, 9 * 17},
                          {1000, 3, 3},    {9000, 1, 1},     {3, 40000, 40000}, {129, 33, 40},
                          {64, 64, 200},   {500, 3, 5},      {1000, 1, 3},      {3, 40000, 40001},
                          {5, 4100, 8192}, {40, 1000, 1004}, {1, 70000, 70000}, {20, 16, 17}};
  for (Storage storage : kAll) {
    int turn = static_cast<int>(storage);
    for (const Shape& shape : shapes) {
      const Diagonal diagonals[] = {{0, 1},
                                    {4, 9},
                                    {5, -1},
                                    {-7, 2},
                                    {0, 0},
                                    {shape.cols - 1, 0},
                                    {shape.cols - 1, -1},
                                    {kHuge, -kHuge},
                                    {-kHuge, kHuge},
                                    {0, kHuge},
                                    {2, -kHuge},
                                    {1, shape.cols},
                                    {-shape.rows / 2, 1},
                                    {3, 1 - shape.cols}};
      for (const Diagonal& ones : diagonals) {
        for (const Coefficients& each : {Coefficients{0, 1, 0}, Coefficients{0.5, 1, 0}, Coefficients{0, -0.75, 0.01},
                                         Coefficients{-2, 0.5, 0.125}}) {
          if (shape.rows * shape.cols > 10000 && turn++ % 7 != 0) continue;
          Case test(shape, turn % 4, storage);
          test.rewrite = {test.rewrite.matrix, each.scale, each.diagonal, each.fill, ones};
          randomize(storage, test.buffer, false);
          check_rewrites({&test}, turn % 2 != 0);
        }
      }
    }
  }
}

// Thousands of tensors of all storage types in one call: past what the metadata of one launch holds.
void rewrite_lists() {
  for (const int count : {2, 200, 5000}) {
    for (const bool alike : {false, true}) {
      std::vector<std::unique_ptr<Case>> owned;
      std::vector<Case*> tests;
      for (int i = 0; i < count; ++i) {
        const auto pick = [&](uint64_t below) { return static_cast<int64_t>(random_bits() % below); };
        const Storage storage = alike ? Storage::kFloat32 : kAll[pick(6)];
        const int64_t cols = alike ? 1 : pick(40), rows = pick(40);
        owned.push_back(
            std::make_unique<Case>(Shape{rows, cols, alike || pick(2) == 0 ? cols : cols + pick(9)}, pick(9), storage));
        const Coefficients& each = kCoefficients[alike ? 0 : pick(std::size(kCoefficients))];
        owned.back()->rewrite = {
            owned.back()->rewrite.matrix, each.scale, each.diagonal, each.fill, {pick(9) - 4, pick(5) - 2}};
        if (alike) owned.back()->rewrite.ones = {0, 1};
        randomize(storage, owned.back()->buffer, false);
        tests.push_back(owned.back().get());
      }
      const int64_t launches = check_rewrites(tests, count % 2 != 0);
      if (count == 5000 && launches < (alike ? 2 : 8)) fail("a list of 5000 did not go past one launch's metadata");
      if (count == 5000 && alike && launches > 4)
        fail("5000 alike tensors took " + std::to_string(launches) + " launches");
      if (count == 2 && alike && launches > 1) fail("two alike tensors took more than one launch");
    }
  }
}

// ---- rescale_fold_ -------------------------------------------------------------------------------------------------
template <typename T>
bool same(T actual, T wanted) {
  const auto a = Element<T>::load(actual), b = Element<T>::load(wanted);
  return std::memcmp(&actual, &wanted, sizeof(T)) == 0 || (a != a && b != b);  // a NaN is a NaN
}

struct FoldCase {
  Buffer weight, bias;
  RescaleFold fold;

  FoldCase(Storage storage, const Shape& shape, int64_t lead, int64_t bias_stride, double scale, double shift,
           bool tame)
      : weight(span_of(shape) * itemsize_of(storage), lead * itemsize_of(storage)),
        bias(span_of({shape.rows, 1, bias_stride}) * itemsize_of(storage), itemsize_of(storage)),
        fold{{reinterpret_cast<char*>(weight.data()), shape.rows, shape.cols, shape.row_stride, storage},
             {reinterpret_cast<char*>(bias.data()), shape.rows, 1, bias_stride, storage},
             scale,
             shift} {
    randomize(storage, weight, tame);
    randomize(storage, bias, true);
  }

  static int64_t span_of(const Shape& shape) {
    return shape.rows * shape.cols == 0 ? 0 : (shape.rows - 1) * shape.row_stride + shape.cols;
  }
};

std::string describe(const RescaleFold& fold) {
  const Matrix& m = fold.weight;
  char text[256];
  std::snprintf(text, sizeof text,
                "storage %d, (%ld, %ld) stride %ld, address mod 128 = %d, bias stride %ld, scale %g shift %g",
                static_cast<int>(m.storage), long(m.rows), long(m.cols), long(m.row_stride), int(m.begin() % 128),
                long(fold.bias.row_stride), fold.scale, fold.shift);
  return text;
}

template <typename T>
void compare_fold(FoldCase& test) {
  using Compute = typename Element<T>::compute;
  constexpr auto size = static_cast<int64_t>(sizeof(T));
  const auto& [matrix, bias, scale, shift] = test.fold;
  std::vector<unsigned char> wanted_weight(test.weight.original(), test.weight.original() + test.weight.bytes());
  std::vector<unsigned char> wanted_bias(test.bias.original(), test.bias.original() + test.bias.bytes());
  for (int64_t row = 0; row < matrix.rows; ++row) {
    std::vector<Compute> lanes(Fold<T>::kLanes, Compute(0));
    for (int64_t col = 0; col < matrix.cols; ++col) {
      unsigned char* at = wanted_weight.data() + (row * matrix.row_stride + col) * size;
      T value;
      std::memcpy(&value, at, sizeof value);
      const Compute old = Element<T>::load(value);
      lanes[static_cast<size_t>(col % Fold<T>::kLanes)] += old;
      if (static_cast<Compute>(scale) == Compute(1)) continue;
      value = Element<T>::store(scale == 0 ? Compute(0) : static_cast<Compute>(scale) * old);
      std::memcpy(at, &value, sizeof value);
    }
    for (size_t half = lanes.size() / 2; half >= 1; half /= 2) {
      for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    unsigned char* at = wanted_bias.data() + row * bias.row_stride * size;
    T value;
    std::memcpy(&value, at, sizeof value);
    value = Element<T>::store(Fold<T>::bias(Element<T>::load(value), static_cast<Compute>(shift), lanes[0]));
    std::memcpy(at, &value, sizeof value);
  }
  const auto compare = [&](const std::vector<unsigned char>& wanted, Buffer& actual, const char* which) {
    for (int64_t at = 0; at < actual.bytes(); at += size) {
      T a, b;
      std::memcpy(&a, actual.data() + at, sizeof a);
      std::memcpy(&b, wanted.data() + at, sizeof b);
      if (same(a, b)) continue;
      return fail("rescale_fold_: " + describe(test.fold) + ": " + which + " at element " + std::to_string(at / size));
    }
  };
  compare(wanted_weight, test.weight, "weight");
  compare(wanted_bias, test.bias, "bias");
}

// Runs a list in one call; returns the number of launches.
int64_t check_folds(const std::vector<FoldCase*>& tests, bool descending) {
  std::vector<RescaleFold> folds;
  emulation::watch.regions.clear();
  cuda::Traffic minimum;
  int64_t wide = 0;
  for (FoldCase* test : tests) {
    const Matrix& weight = test->fold.weight;
    folds.push_back(test->fold);
    for (Buffer* buffer : {&test->weight, &test->bias}) {
      if (buffer->bytes() > 0) emulation::watch.add(buffer->data(), buffer->bytes());
      buffer->poison(true);
    }
    const int64_t bytes = weight.numel() * weight.itemsize(), bias_bytes = weight.rows * weight.itemsize();
    const bool writes =
        (weight.storage == Storage::kFloat64 ? test->fold.scale : static_cast<float>(test->fold.scale)) != 1;
    minimum.bytes_read += bytes + bias_bytes;
    minimum.bytes_written += (writes ? bytes : 0) + bias_bytes;
    for (int64_t row = 0; row < weight.rows; ++row) {
      const uintptr_t begin = weight.begin() + static_cast<uintptr_t>(row * weight.stride_bytes());
      // A row that does not start on a word goes element by element.
      if (begin % 16 == 0) wide += (writes ? 2 : 1) * (weight.row_bytes() / 16 * 16);
    }
  }
  const int64_t watched = emulation::watch.failures;
  emulation::watch.begin_call();
  const cuda::Traffic traffic = emulation::rescale_fold(folds.data(), folds.size(), descending);
  const std::string what = folds.size() == 1 ? describe(folds[0]) : "a list of " + std::to_string(folds.size());
  if (emulation::watch.failures != watched) fail("rescale_fold_, memory accesses: " + what);
  if (traffic.bytes_read != minimum.bytes_read || traffic.bytes_written != minimum.bytes_written ||
      emulation::watch.bytes_read != minimum.bytes_read || emulation::watch.bytes_written != minimum.bytes_written) {
    fail("rescale_fold_, traffic: " + what);
  }
  if (emulation::watch.word_bytes != wide) fail("rescale_fold_, bytes beside the 16-byte words: " + what);
  for (FoldCase* test : tests) {
    ++cases;
    test->weight.poison(false);
    test->bias.poison(false);
    cuda::with_storage(test->fold.weight.storage, [&](auto tag) { compare_fold<typename decltype(tag)::type>(*test); });
  }
  return traffic.launches;
}

constexpr Coefficients kFolds[] = {{0.5, -1.5, 0}, {1, 0.25, 0}, {0, 1, 0}, {-3, 0, 0}};  // scale, shift

void fold_shapes() {
  const Shape shapes[] = {{0, 8, 8},       {1, 0, 0},       {1, 1, 1},     {7, 31, 31},    {8, 127, 127},
                          {9, 128, 128},   {17, 129, 129},  {3, 512, 512}, {20, 513, 520}, {5, 1000, 1000},
                          {2, 4099, 4099}, {3, 4096, 4104}, {70, 64, 64},  {65, 7, 12},    {1, 65537, 65537},
                          {600, 16, 16},   {33, 200, 256}};
  for (Storage storage : kAll) {
    int turn = 0;
    for (const Shape& shape : shapes) {
      for (int64_t lead : {0, 1, 4}) {
        for (const Coefficients& each : kFolds) {
          FoldCase test(storage, shape, lead, turn % 2 == 0 ? 1 : 3, each.scale, each.diagonal, turn % 3 != 0);
          check_folds({&test}, turn % 2 != 0);
          ++turn;
        }
      }
    }
  }
}

// As rewrite_lists: 1,023 folds fill the metadata of a launch.
void fold_lists() {
  for (const int count : {2, 200, 2500}) {
    for (const bool alike : {false, true}) {
      std::vector<std::unique_ptr<FoldCase>> owned;
      std::vector<FoldCase*> tests;
      for (int i = 0; i < count; ++i) {
        const auto pick = [&](uint64_t below) { return static_cast<int64_t>(random_bits() % below); };
        const int64_t cols = alike ? 5 : pick(40);
        const Shape shape{alike ? 3 : pick(20), cols, alike || pick(2) == 0 ? cols : cols + pick(9)};
        const Coefficients& each = kFolds[alike ? 0 : pick(std::size(kFolds))];
        owned.push_back(std::make_unique<FoldCase>(alike ? Storage::kFloat32 : kAll[pick(6)], shape, pick(9),
                                                   alike ? 1 : 1 + pick(3), each.scale, each.diagonal, true));
        tests.push_back(owned.back().get());
      }
      const int64_t launches = check_folds(tests, count % 2 != 0);
      if (alike && launches != (count == 2500 ? 3 : 1)) {
        fail(std::to_string(count) + " alike folds took " + std::to_string(launches) + " launches");
      }
      if (count == 2500 && !alike && launches <= 6) fail("a list of 2500 folds did not go past one launch's metadata");
    }
  }
}

// ---- planning, without memory --------------------------------------------------------------------------------------
// Sizes past 32 bits: every sampled chunk has the bounds and the first and last one that plain arithmetic gives.
void plan_huge() {
  const struct {
    int64_t rows, cols;
    Diagonal ones;
  } plans[] = {{int64_t{1} << 20, 1000003, {0, 1}},
               {int64_t{3} << 31, 7, {3, 0}},
               {1 << 16, 1 << 16, {5, -1}},
               {int64_t{1} << 33, 1, {0, 0}},
               {11, int64_t{1} << 33, {4, 9}}};
  for (const auto& plan : plans) {
    for (Storage storage : {Storage::kFloat32, Storage::kE4m3, Storage::kFloat64}) {
      const int64_t size = itemsize_of(storage);
      Rewrite rewrite{
          {reinterpret_cast<char*>(uintptr_t{1} << 40) + 3 * size, plan.rows, plan.cols, plan.cols, storage},
          0.5,
          1,
          0,
          plan.ones};
      cuda::plan_rewrite(&rewrite, 1, [&](int, const cuda::TableBuilder<cuda::RewriteLayout>& launch) {
        ++cases;
        static cuda::Table<cuda::RewriteLayout, cuda::kSmallTableBytes> table;
        launch.pack(table);
        const int64_t bytes = plan.rows * plan.cols * size;
        for (int sample = 0; sample < 2000; ++sample) {
          const uint32_t chunk = sample == 0   ? 0
                                 : sample == 1 ? launch.blocks() - 1
                                               : static_cast<uint32_t>(random_bits() % launch.blocks());
          const int64_t lead = 3 * size;
          const int64_t begin = std::max<int64_t>(int64_t{chunk} * cuda::kChunkBytes - lead, 0);
          const int64_t end = std::min<int64_t>((int64_t{chunk} + 1) * cuda::kChunkBytes - lead, bytes);
          std::vector<int64_t> hits;
          for (int64_t row = begin / size / plan.cols; row <= (end - 1) / size / plan.cols; ++row) {
            const int64_t col = plan.ones.column(row), at = (row * plan.cols + col) * size;
            if (col >= 0 && col < plan.cols && at >= begin && at < end) hits.push_back(at - begin);
          }
          const cuda::RewriteEntry& entry = table.entry(cuda::find_entry(table, chunk));
          cuda::for_each_segment(entry, table.form(entry.form), chunk, 0, [&](const cuda::Segment& segment) {
            const int64_t at = reinterpret_cast<char*>(segment.begin) - rewrite.matrix.data;
            if (at != begin || segment.bytes != end - begin) fail("a chunk's bounds: " + describe(rewrite));
            if (sample >= 100 && hits.empty() == !segment.hits.any()) return;
            // Every one is found, at its place, and nothing else is.
            std::vector<int64_t> found;
            for (int32_t offset = 0; offset < segment.bytes; offset += 16) {
              const uint32_t bits = segment.hits.within(offset, 16);
              for (int bit = 0; bit < 16; ++bit) {
                if (bits >> bit & 1u) found.push_back(offset + bit);
              }
            }
            if (found != hits) fail("a chunk's ones: " + describe(rewrite));
          });
        }
      });
    }
  }
}

}  // namespace

int main() {
  rewrite_shapes();
  rewrite_diagonals();
  rewrite_lists();
  fold_shapes();
  fold_lists();
  plan_huge();
  std::printf("%ld cases, %ld failures\n", long(cases), long(failures));
  return failures == 0 && emulation::watch.failures == 0 ? 0 : 1;
}
