// Every schema of this library. Kernels: cpu/ops.cpp, cuda/ops.cpp, meta.cpp; what they do to an element: affine.h.
//
// `(a!)` says that the tensors are written. torch.compile needs it: it must not reorder calls across the write.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(neutralize, m) {
  // W <- scale * W + diagonal * D + fill, one coefficient of each kind per tensor.
  // D: row r (dim 0) has its one at column start + r * step (dims 1.. flattened), and none where that is outside.
  m.def("rewrite_(Tensor(a!)[] tensors, float[] scale, float[] diagonal, float[] fill, int[] start, int[] step) -> ()");

  // b <- b + shift * (W . 1), then W <- scale * W: one pass over W (out, ...) and its bias b (out,).
  m.def("rescale_fold_(Tensor(a!)[] weights, Tensor(b!)[] biases, float[] scale, float[] shift) -> ()");
}
