// The forward: A.V and mean_h(A).share in one pass, on tensor cores of Ampere and newer (mma.sync).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "cuda/attention.h"
#include "cuda/tiles.h"

namespace tlalign::cuda {
namespace {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int QUERIES_OF_WARP = 16, QUERIES_OF_BLOCK = QUERIES_OF_WARP * WARPS;

// share = hi + mid + lo: rows of parts, zeros from key Nk on.
template <class T>
__global__ void pack_labels(Forward p) {
  const int row = padded(p.keys);
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= p.batch * row) return;
  const int64_t image = at / row;
  const int key = int(at % row);
  T* parts = static_cast<T*>(p.parts) + image * p.sources * PARTS * row + key;
  for (int source = 0; source < p.sources; ++source) {
    float rest = key < p.keys ? p.share[(image * p.keys + key) * p.sources + source] : 0.0f;
    for (int part = 0; part < PARTS; ++part) {
      const T rounded = from_float<T>(rest);
      parts[(source * PARTS + part) * row] = rounded;
      rest -= to_float(rounded);
    }
  }
}

// The mean over the heads in which a query sees a key, in fixed order, averaged with the residual.
__global__ void average_heads(Forward p) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= p.batch * p.queries) return;
  const int64_t image = at / p.queries;
  const int query = int(at % p.queries);
  int seeing = 0;
  for (int head = 0; head < p.heads; ++head) {
    seeing += p.log_sum_exp[(image * p.heads + head) * p.queries + query] != -INFINITY;
  }
  for (int source = 0; source < p.sources; ++source) {
    float mean = 0.0f;
    for (int head = 0; head < p.heads; ++head) {
      mean += p.head_share[((image * p.heads + head) * p.sources + source) * p.queries + query];
    }
    mean = seeing > 0 ? mean / float(seeing) : 0.0f;
    if (p.residual != nullptr) {
      const float own = p.residual[at * p.sources + source];
      mean = seeing > 0 ? (mean + own) * 0.5f : own;
    }
    p.share_out[at * p.sources + source] = mean;
  }
}

// output = softmax(scale Q K^T + bias + mask) V: a block has 64 queries of a head, a warp 16 of them, and all keys pass
// by in steps of TILES x 16. If one step has them all (STREAMS is false) the softmax is exact in one pass, else online.
// Registers hold Q, the scores of a step, and the sums of P V and P [1, share]; shared memory holds K, V and the labels
// of a step, of two if steps pass by. Reads Q once, K and V once a block; writes O, the log-sum-exp and the shares of
// the head. = reference.forward, but for the mean over heads.
template <class T, int D, int TILES, bool STREAMS, bool OFFSETS, int LABEL_BLOCKS>
struct ForwardKernel {
  using Tile = SharedRows<T, D>;
  static constexpr int KEYS = 16 * TILES;
  static constexpr int STAGES = STREAMS ? 2 : 1;
  // Labels lie in shared memory as rows of a column each: 16-byte chunks of 8 keys, an odd number of them, so that the
  // rows of a block of 8 begin in different banks.
  static constexpr int LABEL_COLUMNS = 8 * LABEL_BLOCKS;
  static constexpr int LABEL_CHUNKS = 2 * ((TILES + 1) / 2 * 2) + 1;
  static_assert(LABEL_CHUNKS <= 32 && LABEL_COLUMNS % WARPS == 0, "a warp has a column in one go");
  static constexpr int LABEL_BYTES = LABEL_COLUMNS * LABEL_CHUNKS * 16;
  static constexpr int STAGE_BYTES = 2 * Tile::bytes(KEYS) + LABEL_BYTES;
  // Blocks that the registers of a multiprocessor are to hold at once.
  static constexpr int BLOCKS = STREAMS || D > 64 ? 2 : TILES > 4 ? 3 : 4;
  static constexpr int SHARED_BYTES = Tile::bytes(QUERIES_OF_BLOCK) + STAGES * STAGE_BYTES;

  struct Stage {
    uint32_t key, value, label;
  };

  const Forward& p;
  const uint32_t shared;
  const int lane = threadIdx.x % 32;
  // The same in all threads of a warp, as the compiler sees now.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  int first;  // query of the block
  int image, head;

