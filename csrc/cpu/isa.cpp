// Which kernels run: decided once, at the first call, from what the processor says.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace neutralize::cpu {
namespace {

std::atomic<const Kernels*> active{nullptr};

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> kernels;
  for (const Kernels* candidate : {avx512_kernels(), avx2_kernels(), neon_kernels(), plain_kernels()}) {
    if (candidate != nullptr) kernels.push_back(candidate);
  }
  return kernels;
}

const Kernels* find(const std::string& name) {
  const auto kernels = usable();
  if (name.empty() || name == "auto") return kernels.front();
  std::string names = "auto";
  for (const Kernels* candidate : kernels) {
    if (name == candidate->name) return candidate;
    names += std::string(", ") + candidate->name;
  }
  throw std::invalid_argument("cpu: expected one of " + names + " for NEUTRALIZE_CPU_ISA, got " + name +
                              "; unset it for the best this machine runs");
}

}  // namespace

const Kernels& active_kernels() {
  const Kernels* kernels = active.load(std::memory_order_relaxed);
  if (kernels == nullptr) {
    const char* wanted = std::getenv("NEUTRALIZE_CPU_ISA");
    kernels = find(wanted == nullptr ? "" : wanted);
    active.store(kernels, std::memory_order_relaxed);
  }
  return *kernels;
}

void use_isa(const std::string& name) { active.store(find(name), std::memory_order_relaxed); }

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable()) names.emplace_back(kernels->name);
  return names;
}

std::vector<std::string> compiled_isas() {
#if defined(__x86_64__)
  return {"avx512", "avx2", "plain"};
#elif defined(__aarch64__)
  return {"neon", "plain"};
#else
  return {"plain"};
#endif
}

int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t found = 0;
    // The kernel is asked before glibc, which knows nothing on aarch64 and in virtual machines may report ten times the size.
    for (const char* index : {"index3", "index2"}) {
      const std::string path = std::string("/sys/devices/system/cpu/cpu0/cache/") + index + "/size";
      if (std::FILE* file = std::fopen(path.c_str(), "r")) {
        long long kib = 0;
        if (std::fscanf(file, "%lldK", &kib) == 1) found = kib * 1024;
        std::fclose(file);
      }
      if (found > 0) break;
    }
#if defined(_SC_LEVEL3_CACHE_SIZE)
    if (found <= 0) found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return found > 0 ? found : int64_t{32} << 20;
  }();
  return bytes;
}

}  // namespace neutralize::cpu
