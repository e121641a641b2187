// What is checked before the first byte is written, for callers that come through torch.ops and not through ops.py, which
// says the same in Python's words. All of it is read-only, so a bad tensor at the end of a list leaves the list as it was.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "matrix.h"

namespace neutralize {

using torch::stable::Tensor;

// One coefficient per tensor, or a single one for all of them: a list of thousands of equal numbers costs more to pass
// than the work it describes.
template <typename Number>
class PerTensor {
 public:
  PerTensor(const char* op, const char* parameter, const std::vector<Number>& values, size_t tensors)
      : values_(values), stride_(values.size() == 1 ? 0 : 1) {
    STD_TORCH_CHECK(values.size() == 1 || values.size() == tensors, op, ": expected 1 or ", tensors, " numbers for ",
                    parameter, ", got ", values.size(), "; pass one for all tensors or one for each");
  }
  Number operator[](size_t index) const { return values_[index * stride_]; }

 private:
  const std::vector<Number>& values_;
  size_t stride_;
};

// The dtype as the kernels know it; dtypes that no kernel knows are refused.
inline Storage storage_of(const char* op, const char* parameter, size_t index, const Tensor& tensor) {
  static const int32_t codes[] = {aoti_torch_dtype_float64(),       aoti_torch_dtype_float32(),
                                  aoti_torch_dtype_float16(),       aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float8_e4m3fn(), aoti_torch_dtype_float8_e5m2()};
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  for (int8_t i = 0; i < 6; ++i) {
    if (codes[i] == dtype) return static_cast<Storage>(i);
  }
  STD_TORCH_CHECK(false, op, ": expected float64, float32, float16, bfloat16, float8_e4m3fn or float8_e5m2 for ",
                  parameter, "[", index, "], got another dtype; dequantize or cast it first");
  return Storage::kFloat32;
}

// The tensor as a matrix, if it lies on `device_type` as contiguous memory or as rows of contiguous memory.
inline Matrix matrix_of(const char* op, const char* parameter, size_t index, const Tensor& tensor,
                        int32_t device_type) {
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
  STD_TORCH_CHECK(device == device_type, op, ": expected tensors of one kind of device for ", parameter,
                  ", got another at ", parameter, "[", index,
                  "]; call once per device, or use neutralize.ops, which does");
  const Storage storage = storage_of(op, parameter, index, tensor);
  const auto sizes = tensor.sizes();
  auto [matrix, native] = layout_of(static_cast<int64_t>(sizes.size()), sizes.data(), tensor.strides().data(), storage);
  if (matrix.numel() == 0) return matrix;
  void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor.get(), &data));
  STD_TORCH_CHECK(data != nullptr, op, ": expected a tensor with memory for ", parameter, "[", index,
                  "], got one whose memory was freed; gather or load the weights first");
  matrix.data = static_cast<char*>(data);
  STD_TORCH_CHECK(native && aligned(matrix), op, ": expected contiguous memory or rows of contiguous memory for ",
                  parameter, "[", index, "], got another layout; use neutralize.ops, which takes every layout");
  return matrix;
}

// The tensors of a list as matrices, if all of them lie on `device_type`: aoti_torch_device_type_cpu() or _cuda().
inline std::vector<Matrix> matrices_of(const char* op, const char* parameter, const std::vector<Tensor>& tensors,
                                       int32_t device_type) {
  std::vector<Matrix> matrices;
  matrices.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    matrices.push_back(matrix_of(op, parameter, i, tensors[i], device_type));
  }
  return matrices;
}

// The coefficient in the type it will be used in must be a number.
inline void check_finite(const char* op, const char* parameter, size_t index, double value, Storage storage) {
  const bool finite = storage == Storage::kFloat64 ? std::isfinite(value) : std::isfinite(static_cast<float>(value));
  STD_TORCH_CHECK(finite, op, ": expected a finite ", storage == Storage::kFloat64 ? "float64" : "float32", " for ",
                  parameter, ", got ", value, " for tensor ", index, "; pass a finite number in range");
}

inline void check_column(const char* op, const char* parameter, int64_t value) {
  constexpr int64_t kLimit = int64_t{1} << 62;
  STD_TORCH_CHECK(value > -kLimit && value < kLimit, op, ": expected less than 2^62 in magnitude for ", parameter,
                  ", got ", value, "; no tensor has a column there");
}

