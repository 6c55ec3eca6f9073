// Asks the processor which instruction sets it has, and the operating system which of their registers it preserves.
#include "cpu_features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tlalign {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

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
#if defined(TLALIGN_EMULATED_AVX512)
  features.avx512f = features.avx512dq = features.avx512bw = features.avx512vl = features.avx512_bf16 = features.avx2;
  return features;
#endif
  if ((preserved & ZMM_STATE) != ZMM_STATE) return features;

  const uint32_t last_subleaf = extended.eax;
  features.avx512f = bit(extended.ebx, 16);
  features.avx512dq = bit(extended.ebx, 17);
  features.avx512bw = bit(extended.ebx, 30);
  features.avx512vl = bit(extended.ebx, 31);
  features.avx512_bf16 = last_subleaf >= 1 && bit(cpuid(7, 1).eax, 5);
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
