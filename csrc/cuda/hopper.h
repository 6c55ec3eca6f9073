// Products of a warpgroup, four warps, on the tensor cores of Hopper: its right factor, and the left one of scores,
// stay in shared memory (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"; only of sm_90a).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/tiles.h"

namespace tlalign::cuda::hopper {

// Rows of 128 bytes as SharedRows has them, which is the swizzle of 128 bytes: where they begin, over 16, and 1024
// bytes from 8 rows to the next 8. They begin at a multiple of 1024 bytes. Of a right factor whose rows are longer the
// next 128 bytes of them lie `beside` bytes further on.
__device__ inline uint64_t descriptor(uint32_t rows, uint32_t beside = 16) {
  return uint64_t(1) << 62 | uint64_t(1024 / 16) << 32 | uint64_t(beside / 16) << 16 | rows >> 4;
}

// What threads stored or copied into shared memory before can be read by products, once a barrier was passed.
__device__ inline void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Registers of products that are begun now were written before.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// The compiler is not to read the sums before.
template <int N>
__device__ void hold(float (&sums)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4])::"memory");
}
// Until all of them are done, but the last PENDING that were committed.
template <int PENDING = 0, class... Sums>
__device__ void wait_for_products(Sums&... sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  (hold(sums), ...);
}

// Barrier `number` of a block, at which so many threads are to arrive, in whole warps.
__device__ inline void wait_at(unsigned number, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ inline void arrive_at(unsigned number, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
// Of each thread of a warpgroup.
template <int N>
__device__ void take_fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ void take_more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Word i of thread k of four becomes word k of thread i.
__device__ inline void transpose(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool is_upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      uint32_t &low = words[i], &high = words[i + step];
      const uint32_t other = __shfl_xor_sync(0xffffffffu, is_upper ? low : high, step);
      low = is_upper ? other : low;
      high = is_upper ? high : other;
    }
  }
}