  __device__ Stage stage(int number) const {
    const uint32_t at = shared + Tile::bytes(QUERIES_OF_BLOCK) + number % STAGES * STAGE_BYTES;
    return {at, at + Tile::bytes(KEYS), at + 2 * Tile::bytes(KEYS)};
  }

  __device__ const T* start(const Rows& rows) const {
    return reinterpret_cast<const T*>(rows.data) + image * rows.image + head * rows.head;
  }

  // Rows of K from key Nk on repeat the last one, so that the maxima are those of the real keys; V, and the column of
  // ones, are zero there. So no score needs a mask.
  __device__ void load_keys(int step) const {
    Tile::template load<KEYS, THREADS, true>(stage(step).key, start(p.key), int(p.key.row), step * KEYS, p.keys);
  }

  __device__ void load_values_and_labels(int step) const {
    const Stage to = stage(step);
    const int first_key = step * KEYS;
    Tile::template load<KEYS, THREADS, false>(to.value, start(p.value), int(p.value.row), first_key, p.keys);
    // Columns of labels: ones, the parts of the shares, zeros. A warp sees to every fourth column.
    const int row = padded(p.keys), columns = p.sources * PARTS;
    const T* parts = static_cast<const T*>(p.parts) + int64_t(image) * columns * row;
#pragma unroll
    for (int i = 0; i < LABEL_COLUMNS / WARPS; ++i) {
      const int column = warp + i * WARPS, key = first_key + 8 * lane;
      const uint32_t at = to.label + (column * LABEL_CHUNKS + lane) * 16;
      if (lane >= LABEL_CHUNKS) break;
      if (column > 0 && column <= columns && key < row) {
        copy_async(at, parts + (column - 1) * row + key, true);
      } else {
        uint32_t words[4] = {};
        if (column == 0) {
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) {
            const int left = p.keys - key - 2 * pair;
            words[pair] = pack<T>(left > 0 ? 1.0f : 0.0f, left > 1 ? 1.0f : 0.0f);
          }
        }
        store_shared(at, make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }

  __device__ void run() {
    const unsigned blocks = (p.queries + QUERIES_OF_BLOCK - 1) / QUERIES_OF_BLOCK;
    const unsigned pair = blockIdx.x / blocks;
    first = int(blockIdx.x % blocks) * QUERIES_OF_BLOCK;
    head = int(pair % unsigned(p.heads));
    image = int(pair / unsigned(p.heads));
    // A warp without queries helps to load, no more.
    const bool works = first + warp * QUERIES_OF_WARP < p.queries;

    Tile::template load<QUERIES_OF_BLOCK, THREADS, false>(shared, start(p.query), int(p.query.row), first, p.queries);
    load_keys(0);
    commit_copies();
    load_values_and_labels(0);
    commit_copies();

    Fragment query[D / 16];
    float output[D / 8][4], label[LABEL_BLOCKS][4];
    float highest[2] = {-INFINITY, -INFINITY};
    const int steps = STREAMS ? (p.keys + KEYS - 1) / KEYS : 1;
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<1>();
      __syncthreads();
      if (works && step == 0) {
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          query[i] = load_matrices(shared + Tile::at(warp * QUERIES_OF_WARP + lane % 16, 2 * i + lane / 16));
        }
      }
      float scores[2 * TILES][4];
      if (works) multiply_keys(query, scores, step);
      if (STREAMS && step + 1 < steps) load_keys(step + 1);
      commit_copies();
      if (works) exponentiate(scores, highest, output, label, step);
      wait_for_copies<1>();
      __syncthreads();
      if (works) multiply_values(scores, output, label, step);
      if (STREAMS && step + 1 < steps) load_values_and_labels(step + 1);
      commit_copies();
    }
    if (works) write(output, label, highest);
  }

  // Tiles of a step that have keys.
  __device__ int tiles_of(int step) const { return min(TILES, (p.keys - step * KEYS + 15) / 16); }

