// The backward on Hopper, for what its forward there takes: one kernel forms scores once for all three gradients, and
// reads all rows once. Compiled for sm_90a.
#include <cuda_bf16.h>

#include "cuda/attention.h"
#include "cuda/hopper.h"
#include "cuda/launch.h"
#include "cuda/scores.h"
#include "cuda/tiles.h"

namespace tlalign::cuda {
namespace {

// For heads of 64 with 193 to 200 keys and 193 to 208 queries. A block has a multiprocessor for itself and takes whole
// heads in turn. Each of four warpgroups has 64 keys, of which the last has 8 in one warp, and sums dK and dV in
// registers, while the queries pass by in steps of 64. It forms P and dS transposed, keys as rows, so that both are
// left factors of products as they are; dS goes through shared memory, too, for dQ, the product of the last warpgroup,
// which computes least, while others are at the next step.
//
// Rows of the next head come meanwhile: K and V to a place of their own, Q and dO in place of those of the last step.
template <class T>
struct HopperKernel {
  using Tile = SharedRows<T, 64>;
  static constexpr int D = 64, STEP = 64, STEPS = 4, TILES = 13, ROWS = 16 * TILES, LAST_STEP = ROWS - 3 * STEP;
  static constexpr int GROUPS = 4, THREADS = 128 * GROUPS;
  // Queries whose scores registers hold at once.
  static constexpr int AT_ONCE = 32;
  static constexpr int PART_BYTES = Tile::bytes(ROWS), STEP_BYTES = Tile::bytes(STEP), TERM_BYTES = sizeof(RowTerm);
  // Twice K and V, of this head and the next one; Q and dO; twice dS of a step, keys as rows; twice the output and the
  // row terms of a step.
  static constexpr int QUERIES_AT = 4 * PART_BYTES, GRADS_AT = 5 * PART_BYTES, GRAD_SCORES_AT = 6 * PART_BYTES;
  static constexpr int OUTPUT_AT = 8 * PART_BYTES, TERMS_AT = OUTPUT_AT + 2 * STEP_BYTES;
  static constexpr int SHARED_BYTES = TERMS_AT + 2 * STEP * TERM_BYTES;
  // From 16 rows to the next ones, in a descriptor.
  static constexpr int TILE_STRIDE = Tile::bytes(16) / 16;

  const Backward& p;
  const uint32_t shared;
  const int lane = threadIdx.x % 32;
  // The same in all threads of a warp, as the compiler sees now.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

  struct Head {
    unsigned pair, image, head;

    // Found anew where it is needed: registers are scarcer than instructions.
    __device__ Head(const Backward& p, unsigned of_pair) : pair(of_pair) {
      asm volatile("" : "+r"(pair));
      image = p.heads_of_image.quotient(pair);
      head = pair - image * p.heads;
    }
    // Strides are in bytes, and take 32 bits: see aligned_rows.
    __device__ char* start(const Rows& rows) const {
      return rows.data + uint64_t(image) * uint32_t(rows.image) + uint64_t(head) * uint32_t(rows.head);
    }
  };

  __device__ uint32_t keys_of(unsigned number) const { return shared + number % 2 * (2 * PART_BYTES); }
  __device__ uint32_t grad_scores_of(int step) const { return shared + GRAD_SCORES_AT + step % 2 * PART_BYTES; }
  __device__ uint32_t terms_of(int step) const { return shared + TERMS_AT + step % 2 * (STEP * TERM_BYTES); }

