// The ops on the CPU: check everything, split the bytes of the whole list over torch's threads, once.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "../checks.h"
#include "kernels.h"

namespace {

using neutralize::Matrix;
using neutralize::RescaleFold;
using neutralize::Rewrite;
using neutralize::cpu::RewriteJob;
using torch::stable::Tensor;

constexpr int64_t kLine = 64;
constexpr int64_t kGrainBytes = 512 << 10;    // what makes a thread worth waking
constexpr int64_t kPieceBytes = 4 << 20;      // what it takes at a time, at most
constexpr int64_t kStreamRunBytes = 4 << 10;  // shorter runs are not worth a fence

// What is left of one thread's share of the bytes; on a cache line of its own, since others look at it only at the end.
struct alignas(kLine) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// Jobs laid end to end as bytes, in one parallel region: body(job, first byte, last byte). A thread works on the same
// bytes at every call of the same size, since its cache may still hold them, and then takes pieces of what others have
// left, so that a thread which is held up costs a piece and not its share.
template <typename Job, typename Bytes, typename Body>
void for_all_bytes(const std::vector<Job>& jobs, const Bytes& bytes_of, const Body& body) {
  int64_t total = 0;
  for (const Job& job : jobs) total += bytes_of(job);
  const int64_t threads =
      total < 2 * kGrainBytes ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), total / kGrainBytes);
  if (threads == 1) {
    for (const Job& job : jobs) body(job, int64_t{0}, bytes_of(job));
    return;
  }
  std::vector<int64_t> ends;
  ends.reserve(jobs.size());
  int64_t end_of_job = 0;
  for (const Job& job : jobs) ends.push_back(end_of_job += bytes_of(job));
  const std::unique_ptr<Share[]> shares(new Share[threads]);
  const int64_t share_bytes = total / threads + 1;
  for (int64_t thread = 0; thread < threads; ++thread) {
    shares[thread].next = thread * share_bytes;
    shares[thread].end = std::min((thread + 1) * share_bytes, total);
  }
  const int64_t piece = std::min(kPieceBytes, share_bytes / 8 + 1);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first_thread, int64_t) {
    for (int64_t turn = 0; turn < threads; ++turn) {
      Share& share = shares[(first_thread + turn) % threads];
      while (share.next.load(std::memory_order_relaxed) < share.end) {
        const int64_t begin = share.next.fetch_add(piece, std::memory_order_relaxed);
        const int64_t end = std::min(begin + piece, share.end);
        auto at = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
        for (; at < jobs.size(); ++at) {
          const int64_t job_begin = at == 0 ? 0 : ends[at - 1];
          if (job_begin >= end) break;
          body(jobs[at], std::max(begin, job_begin) - job_begin, std::min(end, ends[at]) - job_begin);
        }
      }
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
  neutralize::cpu::rewrite(neutralize::matrices_of("rewrite_", "tensors", tensors, aoti_torch_device_type_cpu()), scale,
                           diagonal, fill, start, step);
}

void rescale_fold_cpu(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                      const std::vector<double>& scale, const std::vector<double>& shift) {
  const auto checked = neutralize::checked_folds(weights, biases, scale, shift, aoti_torch_device_type_cpu());
  // A row is its weights and its entry of the bias; cuts fall on the nearest row.
  const auto row_bytes = [](const RescaleFold& job) { return job.weight.row_bytes() + job.bias.itemsize(); };
  const auto& kernels = neutralize::cpu::active_kernels();
  for_all_bytes(
      checked, [&](const RescaleFold& job) { return job.weight.rows * row_bytes(job); },
      [&](const RescaleFold& job, int64_t begin, int64_t end) {
        const int64_t first = (begin + row_bytes(job) / 2) / row_bytes(job);
        const int64_t last = (end + row_bytes(job) / 2) / row_bytes(job);
        if (first < last) kernels.rescale_fold({job.weight, job.bias, job.scale, job.shift}, first, last);
      });
}

}  // namespace

void neutralize::cpu::rewrite(const std::vector<Matrix>& matrices, const std::vector<double>& scale,
                              const std::vector<double>& diagonal, const std::vector<double>& fill,
                              const std::vector<int64_t>& start, const std::vector<int64_t>& step) {
  const auto checked = checked_rewrites(matrices, scale, diagonal, fill, start, step);
  int64_t fill_bytes = 0;
  for (const auto& rewrite : checked) {
    if (rewrite.scale == 0) fill_bytes += rewrite.matrix.numel() * rewrite.matrix.itemsize();
  }
  const bool beyond_cache = fill_bytes > cpu::last_level_cache_bytes();
  const auto& kernels = cpu::active_kernels();
  for_all_bytes(
      checked, [](const Rewrite& rewrite) { return rewrite.matrix.numel() * rewrite.matrix.itemsize(); },
      [&](const Rewrite& rewrite, int64_t begin, int64_t end) {
        const auto& [matrix, s, d, f, ones] = rewrite;
        const int64_t first = cut_element(matrix, begin);
        const int64_t last = cut_element(matrix, end);
        if (first >= last) return;
        const int64_t run_bytes = matrix.contiguous() ? (last - first) * matrix.itemsize() : matrix.row_bytes();
        const auto ones_rows = d != 0 ? diagonal_rows(matrix.rows, matrix.cols, ones) : RowRange{0, 0};
        const RewriteJob job{matrix, s, d, f, ones, ones_rows, beyond_cache && run_bytes >= kStreamRunBytes};
        kernels.rewrite(job, first, last);
      });
}

STABLE_TORCH_LIBRARY_IMPL(neutralize, CPU, m) {
  m.impl("rewrite_", TORCH_BOX(&rewrite_cpu));
  m.impl("rescale_fold_", TORCH_BOX(&rescale_fold_cpu));
}
