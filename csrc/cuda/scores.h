// Scores of 16 queries and 16 keys as a warp holds them: the products they come from and go to, and what is added.
#pragma once

#include <cstdint>

#include "cuda/attention.h"
#include "cuda/tiles.h"
#include "cuda/windows.h"

namespace tlalign::cuda {

// What scores begin with: nothing, a bias, to which a mask is added, or that of windows, which may have regions.
enum class Kind { plain, offsets, windows };

// Where a thread's part of 16 rows in shared memory begins: rows as the left factor of a product or, transposed while
// they are loaded, as the right one (the sum runs over rows) ...
template <class T, int D>
__device__ void find_rows(uint32_t (&from)[D / 16], uint32_t rows, int lane) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) from[i] = rows + SharedRows<T, D>::at(lane % 16, 2 * i + lane / 16);
}
// ... and as the right one of scores (the sum runs over columns).
template <class T, int D>
__device__ void find_rows_of_scores(uint32_t (&from)[D / 16], uint32_t rows, int lane) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    from[i] = rows + SharedRows<T, D>::at(lane % 8 + lane / 16 * 8, 2 * i + lane / 8 % 2);
  }
}

// Of 16 M x 16 scores M x 2 blocks of 16 x 8, each as in `multiply_add`.
template <int M>
using Scores = float[M][2][4];

// scores += left (16 M x D) times 16 rows, transposed. The rows lie `offset` bytes behind `from`.
template <class T, int D, int M>
__device__ void add_scores(Scores<M>& scores, const Fragment (&left)[M][D / 16], const uint32_t (&from)[D / 16],
                           uint32_t offset) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    const Fragment right = load_matrices(from[i] + offset);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      multiply_add<T>(scores[m][0], left[m][i], right.x, right.y);
      multiply_add<T>(scores[m][1], left[m][i], right.z, right.w);
    }
  }
}
// The same, but scores begin with `start` of rows lane / 4 and lane / 4 + 8 of 16.
template <class T, int D, int M>
__device__ void multiply_scores(Scores<M>& scores, const Fragment (&left)[M][D / 16], const uint32_t (&from)[D / 16],
                                uint32_t offset, const float (&start)[M][2] = {}) {
#pragma unroll
  for (int i = 0; i < M * 8; ++i) scores[i / 8][i / 4 % 2][i % 4] = start[i / 8][i / 2 % 2];
  add_scores<T, D>(scores, left, from, offset);
}

// Scores as the left factor of a product.
template <class T>
__device__ Fragment pack_scores(const float (&scores)[2][4]) {
  const float (&low)[4] = scores[0], (&high)[4] = scores[1];
  return {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]), pack<T>(high[2], high[3])};
}

// sum (16 M x D) += left (16 M x 16) times 16 rows.
template <class T, int D, int M>
__device__ void add_product(float (&sum)[M][D / 8][4], const Fragment (&left)[M], const uint32_t (&from)[D / 16],
                            uint32_t offset) {
#pragma unroll
  for (int n = 0; n < D / 16; ++n) {
    const Fragment right = load_matrices_transposed(from[n] + offset);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      multiply_add<T>(sum[m][2 * n], left[m], right.x, right.y);
      multiply_add<T>(sum[m][2 * n + 1], left[m], right.z, right.w);
    }
  }
}
template <class T, int D, int M>
__device__ void add_product(float (&sum)[M][D / 8][4], const Scores<M>& left, const uint32_t (&from)[D / 16],
                            uint32_t offset) {
  Fragment packed[M];
#pragma unroll
  for (int m = 0; m < M; ++m) packed[m] = pack_scores<T>(left[m]);
  add_product<T, D>(sum, packed, from, offset);
}

