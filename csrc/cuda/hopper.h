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

// sum (64 x 8 N) = or, if it ADDS, += left (64 x 16) right^T (8 N x 16), of which a warp has 16 rows as in
// `multiply_add`. For the N that are listed below, here and after.
template <class T, bool ADDS, int N>
__device__ void multiply_rows(float (&sum)[N][4], uint64_t left, uint64_t right);
// sum (64 x 8 N) = or += left (64 x 16) right (16 x 8 N): a warp has 16 rows of sum and left.
template <class T, bool ADDS, int N>
__device__ void multiply_columns(float (&sum)[N][4], const Fragment& left, uint64_t right);
// The same with left^T (16 x 64) in shared memory, too.
template <class T, bool ADDS, int N>
__device__ void multiply_columns(float (&sum)[N][4], uint64_t left, uint64_t right);
// sum (64 x 8 N) = or += left^T (16 x 64) times right^T (8 N x 16).
template <class T, bool ADDS, int N>
__device__ void multiply_transposed(float (&sum)[N][4], uint64_t left, uint64_t right);

// So many numbers of a sum, and what they are called.
#define TLALIGN_SUM_4(is, i) is(sum[i][0]), is(sum[i][1]), is(sum[i][2]), is(sum[i][3])
#define TLALIGN_SUM_8(is, i) TLALIGN_SUM_4(is, i), TLALIGN_SUM_4(is, i + 1)
#define TLALIGN_SUM_16(is, i) TLALIGN_SUM_8(is, i), TLALIGN_SUM_8(is, i + 2)
#define TLALIGN_SUM_32(is, i) TLALIGN_SUM_16(is, i), TLALIGN_SUM_16(is, i + 4)
#define TLALIGN_SUM_36(is, i) TLALIGN_SUM_32(is, i), TLALIGN_SUM_4(is, i + 8)
#define TLALIGN_SUM_40(is, i) TLALIGN_SUM_32(is, i), TLALIGN_SUM_8(is, i + 8)
#define TLALIGN_SUM_64(is, i) TLALIGN_SUM_32(is, i), TLALIGN_SUM_32(is, i + 8)
#define TLALIGN_SUM_100(is, i) TLALIGN_SUM_64(is, i), TLALIGN_SUM_36(is, i + 16)
#define TLALIGN_NAMES_4 "%0, %1, %2, %3"
#define TLALIGN_NAMES_8 TLALIGN_NAMES_4 ", %4, %5, %6, %7"
#define TLALIGN_NAMES_16 TLALIGN_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TLALIGN_NAMES_32 \
  TLALIGN_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TLALIGN_NAMES_36 TLALIGN_NAMES_32 ", %32, %33, %34, %35"
#define TLALIGN_NAMES_40 TLALIGN_NAMES_36 ", %36, %37, %38, %39"
#define TLALIGN_NAMES_64                                           \
  TLALIGN_NAMES_40                                                 \
  ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TLALIGN_NAMES_100                                                                        \
  TLALIGN_NAMES_64                                                                               \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99"

// The left factor, in registers or in shared memory.
#define TLALIGN_FRAGMENT "r"(left.x), "r"(left.y), "r"(left.z), "r"(left.w)
#define TLALIGN_SHARED "l"(left)

// `columns`, and `count` numbers of the sum in each thread. Behind these come the factors, and whether it adds; then
// which factors are transposed.
#define TLALIGN_PRODUCT(function, Left, input, columns, count, factors, flag, transposed, type, name, adds, is)   \
  template <>                                                                                                     \
  __device__ inline void function<type, adds>(float (&sum)[columns / 8][4], Left left, uint64_t right) {          \
    asm volatile("{ .reg .pred adds; setp.ne.b32 adds, " flag                                                     \
                 ", 0; "                                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name " {" TLALIGN_NAMES_##count \
                 "}, " factors ", adds, 1, 1, " transposed "; }"                                                  \
                 : TLALIGN_SUM_##count(is, 0)                                                                     \
                 : input, "l"(right), "r"(int(adds)));                                                            \
  }
#define TLALIGN_ROWS(columns, count, factors, flag, ...) \
  TLALIGN_PRODUCT(multiply_rows, uint64_t, TLALIGN_SHARED, columns, count, factors, flag, "0, 0", __VA_ARGS__)
#define TLALIGN_PRODUCTS(...)                                                                                      \
  TLALIGN_ROWS(200, 100, "%100, %101", "%102", __VA_ARGS__)                                                        \
  TLALIGN_ROWS(128, 64, "%64, %65", "%66", __VA_ARGS__)                                                            \
  TLALIGN_ROWS(80, 40, "%40, %41", "%42", __VA_ARGS__)                                                             \
  TLALIGN_ROWS(32, 16, "%16, %17", "%18", __VA_ARGS__)                                                             \
  TLALIGN_ROWS(16, 8, "%8, %9", "%10", __VA_ARGS__)                                                                \
  TLALIGN_ROWS(8, 4, "%4, %5", "%6", __VA_ARGS__)                                                                  \
  TLALIGN_PRODUCT(multiply_columns, uint64_t, TLALIGN_SHARED, 64, 32, "%32, %33", "%34", "1, 1", __VA_ARGS__)      \
  TLALIGN_PRODUCT(multiply_transposed, uint64_t, TLALIGN_SHARED, 8, 4, "%4, %5", "%6", "1, 0", __VA_ARGS__)        \
  TLALIGN_PRODUCT(multiply_columns, const Fragment&, TLALIGN_FRAGMENT, 64, 32, "{%32, %33, %34, %35}, %36", "%37", \
                  "1", __VA_ARGS__)                                                                                \
  TLALIGN_PRODUCT(multiply_columns, const Fragment&, TLALIGN_FRAGMENT, 72, 36, "{%36, %37, %38, %39}, %40", "%41", \
                  "1", __VA_ARGS__)
TLALIGN_PRODUCTS(__nv_bfloat16, "bf16", false, "=f")
TLALIGN_PRODUCTS(__nv_bfloat16, "bf16", true, "+f")
TLALIGN_PRODUCTS(__half, "f16", false, "=f")
TLALIGN_PRODUCTS(__half, "f16", true, "+f")

}  // namespace tlalign::cuda::hopper