  __device__ void copy_keys(uint32_t to, const Rows& rows, unsigned pair) const {
    const Head head(p, pair);
    using Source = typename Tile::template Source<ROWS, THREADS, false, 192>;
    Source(head.start(rows), int(rows.row), 0, p.keys).copy(to);
  }
  template <int COUNT>
  __device__ void copy_rows(uint32_t to, const char* data, int row_bytes, int step) const {
    using Source = typename Tile::template Source<COUNT, THREADS, false, COUNT == STEP ? STEP : 0>;
    Source(data, row_bytes, step * STEP, p.queries).copy(to);
  }
  __device__ void copy_step(uint32_t to, const char* data, int row_bytes, int step) const {
    if (step < STEPS - 1) return copy_rows<STEP>(to, data, row_bytes, step);
    copy_rows<LAST_STEP>(to, data, row_bytes, step);
  }
  __device__ void copy_queries(unsigned pair, int step) const {
    const Head head(p, pair);
    copy_step(shared + QUERIES_AT + step * STEP_BYTES, head.start(p.query), int(p.query.row), step);
    copy_step(shared + GRADS_AT + step * STEP_BYTES, head.start(p.grad_output), int(p.grad_output.row), step);
  }
  __device__ void copy_output(unsigned pair, int step) const {
    const Head head(p, pair);
    const uint32_t row = p.heads * D * sizeof(T);
    const char* data = static_cast<const char*>(p.output) + uint64_t(head.image) * p.queries * row +
                       head.head * unsigned(D * sizeof(T));
    copy_step(shared + OUTPUT_AT + step % 2 * STEP_BYTES, data, int(row), step);
  }

  // Eight threads have a row of a step, and the first of them its log-sum-exp.
  __device__ float load_log_sum(unsigned pair, int step) const {
    const int query = step * STEP + threadIdx.x / 8;
    if (threadIdx.x % 8 != 0 || query >= p.queries) return -INFINITY;
    return p.log_sum_exp[int64_t(pair) * p.queries + query];
  }
  // Those of rows that a thread has copied parts of itself.
  __device__ void write_terms(int step, float log_sum) const {
    const int row = threadIdx.x / 8;
    if (step == STEPS - 1 && row >= LAST_STEP) return;
    const uint32_t own = Tile::at(row, threadIdx.x % 8);
    const uint4 output = load_shared(shared + OUTPUT_AT + step % 2 * STEP_BYTES + own);
    const uint4 grad = load_shared(shared + GRADS_AT + step * STEP_BYTES + own);
    const T(&left)[8] = reinterpret_cast<const T(&)[8]>(output);
    const T(&right)[8] = reinterpret_cast<const T(&)[8]>(grad);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(to_float(left[i]), to_float(right[i]), sum);
#pragma unroll
    for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 8 != 0) return;
    const float known = log_sum == -INFINITY ? INFINITY : log_sum * LOG2_E;
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(terms_of(step) + row * TERM_BYTES), "f"(known), "f"(sum)
                 : "memory");
  }