// ---- rewrite_ ------------------------------------------------------------------------------------------------------
struct Rewrite {
  Matrix matrix;
  double scale;
  double diagonal;
  double fill;
  Diagonal ones;
};

// All tensors of a call with their coefficients, checked.
inline std::vector<Rewrite> checked_rewrites(const std::vector<Matrix>& matrices, const std::vector<double>& scale,
                                             const std::vector<double>& diagonal, const std::vector<double>& fill,
                                             const std::vector<int64_t>& start, const std::vector<int64_t>& step) {
  constexpr const char* op = "rewrite_";
  const size_t count = matrices.size();
  const PerTensor<double> scales(op, "scale", scale, count);
  const PerTensor<double> diagonals(op, "diagonal", diagonal, count);
  const PerTensor<double> fills(op, "fill", fill, count);
  const PerTensor<int64_t> starts(op, "start", start, count);
  const PerTensor<int64_t> steps(op, "step", step, count);
  std::vector<Rewrite> rewrites;
  rewrites.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Matrix& matrix = matrices[i];
    check_finite(op, "scale", i, scales[i], matrix.storage);
    check_finite(op, "diagonal", i, diagonals[i], matrix.storage);
    check_finite(op, "fill", i, fills[i], matrix.storage);
    check_finite(op, "diagonal + fill", i, diagonals[i] + fills[i], matrix.storage);
    check_column(op, "start", starts[i]);
    check_column(op, "step", steps[i]);
    rewrites.push_back({matrix, scales[i], diagonals[i], fills[i], {starts[i], steps[i]}});
  }
  const auto pair = overlapping_pair(count, [&](size_t i) -> const Matrix& { return matrices[i]; });
  STD_TORCH_CHECK(pair.first < 0, op, ": expected tensors with memory of their own for tensors, got tensors[",
                  pair.first, "] and tensors[", pair.second,
                  "] sharing some; name shared memory once, it would be rewritten twice");
  return rewrites;
}

// ---- rescale_fold_ -------------------------------------------------------------------------------------------------
struct RescaleFold {
  Matrix weight;
  Matrix bias;  // (rows, 1), possibly strided
  double scale;
  double shift;
};

inline std::vector<RescaleFold> checked_folds(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                              const std::vector<double>& scale, const std::vector<double>& shift,
                                              int32_t device_type) {
  constexpr const char* op = "rescale_fold_";
  const size_t count = weights.size();
  STD_TORCH_CHECK(biases.size() == count, op, ": expected ", count, " tensors for biases, one per weight, got ",
                  biases.size(), "; pair them up");
  const PerTensor<double> scales(op, "scale", scale, count);
  const PerTensor<double> shifts(op, "shift", shift, count);
  std::vector<RescaleFold> folds;
  folds.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Matrix weight = matrix_of(op, "weights", i, weights[i], device_type);
    const Matrix bias = matrix_of(op, "biases", i, biases[i], device_type);
    STD_TORCH_CHECK(weights[i].dim() >= 1 && biases[i].dim() == 1 && bias.rows == weight.rows, op, ": expected shape (",
                    weight.rows, ",) for biases[", i, "], one entry per row of its weight, got ", biases[i].dim(),
                    " dims and ", bias.rows, " rows; pair weights and biases of the same layer");
    STD_TORCH_CHECK(weight.storage == bias.storage, op, ": expected one dtype for weights[", i, "] and biases[", i,
                    "], got two; cast the bias first");
    check_finite(op, "scale", i, scales[i], weight.storage);
    check_finite(op, "shift", i, shifts[i], weight.storage);
    folds.push_back({weight, bias, scales[i], shifts[i]});
  }
  const auto pair = overlapping_pair(
      2 * count, [&](size_t i) -> const Matrix& { return i % 2 == 0 ? folds[i / 2].weight : folds[i / 2].bias; });
  STD_TORCH_CHECK(pair.first < 0, op, ": expected tensors with memory of their own for weights and biases, got pairs ",
                  pair.first / 2, " and ", pair.second / 2, " sharing some; name shared memory once");
  return folds;
}

}  // namespace neutralize