// Where the starts of a head are, of 16 queries from `query` on and of keys from `key` on, both multiples of 16: those
// of 16 more keys lie 256 numbers further on.
template <Kind KIND>
__device__ const float* find_starts(const Starts& starts, unsigned image, unsigned head, int query, int key) {
  // Those of windows are the same for all images, and numbered by 32 bits.
  if (KIND == Kind::windows) {
    return starts.data + (head * unsigned(starts.head) + (unsigned(query) / 16 * unsigned(starts.row) + key * 16));
  }
  return starts.data + (image * starts.image + head * starts.head + query / 16 * starts.row + int64_t(key) * 16);
}
// Those of 16 queries and 8 keys. Four numbers of a thread lie side by side, as registers hold them, and those of the
// threads after each other.
__device__ inline void read_starts(float (&scores)[4], const float* from, int lane) {
  const float4 words = __ldg(reinterpret_cast<const float4*>(from) + lane);
  scores[0] = words.x, scores[1] = words.y, scores[2] = words.z, scores[3] = words.w;
}
// Those of 16 M queries and 16 keys; of 16 more queries they lie `row` numbers further on.
template <int M>
__device__ void read_starts(Scores<M>& scores, const float* from, int64_t row, int lane) {
#pragma unroll
  for (int i = 0; i < 2 * M; ++i) {
    read_starts(scores[i / 2][i % 2], from + (i / 2 * row + i % 2 * 128), lane);
  }
}
// Those of 16 M keys as rows and 16 queries as columns.
template <int M>
__device__ void read_starts_of_keys(Scores<M>& scores, const float* from, int lane) {
  const float* own = from + ((lane % 4 * 8 + lane / 8) * 4 + lane / 4 % 2);
#pragma unroll
  for (int i = 0; i < 8 * M; ++i) {
    scores[i / 8][i / 4 % 2][i % 4] = __ldg(own + (i / 8 * 256 + i / 2 % 2 * 128 + i % 2 * 16 + i / 4 % 2 * 2));
  }
}

// What divides regions, in a window that has them: added to scores of 8 columns, which begin at `column` of 32.
__device__ inline void add_regions(float (&scores)[4], const Windows& map, const Regions& regions, int column) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (regions.differs(i, column)) scores[i] += map.region_start;
  }
}
// The same for rows from `row` and columns from `column` on.
template <int M>
__device__ void add_regions(Scores<M>& scores, const Windows& map, const Window& window, int row, int column,
                            int lane) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const Regions regions(window, row + 16 * m, column, lane);
    add_regions(scores[m][0], map, regions, 0);
    add_regions(scores[m][1], map, regions, 8);
  }
}

// What scores of 16 M rows from `row` on and 16 columns from `column` on begin with. Rows are queries, or keys.
template <Kind KIND, bool OF_KEYS, int M>
__device__ void begin_scores(Scores<M>& scores, const Starts& starts, unsigned image, unsigned head, int row,
                             int column, int lane) {
  if constexpr (OF_KEYS) {
    read_starts_of_keys(scores, find_starts<KIND>(starts, image, head, column, row), lane);
  } else {
    read_starts(scores, find_starts<KIND>(starts, image, head, row, column), starts.row, lane);
  }
}
// What is added to them when they have the products.
template <Kind KIND, bool OF_KEYS, int M>
__device__ void finish_scores(Scores<M>& scores, const Problem& p, unsigned image, unsigned head, int row, int column,
                              int lane) {
  if constexpr (KIND == Kind::windows) {
    const Window window(p.windows, image);
    if (window.has_regions()) add_regions(scores, p.windows, window, row, column, lane);
  } else if (p.mask_starts.data != nullptr) {
    Scores<M> mask;
    begin_scores<KIND, OF_KEYS>(mask, p.mask_starts, image, head, row, column, lane);
#pragma unroll
    for (int i = 0; i < 8 * M; ++i) scores[i / 8][i / 4 % 2][i % 4] += mask[i / 8][i / 4 % 2][i % 4];
  }
}

// For the sign of the scale.
template <int M, int N>
__device__ void flip(Fragment (&fragments)[M][N], uint32_t bits) {
#pragma unroll
  for (int i = 0; i < M * N; ++i) {
    Fragment& f = fragments[i / N][i % N];
    f = {f.x ^ bits, f.y ^ bits, f.z ^ bits, f.w ^ bits};
  }
}

// Where a thread's part of a sum (16 x D) goes in 16 rows of shared memory; that of row lane / 4 + 8 lies 8 rows on.
template <class T, int D>
__device__ void find_sums(uint32_t (&at)[D / 8], uint32_t rows, int lane) {
#pragma unroll
  for (int n = 0; n < D / 8; ++n) at[n] = rows + SharedRows<T, D>::at(lane / 4, n) + lane % 4 * 4;
}

// Stores a sum (16 M x D) times the factors of rows lane / 4 and lane / 4 + 8 of each 16 in rows of shared memory that
// only this warp uses, so that a thread can write 16 bytes from there. They lie `offset` bytes behind those of `at`.
template <class T, int D, int M>
__device__ void store_rows(const float (&sum)[M][D / 8][4], const float (&factor)[M][2], const uint32_t (&at)[D / 8],
                           uint32_t offset) {
  using Tile = SharedRows<T, D>;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = pack<T>(sum[m][n][2 * i] * factor[m][i], sum[m][n][2 * i + 1] * factor[m][i]);
        store_shared(at[n] + (offset + Tile::bytes(16 * m + 8 * i)), word);
      }
    }
  }
  __syncwarp();
}

}  // namespace tlalign::cuda