  __device__ void multiply_keys(const Fragment (&query)[D / 16], float (&scores)[2 * TILES][4], int step) const {
    const int tiles = tiles_of(step);
    uint32_t from[D / 16];
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      from[i] = stage(step).key + Tile::at(lane % 8 + lane / 16 * 8, 2 * i + lane / 8 % 2);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (tile < tiles) {
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          const Fragment key = load_matrices(from[i] + 16 * tile * Tile::PITCH);
          if (i == 0) {
            multiply<T>(scores[2 * tile], query[i], key.x, key.y);
            multiply<T>(scores[2 * tile + 1], query[i], key.z, key.w);
          } else {
            multiply_add<T>(scores[2 * tile], query[i], key.x, key.y);
            multiply_add<T>(scores[2 * tile + 1], query[i], key.z, key.w);
          }
        }
        if (OFFSETS) add_offsets(scores[2 * tile], scores[2 * tile + 1], step * KEYS + 16 * tile);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[2 * tile][i] = scores[2 * tile + 1][i] = -INFINITY;
      }
    }
  }

  // Scores in units of ln 2, with what is added to them.
  __device__ void add_offsets(float (&left)[4], float (&right)[4], int key) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = i < 4 ? left[i] : right[i - 4];
      score *= p.scale * LOG2_E;
      const int query = first + warp * QUERIES_OF_WARP + lane / 4 + i / 2 % 2 * 8;
      const int column = key + i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (query < p.queries && column < p.keys) {
        if (p.bias.data != nullptr) score += offset(p.bias, query, column) * LOG2_E;
        if (p.mask.data != nullptr) score += offset(p.mask, query, column) * LOG2_E;
      } else {
        score = -INFINITY;
      }
    }
  }

  __device__ float offset(const Offsets& o, int query, int key) const {
    const int64_t at = image * o.image + head * o.head + query * o.query + key * o.key;
    switch (o.dtype) {
      case DType::float32:
        return reinterpret_cast<const float*>(o.data)[at];
      case DType::bfloat16:
        return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(o.data)[at]);
      case DType::float16:
        return __half2float(reinterpret_cast<const __half*>(o.data)[at]);
      default:
        return reinterpret_cast<const uint8_t*>(o.data)[at] != 0 ? 0.0f : -INFINITY;
    }
  }

  // Without offsets the factor, if it is positive, waits for the exponential.
  __device__ float unit() const { return OFFSETS ? 1.0f : p.scale * LOG2_E; }

  __device__ void exponentiate(float (&scores)[2 * TILES][4], float (&highest)[2], float (&output)[D / 8][4],
                               float (&label)[LABEL_BLOCKS][4], int step) const {
    float now[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int tile = 0; tile < 2 * TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) now[i / 2] = fmaxf(now[i / 2], scores[tile][i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      now[i] = fmaxf(now[i], __shfl_xor_sync(0xffffffffu, now[i], 1));
      now[i] = fmaxf(now[i], __shfl_xor_sync(0xffffffffu, now[i], 2)) * unit();
      if (STREAMS) now[i] = fmaxf(now[i], highest[i]);
    }
    const float shift[2] = {OFFSETS && now[0] == -INFINITY ? 0.0f : now[0],
                            OFFSETS && now[1] == -INFINITY ? 0.0f : now[1]};
    if (STREAMS && step == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) output[n][i] = 0.0f;
#pragma unroll
        for (int n = 0; n < LABEL_BLOCKS; ++n) label[n][i] = 0.0f;
      }
    } else if (STREAMS) {
      const float kept[2] = {exp2_of(highest[0] - shift[0]), exp2_of(highest[1] - shift[1])};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) output[n][i] *= kept[i / 2];
#pragma unroll
        for (int n = 0; n < LABEL_BLOCKS; ++n) label[n][i] *= kept[i / 2];
      }
    }
#pragma unroll
    for (int tile = 0; tile < 2 * TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[tile][i] = exp2_of(fmaf(scores[tile][i], unit(), -shift[i / 2]));
    }
    highest[0] = now[0], highest[1] = now[1];
  }

  __device__ void multiply_values(const float (&scores)[2 * TILES][4], float (&output)[D / 8][4],
                                  float (&label)[LABEL_BLOCKS][4], int step) const {
    const int tiles = tiles_of(step);
    uint32_t from[D / 16], from_label[LABEL_BLOCKS];
#pragma unroll
    for (int n = 0; n < D / 16; ++n) from[n] = stage(step).value + Tile::at(lane % 16, 2 * n + lane / 16);
#pragma unroll
    for (int n = 0; n < LABEL_BLOCKS; ++n) {
      from_label[n] = stage(step).label + ((8 * n + lane % 8) * LABEL_CHUNKS + lane / 8) * 16;
    }
    Fragment labels[LABEL_BLOCKS];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (tile >= tiles) break;
      const float (&l)[4] = scores[2 * tile], (&r)[4] = scores[2 * tile + 1];
      const Fragment weights = {pack<T>(l[0], l[1]), pack<T>(l[2], l[3]), pack<T>(r[0], r[1]), pack<T>(r[2], r[3])};
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        const Fragment value = load_matrices_transposed(from[n] + 16 * tile * Tile::PITCH);
        if (tile == 0 && !STREAMS) {
          multiply<T>(output[2 * n], weights, value.x, value.y);
          multiply<T>(output[2 * n + 1], weights, value.z, value.w);
        } else {
          multiply_add<T>(output[2 * n], weights, value.x, value.y);
          multiply_add<T>(output[2 * n + 1], weights, value.z, value.w);
        }
      }
