// Levels of instruction sets: what this machine has, and a limit that hides those above it (PJAX_CPU_LEVEL).

#include <algorithm>
#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "lanes.h"

namespace {

// Each has all that those before it have. kBaseline is what every processor of the architecture has.
enum Level : int { kBaseline, kAvx2, kAvx512, kAmx };

std::atomic<int> limit{kAmx};

#if defined(__x86_64__)
// Whether the processor has AMX tiles, and the system saves them for each thread.
bool HasTiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1)) return false;  // AMX-TILE
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;           // OSXSAVE
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & 3u << 17) == 3u << 17;  // XTILECFG and XTILEDATA
}
#endif

int MachineLevel() {
#if defined(__x86_64__)
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))) return kBaseline;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")))
    return kAvx2;
  return HasTiles() ? kAmx : kAvx512;
#else
  return kBaseline;
#endif
}

int LevelInUse() {
  static const int machine = MachineLevel();
  return std::min(machine, limit.load(std::memory_order_relaxed));
}

}  // namespace

namespace pjax {

Width WidestVectors() {
#if defined(__x86_64__)
  const int level = LevelInUse();
  return level >= kAvx512 ? Width::Avx512 : level == kAvx2 ? Width::Avx2 : Width::Plain;
#else
  return Width::Plain;
#endif
}

}  // namespace pjax

// The level in use, a `Level`.
extern "C" int PjaxCpuLevel() { return LevelInUse(); }

// Hides the instruction sets above `level` from calls that begin from now on.
extern "C" void PjaxLimitCpuLevel(int level) { limit.store(level, std::memory_order_relaxed); }

// Whether the level in use has AVX-512's products of bfloat16.
extern "C" int PjaxHasBfloat16Units() {
#if defined(__x86_64__)
  return LevelInUse() >= kAvx512 && __builtin_cpu_supports("avx512bf16") ? 1 : 0;
#else
  return 0;
#endif
}
