// What this machine's memory can do at best, measured the way the kernels would use it: streaming stores over a large
// buffer, and a read-write pass in place. Plain C interface for ctypes; built for this very machine at bench time.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr ptrdiff_t kLine = 64;

// `lines` cache lines of one value from `out`, which is aligned to a line, past the cache where the CPU can.
void stream_lines(char* out, ptrdiff_t lines, float value) {
  uint64_t pattern;
  const float both[2] = {value, value};
  std::memcpy(&pattern, both, sizeof pattern);
  for (ptrdiff_t line = 0; line < lines; ++line, out += kLine) {
#if defined(__AVX512F__)
    _mm512_stream_ps(reinterpret_cast<float*>(out), _mm512_set1_ps(value));
#elif defined(__AVX__)
    _mm256_stream_ps(reinterpret_cast<float*>(out), _mm256_set1_ps(value));
    _mm256_stream_ps(reinterpret_cast<float*>(out) + 8, _mm256_set1_ps(value));
#elif defined(__x86_64__)
    for (int part = 0; part < 4; ++part) _mm_stream_ps(reinterpret_cast<float*>(out) + 4 * part, _mm_set1_ps(value));
#elif defined(__aarch64__)
    asm volatile("stnp %1, %1, [%0]\n stnp %1, %1, [%0, #16]\n stnp %1, %1, [%0, #32]\n stnp %1, %1, [%0, #48]"
                 :
                 : "r"(out), "r"(pattern)
                 : "memory");
#else
    for (int word = 0; word < 8; ++word) reinterpret_cast<uint64_t*>(out)[word] = pattern;
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

// The value matters: some processors write lines of zeros up to three times as fast as any other.
extern "C" void streaming_store(void* data, int64_t bytes, int threads, float value) {
  on_threads(static_cast<char*>(data), bytes, threads,
             [value](char* out, ptrdiff_t lines) { stream_lines(out, lines, value); });
}

extern "C" void read_write(void* data, int64_t bytes, int threads, float) {
  on_threads(static_cast<char*>(data), bytes, threads, negate_lines);
}