#pragma unroll
      for (int n = 0; n < LABEL_BLOCKS; ++n) {
        // One load brings the labels of two tiles.
        if (tile % 2 == 0) labels[n] = load_matrices(from_label[n] + 32 * tile);
        const uint32_t upper = tile % 2 == 0 ? labels[n].x : labels[n].z;
        const uint32_t lower = tile % 2 == 0 ? labels[n].y : labels[n].w;
        if (tile == 0 && !STREAMS) {
          multiply<T>(label[n], weights, upper, lower);
        } else {
          multiply_add<T>(label[n], weights, upper, lower);
        }
      }
    }
  }

  __device__ void write(float (&output)[D / 8][4], float (&label)[LABEL_BLOCKS][4], const float (&highest)[2]) const {
    // Of the four threads that share a row the first has columns 0 and 1, the next 2 and 3, ...
    const int64_t pair = int64_t(image) * p.heads + head;
    const int row = warp * QUERIES_OF_WARP + lane / 4;
    const float total[2] = {__shfl_sync(0xffffffffu, label[0][0], lane & ~3),
                            __shfl_sync(0xffffffffu, label[0][2], lane & ~3)};
    const float inverse[2] = {inverse_of(total[0]), inverse_of(total[1])};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = first + row + 8 * i;
      // log2(0) plus the maximum, -inf, is -inf: a query that sees no key.
      if (lane % 4 == 0 && query < p.queries) {
        p.log_sum_exp[pair * p.queries + query] = (highest[i] + __log2f(total[i])) * LN_2;
      }
    }
    write_shares(label, inverse, pair, first + row);

    // Through the shared memory of this warp's own queries, so that a thread writes 16 bytes.
    __syncwarp();
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = pack<T>(output[n][2 * i] * inverse[i], output[n][2 * i + 1] * inverse[i]);
        store_shared(shared + Tile::at(row + 8 * i, n) + lane % 4 * 4, word);
      }
    }
    __syncwarp();
    T* to = static_cast<T*>(p.output) + (int64_t(image) * p.queries * p.heads + head) * D;
#pragma unroll
    for (int i = 0; i < QUERIES_OF_WARP * D / 8 / 32; ++i) {
      const int at = i * 32 + lane, of_warp = at / (D / 8), chunk = at % (D / 8);
      const int query = first + warp * QUERIES_OF_WARP + of_warp;
      const uint4 words = load_shared(shared + Tile::at(warp * QUERIES_OF_WARP + of_warp, chunk));
      if (query < p.queries) *reinterpret_cast<uint4*>(to + int64_t(query) * p.heads * D + 8 * chunk) = words;
    }
  }

  // Without offsets a query sees every key.
  static __device__ float inverse_of(float total) { return OFFSETS && total == 0.0f ? 0.0f : __fdividef(1.0f, total); }

  // The label of a source is the sum of its parts, which neighbouring threads have: each sums its own columns of a
  // source, then the four of a row add up.
  __device__ void write_shares(const float (&label)[LABEL_BLOCKS][4], const float (&inverse)[2], int64_t pair,
                               int query) const {
#pragma unroll
    for (int source = 0; source < (LABEL_COLUMNS - 1) / PARTS; ++source) {
      if (source >= p.sources) break;
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < LABEL_BLOCKS; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 8 * n + lane % 4 * 2 + i % 2;
          if (column > source * PARTS && column <= (source + 1) * PARTS) sum[i / 2] += label[n][i];
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
        if (lane % 4 == 0 && query + 8 * i < p.queries) {
          p.head_share[(pair * p.sources + source) * p.queries + query + 8 * i] = sum[i] * inverse[i];
        }
      }
    }
  }
};