  __device__ void run() const {
    const unsigned heads = unsigned(p.batch) * unsigned(p.heads);
    const int group = warp / 4;
    // The last rows are those of the last warp.
    const int first = group < 3 ? 64 * group : ROWS - 64, row = first + warp % 4 * 16;
    const bool works = group < 3 || warp % 4 == 3;
    float grad_key[D / 8][4], grad_value[D / 8][4];

    clear_missing_keys();
    {
      const unsigned head = blockIdx.x;
      copy_keys(keys_of(0), p.key, head);
      copy_keys(keys_of(0) + PART_BYTES, p.value, head);
      for (int step = 0; step < STEPS; ++step) copy_queries(head, step);
      for (int step = 0; step < 2; ++step) copy_output(head, step);
      commit_copies();
      const float log_sum = load_log_sum(head, 0);
      wait_for_copies<0>();
      write_terms(0, log_sum);
      hopper::show_to_products();
      __syncthreads();
    }
#pragma unroll 1
    for (unsigned number = 0, now = blockIdx.x; now < heads; ++number, now += gridDim.x) {
      const uint32_t keys = keys_of(number);
      const bool is_last = now + gridDim.x >= heads;
      const unsigned next = is_last ? now : now + gridDim.x;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) grad_key[i / 4][i % 4] = grad_value[i / 4][i % 4] = 0.0f;
#pragma unroll 1
      for (int step = 0; step < STEPS; ++step) {
        // What lay there before has been read. All of this is there one step later.
        if (step == 0) {
          if (number > 0) copy_queries(now, STEPS - 1);
        } else if (!is_last) {
          copy_queries(next, step - 1);
          if (step == 1) copy_keys(keys_of(number + 1), p.key, next);
          if (step == 2) copy_keys(keys_of(number + 1) + PART_BYTES, p.value, next);
        }
        if (step < 2) {
          copy_output(now, step + 2);
        } else if (!is_last) {
          copy_output(next, step - 2);
        }
        commit_copies();
        const int following = (step + 1) % STEPS;
        const float log_sum = load_log_sum(step + 1 < STEPS ? now : next, following);

        if (step < STEPS - 1) {
#pragma unroll 1
          for (int part = 0; part < STEP; part += AT_ONCE) {
            add_queries<AT_ONCE>(keys + Tile::bytes(first), step, part, row, works, grad_key, grad_value);
          }
        } else {
          add_queries<LAST_STEP>(keys + Tile::bytes(first), step, 0, row, works, grad_key, grad_value);
        }
        wait_for_copies<1>();
        if (following != 0 || !is_last) write_terms(following, log_sum);
        hopper::show_to_products();
        __syncthreads();
        if (group == GROUPS - 1) write_grad_query(now, keys, step);
      }
      if (works) {
        const Head head(p, now);
        write(grad_key, p.scale, head.start(p.grad_key), int(p.grad_key.row), row, p.keys);
        write(grad_value, 1.0f, head.start(p.grad_value), int(p.grad_value.row), row, p.keys);
      }
    }
  }

  // Of keys that there are not dS is 0, and stays so.
  __device__ void clear_missing_keys() const {
    const int row = p.keys + threadIdx.x / 8;
    if (row >= ROWS) return;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      store_shared(grad_scores_of(step) + Tile::at(row, threadIdx.x % 8), make_uint4(0, 0, 0, 0));
    }
  }

  // The products of this warpgroup's `keys` with COUNT queries of a step from `first` on.
  template <int COUNT>
  __device__ void add_queries(uint32_t keys, int step, int first, int row, bool works, float (&grad_key)[D / 8][4],
                              float (&grad_value)[D / 8][4]) const {
    const uint32_t at = step * STEP_BYTES + Tile::bytes(first);
    const uint64_t key = hopper::descriptor(keys), value = hopper::descriptor(keys + PART_BYTES);
    const uint64_t query = hopper::descriptor(shared + QUERIES_AT + at);
    const uint64_t grad = hopper::descriptor(shared + GRADS_AT + at);
    float scores[COUNT / 8][4], grad_scores[COUNT / 8][4];
    hopper::begin_products();
    hopper::multiply_rows<T, false>(scores, key, query);
#pragma unroll
    for (int i = 1; i < D / 16; ++i) hopper::multiply_rows<T, true>(scores, key + 2 * i, query + 2 * i);
    hopper::multiply_rows<T, false>(grad_scores, value, grad);
#pragma unroll
    for (int i = 1; i < D / 16; ++i) hopper::multiply_rows<T, true>(grad_scores, value + 2 * i, grad + 2 * i);
    hopper::commit_products();
    hopper::wait_for_products(scores, grad_scores);

    Fragment left[COUNT / 16], grad_left[COUNT / 16];
    if (works) {
      find_grad_scores<COUNT>(scores, grad_scores, terms_of(step) + first * TERM_BYTES, left, grad_left);
      uint32_t to = grad_scores_of(step) + Tile::at(row + lane / 4, first / 8) + lane % 4 * 4;
#pragma unroll
      for (int n = 0; n < COUNT / 8; ++n) {
        const Fragment& words = grad_left[n / 2];
        if (row + lane / 4 < p.keys) store_shared(Tile::beside(to, n), n % 2 == 0 ? words.x : words.z);
        if (row + lane / 4 + 8 < p.keys) {
          store_shared(Tile::beside(to, n) + Tile::bytes(8), n % 2 == 0 ? words.y : words.w);
        }
      }
    } else {
      // Anything: nobody reads their sums.
#pragma unroll
      for (int i = 0; i < COUNT / 16; ++i) {
        left[i] = reinterpret_cast<const Fragment&>(scores[2 * i]);
        grad_left[i] = reinterpret_cast<const Fragment&>(grad_scores[2 * i]);
      }
    }
    hopper::begin_products();
#pragma unroll
    for (int i = 0; i < COUNT / 16; ++i) {
      hopper::multiply_columns<T, true>(grad_value, left[i], grad + i * TILE_STRIDE);
      hopper::multiply_columns<T, true>(grad_key, grad_left[i], query + i * TILE_STRIDE);
    }
    hopper::commit_products();
    hopper::wait_for_products(grad_key, grad_value);
  }

  // P and dS = P * (dP - rowsum(dO * O)) as left factors.
  template <int COUNT>
  __device__ void find_grad_scores(const float (&scores)[COUNT / 8][4], const float (&grads)[COUNT / 8][4],
                                   uint32_t terms, Fragment (&left)[COUNT / 16],
                                   Fragment (&grad_left)[COUNT / 16]) const {
    const float unit = p.scale * LOG2_E;
#pragma unroll
    for (int i = 0; i < COUNT / 16; ++i) {
      float probability[2][4], grad[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = 2 * i + half;
        const uint4 words = load_shared(terms + (8 * n + lane % 4 * 2) * TERM_BYTES);
        const RowTerm(&term)[2] = reinterpret_cast<const RowTerm(&)[2]>(words);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          probability[half][j] = exp2_of(fmaf(scores[n][j], unit, -term[j % 2].log_sum_exp));
          grad[half][j] = probability[half][j] * (grads[n][j] - term[j % 2].row_sum);
        }
      }
      left[i] = pack_scores<T>(probability);
      grad_left[i] = pack_scores<T>(grad);
    }
  }

  // dQ = scale dS K of a step.
  __device__ void write_grad_query(unsigned pair, uint32_t keys, int step) const {
    float sum[D / 8][4];
    const uint64_t left = hopper::descriptor(grad_scores_of(step)), right = hopper::descriptor(keys);
    hopper::begin_products();
    hopper::multiply_columns<T, false>(sum, left, right);
#pragma unroll
    for (int i = 1; i < TILES; ++i) {
      hopper::multiply_columns<T, true>(sum, left + i * TILE_STRIDE, right + i * TILE_STRIDE);
    }
    hopper::commit_products();
    hopper::wait_for_products(sum);
    const Head head(p, pair);
    write(sum, p.scale, head.start(p.grad_query), int(p.grad_query.row), step * STEP + warp % 4 * 16, p.queries);
  }

  // 16 rows of a sum, of which a thread has two, from `row` on.
  __device__ void write(const float (&sum)[D / 8][4], float factor, char* data, int row_bytes, int row, int end) const {
    char* to = data + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = row + lane / 4 + 8 * i;
      char* to_row = to + uint64_t(unsigned(own)) * unsigned(row_bytes);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t words[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float (&of_chunk)[4] = sum[4 * j + n];
          words[n] = pack<T>(of_chunk[2 * i] * factor, of_chunk[2 * i + 1] * factor);
        }
        hopper::transpose(words, lane);
        if (own < end) store_global(to_row + 64 * j, make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(HopperKernel<T>::THREADS, 1)
    attention_backward_hopper(const __grid_constant__ Backward p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  HopperKernel<T>{p, uint32_t(__cvta_generic_to_shared(shared))}.run();
}

}  // namespace

bool launch_on_hopper(const Backward& p, cudaStream_t stream) {
  const bool fits = p.queries > 192 && p.queries <= 208 && p.keys > 192 && p.keys <= 200;
  const bool is_plain = p.windows.starts == nullptr && p.bias.data == nullptr && p.mask.data == nullptr;
  // float16 needs what normalises before anything else.
  if (p.dtype != DType::bfloat16 || p.head_dim != 64 || !fits || !is_plain) return false;
  const int blocks = multiprocessors_of_hopper();
  if (blocks == 0 || p.batch * p.heads < 2 * blocks) return false;
  const auto kernel = attention_backward_hopper<__nv_bfloat16>;
  constexpr int BYTES = HopperKernel<__nv_bfloat16>::SHARED_BYTES;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES), "attention_backward", p);
  kernel<<<blocks, HopperKernel<__nv_bfloat16>::THREADS, BYTES, stream>>>(p);
  check(cudaGetLastError(), "attention_backward", p);
  return true;
}

}  // namespace tlalign::cuda
