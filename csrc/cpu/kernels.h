// The CPU kernels: one table per instruction set, chosen at run time. Raw pointers only, no torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../matrix.h"

namespace neutralize::cpu {

struct RewriteJob {
  Matrix matrix;
  double scale;
  double diagonal;
  double fill;
  Diagonal ones;
  RowRange ones_rows;  // the rows that have a one
  bool stream;         // more is filled in this call than the last-level cache holds: write around it
};

struct FoldJob {
  Matrix weight;
  Matrix bias;
  double scale;
  double shift;
};

struct Kernels {
  const char* name;
  // Elements [first, last) of the matrix, counted row by row.
  void (*rewrite)(const RewriteJob& job, int64_t first, int64_t last);
  // Rows [first, last) of the weight and the bias.
  void (*rescale_fold)(const FoldJob& job, int64_t first, int64_t last);
};

// nullptr where this build has no such kernels or this machine cannot run them.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* neon_kernels();
const Kernels* plain_kernels();

// The kernels in use: the best this machine runs, or what NEUTRALIZE_CPU_ISA or use_isa() asked for.
const Kernels& active_kernels();
std::vector<std::string> compiled_isas();
std::vector<std::string> usable_isas();
void use_isa(const std::string& name);  // "auto" for the best; throws std::invalid_argument

int64_t last_level_cache_bytes();

// rewrite_ on matrices in CPU memory, with its checks: what is left of the op once the tensors are read.
void rewrite(const std::vector<Matrix>& matrices, const std::vector<double>& scale, const std::vector<double>& diagonal,
             const std::vector<double>& fill, const std::vector<int64_t>& start, const std::vector<int64_t>& step);

}  // namespace neutralize::cpu
