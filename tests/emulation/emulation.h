// The CUDA of multi_tensor.cuh, on a CPU: the keywords, a grid that is walked thread by thread, and a watch on every
// access to tensor memory. Include it instead of that header; the kernels' text is the shipped one.
//
// What is checked while a grid is walked (each failure is counted and the first ones are printed):
//   - vector accesses are aligned, and lie inside a tensor (ASan sees the rest: tensors are exact-size allocations);
//   - every byte is read at most once and written at most once per call;
//   - no byte that one thread writes is touched by another thread of the grid: tensor memory is never shared;
//   - the lanes that walk a row take its words in turn, from lane 0 on, so that each access of a warp is runs of
//     consecutive 16-byte words (coalescing); so do they with the elements of a row that is no whole words.
// Threads between two barriers run one after the other, ascending or descending: what depends on their order shows up.
#pragma once

#define NEUTRALIZE_EMULATE_CUDA
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((static_cast<Wide>(a) * b) >> 64);
}

namespace emulation {

// Tensor memory that a call may touch, and who did: a thread of the grid per byte, or -1.
struct Region {
  uintptr_t begin, end;
  std::vector<int32_t> reader, writer;
};

struct Access {
  uintptr_t address;
  int32_t bytes, thread;
};

struct Watch {
  std::vector<Region> regions;  // ascending
  size_t latest = 0;
  int32_t thread = 0;               // block * threads of a block + thread
  std::vector<Access> accesses[2];  // of the phase under way: reads, writes
  int64_t bytes_read = 0, bytes_written = 0, word_bytes = 0;
  int64_t failures = 0;

  void fail(const char* what, uintptr_t address) {
    if (++failures <= 10) std::fprintf(stderr, "watch: %s at %#zx by thread %d\n", what, address, thread);
  }

  void add(const void* begin, int64_t bytes) {
    const auto at = reinterpret_cast<uintptr_t>(begin);
    const std::vector<int32_t> nobody(static_cast<size_t>(bytes), -1);
    regions.push_back({at, at + static_cast<uintptr_t>(bytes), nobody, nobody});
  }

  void begin_call() {
    std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
    latest = 0;
    bytes_read = bytes_written = word_bytes = 0;
  }

  void touch(const void* pointer, int32_t bytes, bool writes) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    const uintptr_t end = address + static_cast<uintptr_t>(bytes);
    if (address % static_cast<uintptr_t>(bytes) != 0) fail("a misaligned access", address);
    (writes ? bytes_written : bytes_read) += bytes;
    if (bytes == 16) word_bytes += bytes;
    accesses[writes].push_back({address, bytes, thread});
    if (latest >= regions.size() || address < regions[latest].begin || address >= regions[latest].end) {
      const auto after = std::upper_bound(regions.begin(), regions.end(), address,
                                          [](uintptr_t at, const Region& region) { return at < region.begin; });
      latest = after == regions.begin() ? regions.size() : static_cast<size_t>(after - regions.begin()) - 1;
    }
    if (latest >= regions.size() || end > regions[latest].end) return fail("an access outside every tensor", address);
    Region& region = regions[latest];
    for (size_t byte = address - region.begin; byte < end - region.begin; ++byte) {
      auto& mine = writes ? region.writer[byte] : region.reader[byte];
      const int32_t other = writes ? region.reader[byte] : region.writer[byte];
      if (mine != -1) fail(writes ? "a second write" : "a second read", region.begin + byte);
      if (other != -1 && other != thread) fail("a race", region.begin + byte);
      if (!writes && other != -1) fail("a read after the write", region.begin + byte);
      mine = thread;
    }
  }

  // A run is memory without a gap that one group of `lanes` lanes walks in accesses of one size. Access number i of it
  // belongs to lane i mod lanes: then the n-th access of the group is `lanes` neighbours. Runs shorter than a word are
  // heads and tails.
  void check_coalescing(int32_t lanes) {
    for (auto& all : accesses) {
      std::sort(all.begin(), all.end(), [](const Access& a, const Access& b) { return a.address < b.address; });
      for (size_t first = 0, last; first < all.size(); first = last) {
        const Access& begin = all[first];
        for (last = first + 1; last < all.size(); ++last) {
          const Access& before = all[last - 1];
          if (all[last].address != before.address + static_cast<uintptr_t>(before.bytes)) break;
          if (all[last].bytes != begin.bytes || all[last].thread / lanes != begin.thread / lanes) break;
        }
        if (static_cast<int64_t>(last - first) * begin.bytes < 16) continue;
        for (size_t at = first; at < last; ++at) {
          thread = all[at].thread;
          if (thread % lanes != static_cast<int32_t>(at - first) % lanes)
            fail("an uncoalesced access", all[at].address);
        }
      }
      all.clear();
    }
  }
};

inline Watch watch;

}  // namespace emulation

#define NEUTRALIZE_WATCH(pointer, bytes, writes) \
  ::emulation::watch.touch((pointer), static_cast<int32_t>(bytes), (writes))

#include "../../csrc/cuda/multi_tensor.cuh"

namespace emulation {

// How many lanes walk one row together.
inline int32_t lanes_of(const neutralize::cuda::RewriteForm& form) { return 1 << form.lanes_log2; }
inline int32_t lanes_of(const neutralize::cuda::RescaleFoldForm&) { return neutralize::cuda::kWarp; }

// The walk of `run`: the same phases, and the same barriers between them.
template <typename Kernel>
void walk_grid(const typename Kernel::Parameters& table, uint32_t blocks, bool descending) {
  constexpr int32_t kThreads = neutralize::cuda::kThreads;
  for (uint32_t turn = 0; turn < blocks; ++turn) {
    const uint32_t block = descending ? blocks - 1 - turn : turn;
    const uint32_t entry = neutralize::cuda::find_entry(table, block);
    const int32_t lanes = lanes_of(table.form(table.entry(entry).form));
    typename Kernel::Shared shared;
    std::memset(static_cast<void*>(&shared), 0xff, sizeof shared);  // NaN: what is read was written
    const auto each_thread = [&](auto&& body) {
      for (int32_t at = 0; at < kThreads; ++at) {
        const int32_t thread = descending ? kThreads - 1 - at : at;
        watch.thread = static_cast<int32_t>(block) * kThreads + thread;
        Kernel kernel{table, entry, block, thread};
        body(kernel);
      }
      watch.check_coalescing(lanes);
    };
    if constexpr (Kernel::kSetup) each_thread([&](Kernel& kernel) { kernel.setup(shared); });
    const int32_t steps = Kernel{table, entry, block, 0}.steps();
    if constexpr (Kernel::kPhases == 1) {
      for (int32_t step = 0; step < steps; ++step) {
        each_thread([&](Kernel& kernel) { kernel.template phase<0>(shared, step); });
      }
    } else {
      // No barrier stands between a step's last phase and the next step's first, so a thread may run both at once.
      each_thread([&](Kernel& kernel) { kernel.template phase<0>(shared, 0); });
      for (int32_t step = 0; step < steps; ++step) {
        each_thread([&](Kernel& kernel) { kernel.template phase<1>(shared, step); });
        each_thread([&](Kernel& kernel) {
          kernel.template phase<2>(shared, step);
          if (step + 1 < steps) kernel.template phase<0>(shared, step + 1);
        });
      }
    }
  }
}

}  // namespace emulation
