// Asks the processor which instruction sets it has, and the operating system which of their registers it preserves.
#include "cpu_features.h"

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tlalign {
namespace {

#if defined(__x86_64__) || defined(_M_X64)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

#if defined(_MSC_VER) && !defined(__clang__)

// All zero where the processor doesn't know the leaf.
Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  int r[4];
  __cpuid(r, 0);
  if (static_cast<uint32_t>(r[0]) < leaf) return {};
  __cpuidex(r, static_cast<int>(leaf), static_cast<int>(subleaf));
  return {static_cast<uint32_t>(r[0]), static_cast<uint32_t>(r[1]), static_cast<uint32_t>(r[2]),
          static_cast<uint32_t>(r[3])};
}

uint64_t extended_control_register() { return _xgetbv(0); }

#else

// All zero where the processor doesn't know the leaf.
Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

uint64_t extended_control_register() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

#endif

bool bit(uint32_t word, int index) { return (word >> index) & 1; }

CpuFeatures detect() {
  constexpr uint64_t YMM_STATE = 0x06;  // XCR0 bits 1 and 2: the system preserves xmm and ymm registers
  constexpr uint64_t ZMM_STATE = 0xe6;  // and bits 5 to 7: mask registers, upper halves of zmm0-15, zmm16-31

  CpuFeatures features;
  const Registers basic = cpuid(1, 0);
  const bool os_uses_xsave = bit(basic.ecx, 27);
  const uint64_t preserved = os_uses_xsave ? extended_control_register() : 0;
  if ((preserved & YMM_STATE) != YMM_STATE) return features;

  const Registers extended = cpuid(7, 0);
  features.fma = bit(basic.ecx, 12);
  features.f16c = bit(basic.ecx, 29);
  features.avx2 = bit(extended.ebx, 5);
  if ((preserved & ZMM_STATE) != ZMM_STATE) return features;

  const uint32_t last_subleaf = extended.eax;
  features.avx512f = bit(extended.ebx, 16);
  features.avx512dq = bit(extended.ebx, 17);
  features.avx512bw = bit(extended.ebx, 30);
  features.avx512vl = bit(extended.ebx, 31);
  features.avx512_bf16 = last_subleaf >= 1 && bit(cpuid(7, 1).eax, 5);
  return features;
}

#elif defined(__aarch64__) || defined(_M_ARM64)

CpuFeatures detect() {
  CpuFeatures features;
  features.neon = true;  // part of the base architecture
#if defined(__linux__)
  features.sve = (getauxval(AT_HWCAP) >> 22) & 1;         // HWCAP_SVE
  features.neon_bf16 = (getauxval(AT_HWCAP2) >> 14) & 1;  // HWCAP2_BF16
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof(value);
  features.neon_bf16 = sysctlbyname("hw.optional.arm.FEAT_BF16", &value, &size, nullptr, 0) == 0 && value != 0;
#endif
  return features;
}

#else

CpuFeatures detect() { return {}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace tlalign
