// Vectors of LANES floats by the vector extensions of gcc and clang: one source for every instruction set.
//
// Compiled once per instruction set with other flags, so everything here is local to its translation unit: a function
// shared between them could be the one that the processor at hand can't run.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define TLALIGN_LANES 16
#elif defined(__AVX2__)
#define TLALIGN_LANES 8
#else
#define TLALIGN_LANES 4
#endif

#define TLALIGN_INLINE static inline __attribute__((always_inline))

// Before a loop of a constant count over an array of vectors: early enough that the array becomes registers.
#if defined(__clang__)
#define TLALIGN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define TLALIGN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

constexpr int LANES = TLALIGN_LANES;

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVector __attribute__((vector_size(LANES * 4)));
typedef uint32_t UintVector __attribute__((vector_size(LANES * 4)));
typedef double DoubleVector __attribute__((vector_size(LANES * 8)));
typedef uint64_t LongVector __attribute__((vector_size(LANES * 8)));
typedef uint16_t ShortVector __attribute__((vector_size(LANES * 2)));
typedef uint8_t ByteVector __attribute__((vector_size(LANES)));

// x - 0 is x for every x, -0 and NaN included, so that this is one broadcast.
TLALIGN_INLINE Vector broadcast(float x) { return x - Vector{}; }

TLALIGN_INLINE Vector load(const float* p) {
  Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}

TLALIGN_INLINE void store(float* p, Vector v) { memcpy(p, &v, sizeof v); }

// Past the caches, for what is too large to stay in them; `p` lies at a multiple of the vector's size. Others see it
// after `finish_streams` only.
TLALIGN_INLINE void stream(float* p, Vector v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, v);
#else
  store(p, v);
#endif
}

TLALIGN_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class To, class From>
TLALIGN_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Keeps a NaN in `x`, and a NaN in `y` is lost.
TLALIGN_INLINE Vector maximum(Vector x, Vector y) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, y, x);  // without a mask gcc 12 warns of its own header
#elif defined(__AVX2__)
  return _mm256_max_ps(y, x);
#else
  return y > x ? y : x;
#endif
}

// 2^x for x < 128; 0 below about -126, where normal numbers end. Exact at 0, relative error 2e-7: the polynomial is the
// minimax one of 2^f on [-1/2, 1/2] among those that are 1 at 0.
TLALIGN_INLINE Vector power_of_two(Vector x) {
  // 1.5 * 2^23 + 127: adding it rounds to an integer, whose last bits are then those of the exponent of 2^integer.
  constexpr float TO_EXPONENT = 12583039.0f;
  x = maximum(x, broadcast(-127.0f));
  const Vector shifted = x + TO_EXPONENT;
  const Vector fraction = x - (shifted - TO_EXPONENT);
  Vector power = broadcast(1.3264705e-3f);
  power = power * fraction + 9.671513e-3f;
  power = power * fraction + 5.550734e-2f;
  power = power * fraction + 2.4022242e-1f;
  power = power * fraction + 6.93147e-1f;
  power = power * fraction + 1.0f;
  return power * bits<Vector>(bits<UintVector>(shifted) << 23);
}

// ln x for normal x > 0, to 2e-7 of max(|ln x|, 1): the series of artanh on [0.75, 1.5).
TLALIGN_INLINE Vector logarithm(Vector x) {
  const IntVector word = bits<IntVector>(x);
  const IntVector exponent = (word - 0x3f400000) >> 23;
  const Vector mantissa = bits<Vector>(word - (exponent << 23));
  const Vector z = (mantissa - 1.0f) / (mantissa + 1.0f), square = z * z;
  Vector series = broadcast(2.0f / 11);
  series = series * square + 2.0f / 9;
  series = series * square + 2.0f / 7;
  series = series * square + 2.0f / 5;
  series = series * square + 2.0f / 3;
  series = series * square + 2.0f;
  return __builtin_convertvector(exponent, Vector) * 0.693147181f + series * z;
}

// The element types of queries, keys, values besides float: how a vector of them becomes one of floats, and back.

struct BFloat16 {
  uint16_t word;
};
struct Float16 {
  uint16_t word;
};
// Of a mask: what is added to a score, 0 where the key is seen.
struct Boolean {
  uint8_t byte;
};

template <class T>
TLALIGN_INLINE ShortVector load_words(const T* p) {
  ShortVector v;
  memcpy(&v, p, sizeof v);
  return v;
}

TLALIGN_INLINE Vector load(const BFloat16* p) {
  return bits<Vector>(__builtin_convertvector(load_words(p), UintVector) << 16);
}

