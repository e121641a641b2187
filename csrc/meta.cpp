// Meta kernels: the ops return nothing, so there is no output to describe and only what can be checked is checked.
// Sizes are left alone: under torch.compile with dynamic shapes they are symbols. A list that is only partly on meta comes
// here too, and must not pass for rewritten.
#include <torch/csrc/stable/library.h>

#include "checks.h"

namespace {

using neutralize::PerTensor;
using torch::stable::Tensor;

void check_meta(const char* op, const char* parameter, const std::vector<Tensor>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    int32_t device = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensors[i].get(), &device));
    STD_TORCH_CHECK(device == aoti_torch_device_type_meta(), op, ": expected tensors of one kind of device for ",
                    parameter, ", got some on meta and ", parameter, "[", i, "] elsewhere; load the weights first");
    neutralize::storage_of(op, parameter, i, tensors[i]);
  }
}

void rewrite_meta(const std::vector<Tensor>& tensors, const std::vector<double>& scale,
                  const std::vector<double>& diagonal, const std::vector<double>& fill,
                  const std::vector<int64_t>& start, const std::vector<int64_t>& step) {
  constexpr const char* op = "rewrite_";
  PerTensor<double>(op, "scale", scale, tensors.size());
  PerTensor<double>(op, "diagonal", diagonal, tensors.size());
  PerTensor<double>(op, "fill", fill, tensors.size());
  PerTensor<int64_t>(op, "start", start, tensors.size());
  PerTensor<int64_t>(op, "step", step, tensors.size());
  check_meta(op, "tensors", tensors);
}

void rescale_fold_meta(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                       const std::vector<double>& scale, const std::vector<double>& shift) {
  constexpr const char* op = "rescale_fold_";
  STD_TORCH_CHECK(biases.size() == weights.size(), op, ": expected ", weights.size(),
                  " tensors for biases, one per weight, got ", biases.size(), "; pair them up");
  PerTensor<double>(op, "scale", scale, weights.size());
  PerTensor<double>(op, "shift", shift, weights.size());
  check_meta(op, "weights", weights);
  check_meta(op, "biases", biases);
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto weight = neutralize::storage_of(op, "weights", i, weights[i]);
    const auto bias = neutralize::storage_of(op, "biases", i, biases[i]);
    STD_TORCH_CHECK(weight == bias, op, ": expected one dtype for weights[", i, "] and biases[", i,
                    "], got two; cast the bias first");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neutralize, Meta, m) {
  m.impl("rewrite_", TORCH_BOX(&rewrite_meta));
  m.impl("rescale_fold_", TORCH_BOX(&rescale_fold_meta));
}
