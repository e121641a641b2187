// What this machine's memory can do at best, measured the way the kernels would use it: streaming stores over a large
// buffer, and a read-write pass in place. Plain C interface for ctypes; built for this very machine at bench time.
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr ptrdiff_t kLine = 64;

// `lines` cache lines of zeros from `out`, which is aligned to a line, past the cache where the CPU can.
void stream_lines(char* out, ptrdiff_t lines) {
  for (ptrdiff_t line = 0; line < lines; ++line, out += kLine) {
#if defined(__AVX512F__)
    _mm512_stream_ps(reinterpret_cast<float*>(out), _mm512_setzero_ps());
#elif defined(__AVX__)
    _mm256_stream_ps(reinterpret_cast<float*>(out), _mm256_setzero_ps());
    _mm256_stream_ps(reinterpret_cast<float*>(out) + 8, _mm256_setzero_ps());
#elif defined(__x86_64__)
    for (int part = 0; part < 4; ++part) _mm_stream_ps(reinterpret_cast<float*>(out) + 4 * part, _mm_setzero_ps());
#elif defined(__aarch64__)
    asm volatile("stnp xzr, xzr, [%0]\n stnp xzr, xzr, [%0, #16]\n stnp xzr, xzr, [%0, #32]\n stnp xzr, xzr, [%0, #48]"
                 :
                 : "r"(out)
                 : "memory");
#else
    __builtin_memset(out, 0, kLine);
#endif
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

void negate_lines(char* inout, ptrdiff_t lines) {
  auto* words = reinterpret_cast<uint64_t*>(inout);
  for (ptrdiff_t word = 0; word < lines * kLine / 8; ++word) words[word] ^= 0x8000000080000000u;
}

template <typename Pass>
void on_threads(char* data, int64_t bytes, int threads, Pass pass) {
  auto begin = (reinterpret_cast<uintptr_t>(data) + kLine - 1) / kLine;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kLine;
  const auto lines_each = (end - begin + threads - 1) / threads;
  std::vector<std::thread> workers;
  for (; begin < end; begin += lines_each) {
    const auto lines = lines_each < end - begin ? lines_each : end - begin;
    workers.emplace_back(pass, reinterpret_cast<char*>(begin * kLine), static_cast<ptrdiff_t>(lines));
  }
  for (auto& worker : workers) worker.join();
}

}  // namespace

extern "C" void streaming_store(void* data, int64_t bytes, int threads) {
  on_threads(static_cast<char*>(data), bytes, threads, stream_lines);
}

extern "C" void read_write(void* data, int64_t bytes, int threads) {
  on_threads(static_cast<char*>(data), bytes, threads, negate_lines);
}