TLALIGN_INLINE Vector load(const Float16* p) {
#if defined(__AVX512F__)
  return bits<Vector>(_mm512_maskz_cvtph_ps(0xffff, bits<__m256i>(load_words(p))));
#elif defined(__AVX2__)
  return bits<Vector>(_mm256_cvtph_ps(bits<__m128i>(load_words(p))));
#else
  const UintVector word = __builtin_convertvector(load_words(p), UintVector), magnitude = word & 0x7fff;
  // Exponents are biased by 15 there and by 127 here. Denormal numbers are so many times the last digit of 1/2, which
  // needs no denormal float: a thread may be told to take those as 0 (torch.set_flush_denormal).
  const UintVector normal = (magnitude << 13) + 0x38000000;
  const UintVector denormal = bits<UintVector>(bits<Vector>(magnitude | 0x3f000000) - 0.5f);
  UintVector result = magnitude < 0x400 ? denormal : normal;
  result = magnitude >= 0x7c00 ? result | 0x7f800000 : result;
  return bits<Vector>(result | (word & 0x8000) << 16);
#endif
}

TLALIGN_INLINE Vector load(const Boolean* p) {
  ByteVector bytes;
  memcpy(&bytes, p, sizeof bytes);
  const UintVector seen = __builtin_convertvector(bytes, UintVector);
  return seen != 0 ? Vector{} : broadcast(-__builtin_inff());
}

// Round to nearest, ties to even, as everyone does.
TLALIGN_INLINE UintVector round_to_bfloat16(Vector v) {
  const UintVector word = bits<UintVector>(v);
  const UintVector rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  const UintVector quiet = word >> 16 | 0x40;
  return (word & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
}

TLALIGN_INLINE void store(BFloat16* p, Vector v) {
#if defined(__AVX512BF16__)
  const __m256bh words = _mm512_cvtneps_pbh(bits<__m512>(v));  // denormal numbers become 0
#else
  const ShortVector words = __builtin_convertvector(round_to_bfloat16(v), ShortVector);
#endif
  memcpy(p, &words, sizeof words);
}

TLALIGN_INLINE void store(Float16* p, Vector v) {
#if defined(__AVX512F__)
  const __m256i words = _mm512_maskz_cvtps_ph(0xffff, bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  const __m128i words = _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
#else
  constexpr uint32_t TO_DENORMAL = (127 - 15 + 23 - 10 + 1) << 23;  // adding it leaves the digits of a denormal number
  const UintVector word = bits<UintVector>(v), magnitude = word & 0x7fffffff;
  const UintVector normal = (magnitude + (0xc8000fffu + (magnitude >> 13 & 1))) >> 13;
  const UintVector denormal = bits<UintVector>(bits<Vector>(magnitude) + bits<float>(TO_DENORMAL)) - TO_DENORMAL;
  UintVector half = magnitude < 0x38800000 ? denormal : normal;
  half = magnitude >= 0x47800000 ? UintVector{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? UintVector{} + 0x7e00 : half;
  const ShortVector words = __builtin_convertvector(half | (word >> 16 & 0x8000), ShortVector);
#endif
  memcpy(p, &words, sizeof words);
}

#if defined(__AVX512F__)

TLALIGN_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
}

// Less than LANES elements, 0 after them.
template <class T>
TLALIGN_INLINE void copy_first(T (&whole)[LANES], const T* p, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    const __m512i words = _mm512_maskz_loadu_epi32(first_lanes(count), p);
    memcpy(whole, &words, sizeof whole);
  } else if constexpr (sizeof(T) == 2) {
    const __m256i words = _mm256_maskz_loadu_epi16(first_lanes(count), p);
    memcpy(whole, &words, sizeof whole);
  } else {
    const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(count), p);
    memcpy(whole, &bytes, sizeof whole);
  }
}

template <class T>
TLALIGN_INLINE void copy_first(T* p, const T (&whole)[LANES], int64_t count) {
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(p, first_lanes(count), _mm512_loadu_si512(whole));
  else
    _mm256_mask_storeu_epi16(p, first_lanes(count), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(whole)));
}

#else

template <class T>
TLALIGN_INLINE void copy_first(T (&whole)[LANES], const T* p, int64_t count) {
  for (int64_t i = 0; i < LANES; ++i) whole[i] = i < count ? p[i] : T{};
}

template <class T>
TLALIGN_INLINE void copy_first(T* p, const T (&whole)[LANES], int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = whole[i];
}

#endif

// The first `count` elements, 0 in the other lanes; nothing beyond them is read.
template <class T>
TLALIGN_INLINE Vector load_first(const T* p, int64_t count) {
  if (count >= LANES) return load(p);
  T whole[LANES];
  copy_first(whole, p, count);
  return load(whole);
}

// The same of elements that are `stride` apart.
template <class T>
TLALIGN_INLINE Vector load_strided(const T* p, int64_t stride, int64_t count) {
  if (stride == 1) return load_first(p, count);
  T whole[LANES] = {};
  for (int64_t i = 0; i < count && i < LANES; ++i) whole[i] = p[i * stride];
  return load(whole);
}

