// What the kernels are made of: rows in shared memory, copies, fragments of matrices and their products (PTX ISA, "Warp
// Level Matrix Instructions").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tlalign::cuda {

// Registers of one 16 x 16 matrix of 16-bit numbers, as a warp holds it.
using Fragment = uint4;

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float(float x) {
  return __float2half_rn(x);
}
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// Two numbers in a word, the first one lowest.
__device__ inline uint32_t pack_pair(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ inline uint32_t pack_pair(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <class T>
__device__ uint32_t pack(float low, float high) {
  return pack_pair(T(), low, high);
}

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline void store_shared(uint32_t to, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}
__device__ inline void store_shared(uint32_t to, uint4 words) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}
__device__ inline uint4 load_shared(uint32_t from) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(from)
               : "memory");
  return words;
}

// Not by an assignment, which the compiler splits into words.
__device__ inline void store_global(void* to, uint4 words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

// 16 bytes from global to shared memory, or zeros.
__device__ inline void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last PENDING groups of this thread's copies have landed.
template <int PENDING>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices; thread 8 i + j gives the address of row j of matrix i.
__device__ inline Fragment load_matrices(uint32_t from) {
  Fragment f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.x), "=r"(f.y), "=r"(f.z), "=r"(f.w)
               : "r"(from)
               : "memory");
  return f;
}
__device__ inline Fragment load_matrices_transposed(uint32_t from) {
  Fragment f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.x), "=r"(f.y), "=r"(f.z), "=r"(f.w)
               : "r"(from)
               : "memory");
  return f;
}

// sum (16 x 8) += left (16 x 16) right (16 x 8), whose upper and lower halves are `upper` and `lower`. A thread has the
// columns 2 (lane % 4) and the next of rows lane / 4 (sum[0], sum[1]) and lane / 4 + 8 (sum[2], sum[3]).
template <class T>
__device__ void multiply_add(float (&sum)[4], const Fragment& left, uint32_t upper, uint32_t lower);
#define TLALIGN_MULTIPLY_ADD(type, name)                                                                             \
  template <>                                                                                                        \
  __device__ inline void multiply_add<type>(float (&sum)[4], const Fragment& left, uint32_t upper, uint32_t lower) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                                       \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                       \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                     \
        : "r"(left.x), "r"(left.y), "r"(left.z), "r"(left.w), "r"(upper), "r"(lower));                               \
  }
TLALIGN_MULTIPLY_ADD(__nv_bfloat16, "bf16")
TLALIGN_MULTIPLY_ADD(__half, "f16")
#undef TLALIGN_MULTIPLY_ADD

// sum = left right. That it starts at zero is known here, so that no register has to be.
template <class T>
__device__ void multiply(float (&sum)[4], const Fragment& left, uint32_t upper, uint32_t lower) {
  sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
  multiply_add<T>(sum, left, upper, lower);
}

// Rows of D numbers in shared memory, in chunks of 16 bytes. Where D is a power of two, chunks of a row change places,
// else a row is padded to an odd number of them, so that the same chunk of 8 rows lies in 32 different banks.
template <class T, int D>
struct SharedRows {
  static constexpr int CHUNKS = D / 8;
  static constexpr bool SWIZZLES = (D & (D - 1)) == 0;
  static constexpr int PITCH = 16 * (SWIZZLES ? CHUNKS : CHUNKS | 1);  // bytes
  // Rows that fill the 128 bytes of all banks once.
  static constexpr int ROWS_OF_LINE = CHUNKS < 8 ? 8 / CHUNKS : 1;

  static constexpr __host__ __device__ int bytes(int rows) { return rows * PITCH; }

  // Chunks change places with a period of 8 rows: 8 k rows further on the same chunk lies 8 k pitches further on.
  static __device__ uint32_t at(int row, int chunk) {
    if (SWIZZLES) chunk ^= row / ROWS_OF_LINE & (CHUNKS < 8 ? CHUNKS - 1 : 7);
    return row * PITCH + chunk * 16;
  }

  // ROWS rows from `first` on. From row `end` on zeros or, if it REPEATS, the last one. Every thread of the block takes
  // part.
  template <int ROWS, int THREADS, bool REPEATS>
  static __device__ void load(uint32_t to, const T* data, int stride, int first, int end) {
    // Where a row takes a whole number of times 8 threads, a thread has the same chunk of each of its rows.
    constexpr bool IS_REGULAR = THREADS % CHUNKS == 0 && THREADS / CHUNKS % 8 == 0;
    constexpr int STEP = THREADS / CHUNKS;
    const int own_row = threadIdx.x / CHUNKS, own_chunk = threadIdx.x % CHUNKS;
    const uint32_t own = to + at(own_row, own_chunk);
    const uint32_t row_bytes = stride * sizeof(T);
    const char* own_column = reinterpret_cast<const char*>(data + 8 * own_chunk);
#pragma unroll
    for (int i = 0; i < (ROWS * CHUNKS + THREADS - 1) / THREADS; ++i) {
      const int number = i * THREADS + threadIdx.x;
      const int row = IS_REGULAR ? own_row + i * STEP : number / CHUNKS;
      const int chunk = IS_REGULAR ? own_chunk : number % CHUNKS;
      if (ROWS * CHUNKS % THREADS != 0 && row >= ROWS) break;
      const char* column = IS_REGULAR ? own_column : reinterpret_cast<const char*>(data + 8 * chunk);
      const char* from = column + uint64_t(uint32_t(min(first + row, end - 1))) * row_bytes;
      copy_async(IS_REGULAR ? own + i * STEP * PITCH : to + at(row, chunk), from, REPEATS || first + row < end);
    }
  }
};

}  // namespace tlalign::cuda