// Stores row lane / 4 + 8 * i of the 16 that a warp has of a sum of 64 columns, times a factor, if it `is_there`. Of
// each 128 bytes a thread has two parts of 16, which four threads exchange for.
template <class T>
__device__ void store_row(char* to, const float (&sum)[8][4], int i, float factor, bool is_there, int lane) {
  to += lane % 4 * 16;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    uint32_t words[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float (&own)[4] = sum[4 * j + n];
      words[n] = pack<T>(own[2 * i] * factor, own[2 * i + 1] * factor);
    }
    transpose(words, lane);
    if (is_there) store_global(to + 64 * j, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// sum (64 x 200, or += if it ADDS) = left (64 x 16) right^T (200 x 16), of which a warp has 16 rows as in
// `multiply_add`.
template <class T, bool ADDS>
__device__ void multiply_rows(float (&sum)[25][4], uint64_t left, uint64_t right);
// The same for 128, 80, 32, 16 or 8 columns.
template <class T, bool ADDS>
__device__ void multiply_rows(float (&sum)[16][4], uint64_t left, uint64_t right);
template <class T, bool ADDS>
__device__ void multiply_rows(float (&sum)[10][4], uint64_t left, uint64_t right);
template <class T, bool ADDS>
__device__ void multiply_rows(float (&sum)[4][4], uint64_t left, uint64_t right);
template <class T, bool ADDS>
__device__ void multiply_rows(float (&sum)[2][4], uint64_t left, uint64_t right);
template <class T, bool ADDS>
__device__ void multiply_rows(float (&sum)[1][4], uint64_t left, uint64_t right);
// sum (64 x 64) = or += left (64 x 16) right (16 x 64): a warp has 16 rows of sum and left.
template <class T, bool ADDS>
__device__ void multiply_columns(float (&sum)[8][4], const Fragment& left, uint64_t right);
// The same for 72 columns.
template <class T, bool ADDS>
__device__ void multiply_columns(float (&sum)[9][4], const Fragment& left, uint64_t right);
// The same with left^T (16 x 64) in shared memory, too.
template <class T, bool ADDS>
__device__ void multiply_columns(float (&sum)[8][4], uint64_t left, uint64_t right);
// sum (64 x 8) = or += left^T (16 x 64) times right^T (8 x 16).
template <class T, bool ADDS>
__device__ void multiply_transposed(float (&sum)[1][4], uint64_t left, uint64_t right);

#define TLALIGN_4(is, sum, i) is(sum[i][0]), is(sum[i][1]), is(sum[i][2]), is(sum[i][3])
#define TLALIGN_8(is, sum, i) TLALIGN_4(is, sum, i), TLALIGN_4(is, sum, i + 1)
#define TLALIGN_32(is, sum, i) \
  TLALIGN_8(is, sum, i), TLALIGN_8(is, sum, i + 2), TLALIGN_8(is, sum, i + 4), TLALIGN_8(is, sum, i + 6)
#define TLALIGN_100(is, sum) \
  TLALIGN_32(is, sum, 0), TLALIGN_32(is, sum, 8), TLALIGN_32(is, sum, 16), TLALIGN_4(is, sum, 24)

#define TLALIGN_PRODUCTS(type, name, adds, is)                                                                    \
  template <>                                                                                                     \
  __device__ inline void multiply_rows<type, adds>(float (&sum)[25][4], uint64_t left, uint64_t right) {          \
    asm volatile(                                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %102, 0; "                                                          \
        "wgmma.mma_async.sync.aligned.m64n200k16.f32." name "." name                                              \
        " {"                                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                        \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                        \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                        \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                        \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                        \
        "%96, %97, %98, %99"                                                                                      \
        "}, %100, %101, adds, 1, 1, 0, 0; }"                                                                      \
        : TLALIGN_100(is, sum)                                                                                    \
        : "l"(left), "l"(right), "r"(int(adds)));                                                                 \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ inline void multiply_rows<type, adds>(float (&sum)[16][4], uint64_t left, uint64_t right) {          \
    asm volatile(                                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %66, 0; "                                                           \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name                                              \
        " {"                                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                        \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                        \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                          \
        "}, %64, %65, adds, 1, 1, 0, 0; }"                                                                        \
        : TLALIGN_32(is, sum, 0), TLALIGN_32(is, sum, 8)                                                          \
        : "l"(left), "l"(right), "r"(int(adds)));                                                                 \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ inline void multiply_rows<type, adds>(float (&sum)[10][4], uint64_t left, uint64_t right) {          \
    asm volatile(                                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %42, 0; "                                                           \
        "wgmma.mma_async.sync.aligned.m64n80k16.f32." name "." name                                               \
        " {"                                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                        \
        "%32, %33, %34, %35, %36, %37, %38, %39"                                                                  \
        "}, %40, %41, adds, 1, 1, 0, 0; }"                                                                        \
        : TLALIGN_32(is, sum, 0), TLALIGN_8(is, sum, 8)                                                           \
        : "l"(left), "l"(right), "r"(int(adds)));                                                                 \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ inline void multiply_rows<type, adds>(float (&sum)[4][4], uint64_t left, uint64_t right) {           \
    asm volatile(                                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %18, 0; "                                                           \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." name "." name                                               \
        " {"                                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                                    \
        "}, %16, %17, adds, 1, 1, 0, 0; }"                                                                        \
        : TLALIGN_8(is, sum, 0), TLALIGN_8(is, sum, 2)                                                            \
        : "l"(left), "l"(right), "r"(int(adds)));                                                                 \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ inline void multiply_rows<type, adds>(float (&sum)[2][4], uint64_t left, uint64_t right) {           \
    asm volatile(                                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %10, 0; "                                                           \
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." name "." name                                               \
        " {"                                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, adds, 1, 1, 0, 0; }"                                            \
        : TLALIGN_8(is, sum, 0)                                                                                   \
        : "l"(left), "l"(right), "r"(int(adds)));                                                                 \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ inline void multiply_rows<type, adds>(float (&sum)[1][4], uint64_t left, uint64_t right) {           \
    asm volatile(                                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %6, 0; "                                                            \
        "wgmma.mma_async.sync.aligned.m64n8k16.f32." name "." name                                                \
        " {"                                                                                                      \
        "%0, %1, %2, %3}, %4, %5, adds, 1, 1, 0, 0; }"                                                            \
        : TLALIGN_4(is, sum, 0)                                                                                   \
        : "l"(left), "l"(right), "r"(int(adds)));                                                                 \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ inline void multiply_columns<type, adds>(float (&sum)[8][4], uint64_t left, uint64_t right) {        \
    asm volatile(                                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %34, 0; "                                                           \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name                                               \
        " {"                                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                          \
        "}, %32, %33, adds, 1, 1, 1, 1; }"                                                                        \
        : TLALIGN_32(is, sum, 0)                                                                                  \
        : "l"(left), "l"(right), "r"(int(adds)));                                                                 \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ inline void multiply_transposed<type, adds>(float (&sum)[1][4], uint64_t left, uint64_t right) {     \
    asm volatile(                                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %6, 0; "                                                            \
        "wgmma.mma_async.sync.aligned.m64n8k16.f32." name "." name                                                \
        " {"                                                                                                      \
        "%0, %1, %2, %3}, %4, %5, adds, 1, 1, 1, 0; }"                                                            \
        : TLALIGN_4(is, sum, 0)                                                                                   \
        : "l"(left), "l"(right), "r"(int(adds)));                                                                 \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ inline void multiply_columns<type, adds>(float (&sum)[8][4], const Fragment& left, uint64_t right) { \
    asm volatile(                                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %37, 0; "                                                           \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name                                               \
        " {"                                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                          \
        "}, {%32, %33, %34, %35}, %36, adds, 1, 1, 1; }"                                                          \
        : TLALIGN_32(is, sum, 0)                                                                                  \
        : "r"(left.x), "r"(left.y), "r"(left.z), "r"(left.w), "l"(right), "r"(int(adds)));                        \
  }                                                                                                               \
  template <>                                                                                                     \
  __device__ inline void multiply_columns<type, adds>(float (&sum)[9][4], const Fragment& left, uint64_t right) { \
    asm volatile(                                                                                                 \
        "{ .reg .pred adds; setp.ne.b32 adds, %41, 0; "                                                           \
        "wgmma.mma_async.sync.aligned.m64n72k16.f32." name "." name                                               \
        " {"                                                                                                      \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                  \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                        \
        "%32, %33, %34, %35"                                                                                      \
        "}, {%36, %37, %38, %39}, %40, adds, 1, 1, 1; }"                                                          \
        : TLALIGN_32(is, sum, 0), TLALIGN_4(is, sum, 8)                                                           \
        : "r"(left.x), "r"(left.y), "r"(left.z), "r"(left.w), "l"(right), "r"(int(adds)));                        \
  }
TLALIGN_PRODUCTS(__nv_bfloat16, "bf16", false, "=f")
TLALIGN_PRODUCTS(__nv_bfloat16, "bf16", true, "+f")
TLALIGN_PRODUCTS(__half, "f16", false, "=f")
TLALIGN_PRODUCTS(__half, "f16", true, "+f")
#undef TLALIGN_PRODUCTS
#undef TLALIGN_100
#undef TLALIGN_32
#undef TLALIGN_8
#undef TLALIGN_4

}  // namespace tlalign::cuda::hopper