template <class T, int D, int TILES, bool STREAMS, bool OFFSETS, int LABEL_BLOCKS>
__global__ void __launch_bounds__(THREADS, ForwardKernel<T, D, TILES, STREAMS, OFFSETS, LABEL_BLOCKS>::BLOCKS)
    attention_forward(const __grid_constant__ Forward p) {
  extern __shared__ __align__(128) unsigned char shared[];
  ForwardKernel<T, D, TILES, STREAMS, OFFSETS, LABEL_BLOCKS>{p, uint32_t(__cvta_generic_to_shared(shared))}.run();
}

void check(cudaError_t status, const char* kernel, const Forward& p) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(kernel) + " with B, H, Nq, Nk, D, S = " + std::to_string(p.batch) + ", " +
                           std::to_string(p.heads) + ", " + std::to_string(p.queries) + ", " + std::to_string(p.keys) +
                           ", " + std::to_string(p.head_dim) + ", " + std::to_string(p.sources) + ": " +
                           cudaGetErrorString(status));
}

unsigned blocks_of(int64_t threads, int of_block) { return unsigned((threads + of_block - 1) / of_block); }

template <class T, int D, int TILES, bool STREAMS, bool OFFSETS, int LABEL_BLOCKS>
void launch(const Forward& p, cudaStream_t stream) {
  using Kernel = ForwardKernel<T, D, TILES, STREAMS, OFFSETS, LABEL_BLOCKS>;
  const auto kernel = attention_forward<T, D, TILES, STREAMS, OFFSETS, LABEL_BLOCKS>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SHARED_BYTES),
        "attention_forward", p);
  const int64_t blocks = blocks_of(p.queries, QUERIES_OF_BLOCK) * p.batch * p.heads;
  kernel<<<unsigned(blocks), THREADS, Kernel::SHARED_BYTES, stream>>>(p);
}

// All keys in one step where registers hold their scores: up to 64, or up to 208 of heads of at most 64.
template <class T, int D, bool OFFSETS>
void launch_for_keys(const Forward& p, cudaStream_t stream) {
  if (p.sources > 2) return launch<T, D, D <= 96 ? 4 : 2, true, OFFSETS, 4>(p, stream);
  if (p.keys <= 64) return launch<T, D, 4, false, OFFSETS, 1>(p, stream);
  if constexpr (D <= 64 && !OFFSETS) {
    if (p.keys <= 208) return launch<T, D, 13, false, OFFSETS, 1>(p, stream);
  }
  launch<T, D, 4, true, OFFSETS, 1>(p, stream);
}

template <class T, int D>
void launch_for_offsets(const Forward& p, cudaStream_t stream) {
  // A scale that is not positive can't wait for the exponential.
  if (p.bias.data != nullptr || p.mask.data != nullptr || !(p.scale > 0.0f)) {
    launch_for_keys<T, D, true>(p, stream);
  } else {
    launch_for_keys<T, D, false>(p, stream);
  }
}

template <class T>
void launch_for_head_dim(const Forward& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 32:
      return launch_for_offsets<T, 32>(p, stream);
    case 64:
      return launch_for_offsets<T, 64>(p, stream);
    case 80:
      return launch_for_offsets<T, 80>(p, stream);
    case 96:
      return launch_for_offsets<T, 96>(p, stream);
    default:
      return launch_for_offsets<T, 128>(p, stream);
  }
}

template <class T>
void forward_of(const Forward& p, cudaStream_t stream) {
  if (p.sources > 0) {
    pack_labels<T><<<blocks_of(p.batch * padded(p.keys), 128), 128, 0, stream>>>(p);
    check(cudaGetLastError(), "pack_labels", p);
  }
  launch_for_head_dim<T>(p, stream);
  check(cudaGetLastError(), "attention_forward", p);
  if (p.sources > 0) {
    average_heads<<<blocks_of(p.batch * p.queries, 128), 128, 0, stream>>>(p);
    check(cudaGetLastError(), "average_heads", p);
  }
}

}  // namespace

void forward(const Forward& arguments, cudaStream_t stream) {
  if (arguments.dtype == DType::bfloat16) return forward_of<__nv_bfloat16>(arguments, stream);
  forward_of<__half>(arguments, stream);
}

}  // namespace tlalign::cuda