template <class T>
TLALIGN_INLINE void store_first(T* p, Vector v, int64_t count) {
  if (count >= LANES) return store(p, v);
  T whole[LANES];
  store(whole, v);
  copy_first(p, whole, count);
}

template <class T>
TLALIGN_INLINE void store_strided(T* p, Vector v, int64_t stride, int64_t count) {
  if (stride == 1) return store_first(p, v, count);
  T whole[LANES];
  store(whole, v);
  for (int64_t i = 0; i < count && i < LANES; ++i) p[i * stride] = whole[i];
}

// Pairs of bfloat16: two numbers to a lane, the first of them in the low half.

// sum + a.first * b.first + a.second * b.second. The instruction takes denormal numbers as 0.
TLALIGN_INLINE Vector add_products(Vector sum, UintVector a, UintVector b) {
#if defined(__AVX512BF16__)
  return bits<Vector>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(a), bits<__m512bh>(b)));
#else
  sum += bits<Vector>(a & 0xffff0000) * bits<Vector>(b & 0xffff0000);
  return sum + bits<Vector>(a << 16) * bits<Vector>(b << 16);
#endif
}

TLALIGN_INLINE UintVector pair(Vector first, Vector second) {
#if defined(__AVX512BF16__)
  const __m512i words = bits<__m512i>(_mm512_cvtne2ps_pbh(bits<__m512>(second), bits<__m512>(first)));
  const UintVector lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return bits<UintVector>(_mm512_permutexvar_epi16(bits<__m512i>(lane | (lane + 16) << 16), words));
#else
  return round_to_bfloat16(first) | round_to_bfloat16(second) << 16;
#endif
}

// Transposes LANES rows of LANES: each step swaps one bit of the row's number with the same bit of the lane's.

template <int BIT, int... LANE>
struct Butterfly {
#if defined(__clang__)
  TLALIGN_INLINE Vector low(Vector a, Vector b) {
    return __builtin_shufflevector(a, b, (LANE & BIT ? LANES + LANE - BIT : LANE)...);
  }
  TLALIGN_INLINE Vector high(Vector a, Vector b) {
    return __builtin_shufflevector(a, b, (LANE & BIT ? LANES + LANE : LANE + BIT)...);
  }
#else
  TLALIGN_INLINE Vector low(Vector a, Vector b) {
    return __builtin_shuffle(a, b, IntVector{(LANE & BIT ? LANES + LANE - BIT : LANE)...});
  }
  TLALIGN_INLINE Vector high(Vector a, Vector b) {
    return __builtin_shuffle(a, b, IntVector{(LANE & BIT ? LANES + LANE : LANE + BIT)...});
  }
#endif
};

#if TLALIGN_LANES == 16
#define TLALIGN_LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#elif TLALIGN_LANES == 8
#define TLALIGN_LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7
#else
#define TLALIGN_LANE_NUMBERS 0, 1, 2, 3
#endif

constexpr IntVector LANE_NUMBERS = {TLALIGN_LANE_NUMBERS};
template <int BIT>
using ButterflyOf = Butterfly<BIT, TLALIGN_LANE_NUMBERS>;

template <int BIT = 1>
TLALIGN_INLINE void transpose(Vector (&rows)[LANES]) {
  if constexpr (BIT < LANES) {
    for (int i = 0; i < LANES; ++i) {
      if (i & BIT) continue;
      const Vector low = ButterflyOf<BIT>::low(rows[i], rows[i + BIT]);
      rows[i + BIT] = ButterflyOf<BIT>::high(rows[i], rows[i + BIT]);
      rows[i] = low;
    }
    transpose<2 * BIT>(rows);
  }
}

TLALIGN_INLINE Vector plus(Vector x, Vector y) { return x + y; }

// All lanes of one vector combined, by `plus` or `maximum`, which then each lane holds.
template <int BIT = 1, class Combine>
TLALIGN_INLINE Vector fold(Vector v, Combine combine) {
  if constexpr (BIT < LANES)
    return fold<2 * BIT>(combine(ButterflyOf<BIT>::low(v, v), ButterflyOf<BIT>::high(v, v)), combine);
  return v;
}

// The sum of each row, one to a lane; leaves nothing of use in the rows.
template <int BIT = 1>
TLALIGN_INLINE Vector sum_rows(Vector (&rows)[LANES]) {
  if constexpr (BIT < LANES) {
    for (int i = 0; i < LANES; i += 2 * BIT)
      rows[i] = ButterflyOf<BIT>::low(rows[i], rows[i + BIT]) + ButterflyOf<BIT>::high(rows[i], rows[i + BIT]);
    return sum_rows<2 * BIT>(rows);
  }
  return rows[0];
}

}  // namespace
