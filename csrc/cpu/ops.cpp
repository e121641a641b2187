// The ops on the CPU: check everything, split the bytes of the whole list over torch's threads, once.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../checks.h"
#include "kernels.h"

namespace {

using neutralize::Matrix;
using neutralize::cpu::FoldJob;
using neutralize::cpu::RewriteJob;
using torch::stable::Tensor;

constexpr int64_t kLine = 64;
constexpr int64_t kGrainBytes = 128 << 10;   // what a thread must have to do to be worth waking
constexpr int64_t kStreamRunBytes = 4 << 10;  // shorter runs are not worth a fence

// Jobs laid end to end as bytes, cut into one piece per thread: body(job, first byte, last byte).
template <typename Job, typename Bytes, typename Body>
void for_all_bytes(const std::vector<Job>& jobs, const Bytes& bytes_of, const Body& body) {
  std::vector<int64_t> ends;
  ends.reserve(jobs.size());
  int64_t total = 0;
  for (const Job& job : jobs) ends.push_back(total += bytes_of(job));
  if (total == 0) return;
  torch::stable::parallel_for(0, total, kGrainBytes, [&](int64_t begin, int64_t end) {
    auto at = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
    for (; at < jobs.size(); ++at) {
      const int64_t job_begin = at == 0 ? 0 : ends[at - 1];
      if (job_begin >= end) break;
      body(jobs[at], std::max(begin, job_begin) - job_begin, std::min(end, ends[at]) - job_begin);
    }
  });
}

// Cuts fall on cache lines, so that no line has two writers. (Rows that are apart in memory: on elements.)
int64_t cut_element(const Matrix& matrix, int64_t byte) {
  const int64_t itemsize = matrix.itemsize();
  if (byte == matrix.numel() * itemsize || !matrix.contiguous()) return byte / itemsize;
  const auto lead = static_cast<int64_t>(matrix.begin() % kLine);
  return std::max<int64_t>((byte + lead) / kLine * kLine - lead, 0) / itemsize;
}

void rewrite_cpu(const std::vector<Tensor>& tensors, const std::vector<double>& scale,
                 const std::vector<double>& diagonal, const std::vector<double>& fill,
                 const std::vector<int64_t>& start, const std::vector<int64_t>& step) {
  const auto checked = neutralize::checked_rewrites(tensors, scale, diagonal, fill, start, step,
                                                    aoti_torch_device_type_cpu());
  int64_t fill_bytes = 0;
  for (const auto& rewrite : checked) {
    if (rewrite.scale == 0) fill_bytes += rewrite.matrix.numel() * rewrite.matrix.itemsize();
  }
  const bool beyond_cache = fill_bytes > neutralize::cpu::last_level_cache_bytes();
  std::vector<RewriteJob> jobs;
  jobs.reserve(checked.size());
  for (const auto& [matrix, s, d, f, ones] : checked) {
    const int64_t run_bytes = matrix.contiguous() ? matrix.numel() * matrix.itemsize() : matrix.row_bytes();
    jobs.push_back({matrix, s, d, f, ones, neutralize::diagonal_rows(matrix.rows, matrix.cols, ones),
                    beyond_cache && run_bytes >= kStreamRunBytes});
  }
  const auto& kernels = neutralize::cpu::active_kernels();
  for_all_bytes(
      jobs, [](const RewriteJob& job) { return job.matrix.numel() * job.matrix.itemsize(); },
      [&](const RewriteJob& job, int64_t begin, int64_t end) {
        const int64_t first = cut_element(job.matrix, begin);
        const int64_t last = cut_element(job.matrix, end);
        if (first < last) kernels.rewrite(job, first, last);
      });
}

void rescale_fold_cpu(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                      const std::vector<double>& scale, const std::vector<double>& shift) {
  const auto checked = neutralize::checked_folds(weights, biases, scale, shift, aoti_torch_device_type_cpu());
  std::vector<FoldJob> jobs;
  jobs.reserve(checked.size());
  for (const auto& fold : checked) jobs.push_back({fold.weight, fold.bias, fold.scale, fold.shift});
  // A row is its weights and its entry of the bias; cuts fall on the nearest row.
  const auto row_bytes = [](const FoldJob& job) { return job.weight.row_bytes() + job.bias.itemsize(); };
  const auto& kernels = neutralize::cpu::active_kernels();
  for_all_bytes(
      jobs, [&](const FoldJob& job) { return job.weight.rows * row_bytes(job); },
      [&](const FoldJob& job, int64_t begin, int64_t end) {
        const int64_t first = (begin + row_bytes(job) / 2) / row_bytes(job);
        const int64_t last = (end + row_bytes(job) / 2) / row_bytes(job);
        if (first < last) kernels.rescale_fold(job, first, last);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neutralize, CPU, m) {
  m.impl("rewrite_", TORCH_BOX(&rewrite_cpu));
  m.impl("rescale_fold_", TORCH_BOX(&rescale_fold_cpu));
}
