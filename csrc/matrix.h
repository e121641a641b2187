// A tensor as every kernel sees it: a matrix of rows = dim 0 and columns = the other dims flattened. No torch in here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "dispatch.h"

namespace neutralize {

struct Matrix {
  char* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;  // in elements; == cols where the tensor is contiguous
  Storage storage;

  int64_t itemsize() const { return itemsize_of(storage); }
  int64_t numel() const { return rows * cols; }
  bool contiguous() const { return row_stride == cols; }
  int64_t row_bytes() const { return cols * itemsize(); }
  int64_t stride_bytes() const { return row_stride * itemsize(); }
  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(data); }
  uintptr_t end() const {
    return numel() == 0 ? begin() : begin() + static_cast<uintptr_t>((rows - 1) * stride_bytes() + row_bytes());
  }
};

// A tensor's layout as a matrix with everything but the data, and whether kernels can take it: contiguous memory, or rows
// of contiguous memory. Strides are in elements.
struct Layout {
  Matrix matrix;
  bool native;
};

inline Layout layout_of(int64_t dims, const int64_t* sizes, const int64_t* strides, Storage storage) {
  Matrix matrix{nullptr, dims > 0 ? sizes[0] : 1, 1, 1, storage};
  bool native = true;
  for (int64_t dim = dims - 1; dim >= 1; --dim) {
    native &= sizes[dim] == 1 || strides[dim] == matrix.cols;
    matrix.cols *= sizes[dim];
  }
  // The stride of a single row says nothing.
  matrix.row_stride = dims > 0 && matrix.rows > 1 ? strides[0] : matrix.cols;
  native &= matrix.row_stride >= matrix.cols;
  if (matrix.numel() == 0) {
    matrix.row_stride = matrix.cols;
    native = true;
  }
  return {matrix, native};
}

inline bool aligned(const Matrix& matrix) { return matrix.begin() % static_cast<uintptr_t>(matrix.itemsize()) == 0; }

// Rows [first, last) of the matrix have a one of the generalized identity inside their columns. Written without
// row * step, which could overflow: |start|, |step| < 2^62 is all that is asked of them.
struct RowRange {
  int64_t first;
  int64_t last;
};

inline RowRange diagonal_rows(int64_t rows, int64_t cols, Diagonal diagonal) {
  const auto floor_div = [](int64_t a, int64_t b) { return a / b - (a % b != 0 && (a % b < 0) != (b < 0)); };
  if (diagonal.step == 0) {
    return diagonal.start >= 0 && diagonal.start < cols ? RowRange{0, rows} : RowRange{0, 0};
  }
  // 0 <= start + r * step <= cols - 1, solved for r; a negative step swaps the two bounds.
  int64_t low = -diagonal.start;
  int64_t high = cols - 1 - diagonal.start;
  if (diagonal.step < 0) std::swap(low, high);
  const int64_t first = -floor_div(-low, diagonal.step);  // ceil
  const int64_t last = floor_div(high, diagonal.step) + 1;
  const RowRange range{std::max<int64_t>(first, 0), std::min(last, rows)};
  return range.first < range.last ? range : RowRange{0, 0};
}

// Returns the positions of two of `count` matrices that share memory, or {-1, -1}; matrix_at(i) is the i-th. A list is
// written in parallel and in any order, so what is in it twice would be rewritten twice. Usual lists cost one pass, and
// one sort where addresses are unordered; blocks that interleave in memory (column slices of one matrix) are compared
// row interval by row interval.
template <typename MatrixAt>
std::pair<int64_t, int64_t> overlapping_pair(size_t count, const MatrixAt& matrix_at) {
  constexpr std::pair<int64_t, int64_t> kNone{-1, -1};
  if (count < 2) return kNone;
  struct Span {
    uintptr_t begin;
    uintptr_t end;
    size_t index;
    bool operator<(const Span& other) const { return begin < other.begin; }
  };
  std::vector<Span> spans;
  spans.reserve(count);
  bool sorted = true;
  for (size_t i = 0; i < count; ++i) {
    const Matrix& matrix = matrix_at(i);
    if (matrix.numel() == 0) continue;
    sorted = sorted && (spans.empty() || spans.back().begin <= matrix.begin());
    spans.push_back({matrix.begin(), matrix.end(), i});
  }
  if (!sorted) std::sort(spans.begin(), spans.end());

  // Blocks of one wide matrix: it is enough that their column intervals, modulo the stride, are apart. Blocks that meet
  // there may still have disjoint rows; that takes the exact comparison.
  std::vector<Span> intervals;
  const auto columns_apart = [&](size_t first, size_t last) {
    const auto stride = static_cast<uintptr_t>(matrix_at(spans[first].index).stride_bytes());
    intervals.clear();
    for (size_t i = first; i < last; ++i) {
      const Matrix& matrix = matrix_at(spans[i].index);
      const uintptr_t offset = (spans[i].begin - spans[first].begin) % stride;
      const auto width = static_cast<uintptr_t>(matrix.row_bytes());
      if (static_cast<uintptr_t>(matrix.stride_bytes()) != stride || offset + width > stride) return false;
      intervals.push_back({offset, offset + width, spans[i].index});
    }
    std::sort(intervals.begin(), intervals.end());
    for (size_t i = 1; i < intervals.size(); ++i) {
      if (intervals[i].begin < intervals[i - 1].end) return false;
    }
    return true;
  };

  for (size_t first = 0; first < spans.size();) {
    // [first, last): a group whose spans chain together.
    size_t last = first + 1;
    uintptr_t reach = spans[first].end;
    while (last < spans.size() && spans[last].begin < reach) reach = std::max(reach, spans[last++].end);
    if (last - first > 1 && !columns_apart(first, last)) {
      intervals.clear();
      for (size_t i = first; i < last; ++i) {
        const Matrix& matrix = matrix_at(spans[i].index);
        for (int64_t row = 0; row < (matrix.contiguous() ? 1 : matrix.rows); ++row) {
          const uintptr_t begin = matrix.begin() + static_cast<uintptr_t>(row * matrix.stride_bytes());
          const auto bytes = matrix.contiguous() ? matrix.end() - matrix.begin() : matrix.row_bytes();
          intervals.push_back({begin, begin + static_cast<uintptr_t>(bytes), spans[i].index});
        }
      }
      std::sort(intervals.begin(), intervals.end());
      for (size_t i = 1; i < intervals.size(); ++i) {
        if (intervals[i].begin < intervals[i - 1].end) {
          const auto [low, high] = std::minmax(intervals[i - 1].index, intervals[i].index);
          return {static_cast<int64_t>(low), static_cast<int64_t>(high)};
        }
      }
    }
    first = last;
  }
  return kNone;
}

}  // namespace neutralize
