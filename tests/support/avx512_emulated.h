// AVX-512 in software: the kernels' code for processors that have it, run on one that lacks it, by gcc and slowly.
//
//   CXXFLAGS="-include $PWD/tests/support/avx512_emulated.h" python setup.py build_ext --inplace
//
// The instructions are those that csrc/cpu/vector.h names, with what they do to denormal numbers and to NaN; wide
// vectors are the compiler's affair. What loads, stores or streams where it must not does so here, too, or traps.
#pragma once

#define TLALIGN_EMULATED_AVX512  // cpu_features.cpp then finds them

#if defined(__AVX512F__)
#if defined(__AVX512BF16__)
#define TLALIGN_EMULATED_BF16
#endif

#if !defined(__GNUC__) || defined(__clang__)
#error "only gcc can be told inside a file to do without AVX-512"
#endif
#pragma GCC target("no-avx512f")

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tlalign::emulated {

#define TLALIGN_EMULATED static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <class To, class From>
TLALIGN_EMULATED To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Moves between registers and memory

template <class Register>
TLALIGN_EMULATED Register load(const void* p) {
  Register r;
  memcpy(&r, p, sizeof r);
  return r;
}

template <class Register, class T>
TLALIGN_EMULATED Register load_masked(uint32_t lanes, const void* p) {
  T elements[sizeof(Register) / sizeof(T)] = {};
  for (uint32_t i = 0; i < sizeof(Register) / sizeof(T); ++i)
    if (lanes >> i & 1) elements[i] = static_cast<const T*>(p)[i];
  return load<Register>(elements);
}

template <class T, class Register>
TLALIGN_EMULATED void store_masked(void* p, uint32_t lanes, Register r) {
  T elements[sizeof(Register) / sizeof(T)];
  memcpy(elements, &r, sizeof r);
  for (uint32_t i = 0; i < sizeof(Register) / sizeof(T); ++i)
    if (lanes >> i & 1) static_cast<T*>(p)[i] = elements[i];
}

TLALIGN_EMULATED void stream(float* p, Floats v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof v != 0) __builtin_trap();
  memcpy(p, &v, sizeof v);
}

// Arithmetic

// Of two zeros, or beside a NaN, the second.
TLALIGN_EMULATED Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

TLALIGN_EMULATED Floats from_half(__m256i halves) {
  __m128i parts[2];
  memcpy(parts, &halves, sizeof parts);
  const __m256 wide[2] = {_mm256_cvtph_ps(parts[0]), _mm256_cvtph_ps(parts[1])};
  return load<Floats>(wide);
}

template <int ROUNDING>
TLALIGN_EMULATED __m256i to_half(Floats v) {
  __m256 parts[2];
  memcpy(parts, &v, sizeof parts);
  const __m128i narrow[2] = {_mm256_cvtps_ph(parts[0], ROUNDING), _mm256_cvtps_ph(parts[1], ROUNDING)};
  return load<__m256i>(narrow);
}

TLALIGN_EMULATED Floats without_denormal(Floats v) {
  const Words word = bits<Words>(v);
  return bits<Floats>((word & 0x7f800000) == 0 ? word & 0x80000000 : word);
}

TLALIGN_EMULATED Halves to_bfloat16(Floats v) {
  const Words word = bits<Words>(without_denormal(v));
  const Words rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  return __builtin_convertvector((word & 0x7fffffff) > 0x7f800000 ? word >> 16 | 0x40 : rounded, Halves);
}

template <class Register>
TLALIGN_EMULATED Register two_to_bfloat16(Floats high, Floats low) {
  const Halves halves[2] = {to_bfloat16(low), to_bfloat16(high)};
  return load<Register>(halves);
}

TLALIGN_EMULATED Floats add_product(Floats sum, Words a, Words b) {
  return without_denormal(sum + without_denormal(bits<Floats>(a)) * without_denormal(bits<Floats>(b)));
}

template <class Register>
TLALIGN_EMULATED Floats add_products(Floats sum, Register left, Register right) {
  const Words a = bits<Words>(left), b = bits<Words>(right);
  return add_product(add_product(without_denormal(sum), a & 0xffff0000, b & 0xffff0000), a << 16, b << 16);
}

template <class Register>
TLALIGN_EMULATED Register permute(Register numbers, Register halves) {
  uint16_t from[32], number[32], to[32];
  memcpy(from, &halves, sizeof from);
  memcpy(number, &numbers, sizeof number);
  for (int i = 0; i < 32; ++i) to[i] = from[number[i] % 32];
  return load<Register>(to);
}

}  // namespace tlalign::emulated

#undef _mm512_maskz_cvtps_ph  // a macro where the compiler does not optimise
#define _mm512_loadu_si512(p) tlalign::emulated::load<__m512i>(p)
#define _mm512_maskz_loadu_epi32(lanes, p) tlalign::emulated::load_masked<__m512i, uint32_t>(lanes, p)
#define _mm256_maskz_loadu_epi16(lanes, p) tlalign::emulated::load_masked<__m256i, uint16_t>(lanes, p)
#define _mm_maskz_loadu_epi8(lanes, p) tlalign::emulated::load_masked<__m128i, uint8_t>(lanes, p)
#define _mm512_mask_storeu_epi32(p, lanes, r) tlalign::emulated::store_masked<uint32_t>(p, lanes, r)
#define _mm256_mask_storeu_epi16(p, lanes, r) tlalign::emulated::store_masked<uint16_t>(p, lanes, r)
#define _mm512_stream_ps(p, v) tlalign::emulated::stream(p, v)
#define _mm512_maskz_max_ps(lanes, a, b) tlalign::emulated::maximum(a, b)
#define _mm512_maskz_cvtph_ps(lanes, halves) tlalign::emulated::from_half(halves)
#define _mm512_maskz_cvtps_ph(lanes, v, rounding) tlalign::emulated::to_half<rounding>(v)
#define _mm512_cvtneps_pbh(v) tlalign::emulated::bits<__m256bh>(tlalign::emulated::to_bfloat16(v))
#define _mm512_cvtne2ps_pbh(high, low) tlalign::emulated::two_to_bfloat16<__m512i>(high, low)
#define _mm512_dpbf16_ps(sum, a, b) tlalign::emulated::add_products(sum, a, b)
#define _mm512_permutexvar_epi16(numbers, halves) tlalign::emulated::permute(numbers, halves)

#define __AVX512F__ 1
#if defined(TLALIGN_EMULATED_BF16)
#define __AVX512BF16__ 1
#endif
#endif
