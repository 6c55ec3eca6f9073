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
// heads in turn, whose queries pass by in steps of 64. Three of four warpgroups have 64 keys each, and sum dK and dV in
// registers. They form P and dS transposed, keys as rows, so that both are left factors of products as they are; dS
// goes through shared memory, too. The last warpgroup has the last 8 keys, as columns, and multiplies dS of all keys
// for dQ, while the others are at the next step.
//
// Rows of the next head come meanwhile: K and V to a place of their own, Q and dO in place of those of the last step.
template <class T>
struct HopperKernel {
  using Tile = SharedRows<T, 64>;
  static constexpr int D = 64, STEP = 64, STEPS = 4, TILES = 13, ROWS = 16 * TILES, LAST_STEP = ROWS - 3 * STEP;
  // Warpgroups that have 64 keys, what they have together, and all threads.
  static constexpr int GROUPS = 3, CERTAIN_KEYS = 64 * GROUPS, THREADS = 128 * (GROUPS + 1);
  static constexpr int REGISTERS = 144, LAST_REGISTERS = 80;
  static constexpr int PART_BYTES = Tile::bytes(ROWS), STEP_BYTES = Tile::bytes(STEP);
  // Twice K and V, of this head and the next one; Q and dO; twice dS of a step, keys as rows; twice the output of a
  // step; P of the last keys; twice the row terms of a step.
  static constexpr int QUERIES_AT = 4 * PART_BYTES, GRADS_AT = 5 * PART_BYTES, GRAD_SCORES_AT = 6 * PART_BYTES;
  static constexpr int OUTPUT_AT = 8 * PART_BYTES, LAST_KEYS_AT = OUTPUT_AT + 2 * STEP_BYTES;
  static constexpr int TERMS_AT = LAST_KEYS_AT + Tile::bytes(8), TERMS_BYTES = STEP * sizeof(float);
  static constexpr int SHARED_BYTES = TERMS_AT + 4 * TERMS_BYTES;
  // Queries whose scores registers hold at once.
  static constexpr int AT_ONCE = 32;
  // From 16 rows to the next ones, in a descriptor.
  static constexpr int TILE_STRIDE = Tile::bytes(16) / 16;

  const Backward& p;
  const uint32_t shared;
  const int lane = threadIdx.x % 32;
  // The same in all threads of a warp, as the compiler sees now.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

  __device__ unsigned heads() const { return unsigned(p.batch) * hidden(p.heads); }

  struct Head {
    unsigned pair, image, head;

    __device__ Head(const Backward& p, unsigned of_pair) : pair(hidden(of_pair)) {
      image = p.heads_of_image.quotient(pair);
      head = pair - image * p.heads;
    }
    // Strides take 32 bits: see aligned_rows.
    __device__ char* start(const Rows& rows) const {
      return rows.data + uint64_t(image) * uint32_t(rows.image) + uint64_t(head) * uint32_t(rows.head);
    }
  };

  __device__ uint32_t keys_of(unsigned number) const { return shared + number % 2 * (2 * PART_BYTES); }
  __device__ uint32_t grad_scores_of(int step) const { return shared + GRAD_SCORES_AT + step % 2 * PART_BYTES; }
  // Log-sum-exp in units of ln 2, and TERMS_BYTES further on the row sum of dO * O.
  __device__ uint32_t terms_of(int step) const { return shared + TERMS_AT + step % 2 * (2 * TERMS_BYTES); }

  __device__ void copy_keys(uint32_t to, const Rows& rows, unsigned pair) const {
    const Head head(p, pair);
    using Source = typename Tile::template Source<ROWS, THREADS, false, CERTAIN_KEYS>;
    Source(head.start(rows), hidden(rows.row), 0, hidden(p.keys)).copy(to);
  }
  template <int COUNT>
  __device__ void copy_rows(uint32_t to, const char* data, int row_bytes, int step) const {
    using Source = typename Tile::template Source<COUNT, THREADS, false, COUNT == STEP ? STEP : 0>;
    Source(data, hidden(row_bytes), step * STEP, hidden(p.queries)).copy(to);
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
    const unsigned thread = hidden(threadIdx.x);
    const int query = step * STEP + thread / 8;
    if (thread % 8 != 0 || query >= p.queries) return -INFINITY;
    return p.log_sum_exp[int64_t(pair) * p.queries + query];
  }
  // Those of rows that a thread has copied parts of itself.
  __device__ void write_terms(int step, float log_sum) const {
    const unsigned thread = hidden(threadIdx.x), row = thread / 8;
    if (step == STEPS - 1 && row >= LAST_STEP) return;
    const uint32_t own = Tile::at(row, thread % 8);
    const uint4 output = load_shared(shared + OUTPUT_AT + step % 2 * STEP_BYTES + own);
    const uint4 grad = load_shared(shared + GRADS_AT + step * STEP_BYTES + own);
    const T(&left)[8] = reinterpret_cast<const T(&)[8]>(output);
    const T(&right)[8] = reinterpret_cast<const T(&)[8]>(grad);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(to_float(left[i]), to_float(right[i]), sum);
#pragma unroll
    for (int i = 1; i < 8; i *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (thread % 8 != 0) return;
    const float known = log_sum == -INFINITY ? INFINITY : log_sum * LOG2_E;
    const uint32_t to = terms_of(step) + row * sizeof(float);
    store_shared(to, __float_as_uint(known));
    store_shared(to + TERMS_BYTES, __float_as_uint(sum));
  }

  __device__ void run() const {
    clear_missing_keys();
    copy_keys(keys_of(0), p.key, blockIdx.x);
    copy_keys(keys_of(0) + PART_BYTES, p.value, blockIdx.x);
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
      copy_queries(blockIdx.x, step);
      if (step < 2) copy_output(blockIdx.x, step);
    }
    commit_copies();
    const float log_sum = load_log_sum(blockIdx.x, 0);
    wait_for_copies<0>();
    write_terms(0, log_sum);
    hopper::show_to_products();
    __syncthreads();
    if (warp < 4 * GROUPS) {
      hopper::take_more_registers<REGISTERS>();
#pragma unroll 1
      for (unsigned number = 0, now = blockIdx.x; now < heads(); ++number, now += gridDim.x) take_keys(number, now);
    } else {
      hopper::take_fewer_registers<LAST_REGISTERS>();
#pragma unroll 1
      for (unsigned number = 0, now = blockIdx.x; now < heads(); ++number, now += gridDim.x) {
        take_last_keys(number, now);
      }
    }
  }

  // Begins copies of what takes the place of rows that have been read, and is there one step later. Returns the
  // log-sum-exp of the next step.
  __device__ float begin_step(unsigned number, unsigned now, int step) const {
    const unsigned next = now + gridDim.x;
    if (step == 0) {
      if (number > 0) copy_queries(now, STEPS - 1);
    } else if (next < heads()) {
      copy_queries(next, step - 1);
      if (step == 1) copy_keys(keys_of(number + 1), p.key, next);
      if (step == 2) copy_keys(keys_of(number + 1) + PART_BYTES, p.value, next);
    }
    if (step < 2) {
      copy_output(now, step + 2);
    } else if (next < heads()) {
      copy_output(next, step - 2);
    }
    commit_copies();
    return step + 1 < STEPS ? load_log_sum(now, step + 1) : next < heads() ? load_log_sum(next, 0) : 0.0f;
  }
  // When products are done that read what copies overwrite next.
  template <class... Sums>
  __device__ void end_step(unsigned now, int step, float log_sum, Sums&... sums) const {
    wait_for_copies<1>();
    if (step + 1 < STEPS || now + gridDim.x < heads()) write_terms((step + 1) % STEPS, log_sum);
    hopper::wait_for_products(sums...);
    hopper::show_to_products();
    // Not __syncthreads: the warpgroups come here from two places.
    hopper::wait_at(0, THREADS);
  }

  // Of keys that there are not dS is 0, and stays so.
  __device__ void clear_missing_keys() const {
    const unsigned thread = hidden(threadIdx.x), row = CERTAIN_KEYS + thread / 8;
    if (row >= ROWS) return;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      store_shared(grad_scores_of(step) + Tile::at(row, thread % 8), make_uint4(0, 0, 0, 0));
    }
  }

  // A head, for a warpgroup with 64 keys.
  __device__ void take_keys(unsigned number, unsigned now) const {
    const int first = warp / 4 * 64;
    float grad_key[D / 8][4], grad_value[D / 8][4];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) grad_key[i / 4][i % 4] = grad_value[i / 4][i % 4] = 0.0f;
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
      const float log_sum = begin_step(number, now, step);
      const uint32_t keys = keys_of(hidden(number)) + Tile::bytes(first);
      if (step < STEPS - 1) {
#pragma unroll
        for (int part = 0; part < STEP; part += AT_ONCE) add_queries<AT_ONCE>(keys, step, part, grad_key, grad_value);
      } else {
        add_queries<LAST_STEP>(keys, step, 0, grad_key, grad_value);
      }
      end_step(now, step, log_sum, grad_key, grad_value);
    }
    const Head head(p, now);
    const int row = hidden(warp) * 16;
    write(grad_key, p.scale, head.start(p.grad_key), int(p.grad_key.row), row, p.keys);
    write(grad_value, 1.0f, head.start(p.grad_value), int(p.grad_value.row), row, p.keys);
  }

  // The products with COUNT queries of a step, from `first` on. Those that add to dK and dV are begun only.
  template <int COUNT>
  __device__ void add_queries(uint32_t keys, int step, int first, float (&grad_key)[D / 8][4],
                              float (&grad_value)[D / 8][4]) const {
    const uint32_t at = step * STEP_BYTES + Tile::bytes(first);
    const uint64_t query = hopper::descriptor(shared + QUERIES_AT + at);
    const uint64_t grad = hopper::descriptor(shared + GRADS_AT + at);
    float scores[COUNT / 8][4], grad_scores[COUNT / 8][4];
    hopper::begin_products();
    multiply_rows(scores, hopper::descriptor(keys), query);
    // Those begun for queries before are done, and their factors are not kept in registers any longer.
    hopper::wait_for_products<1>(grad_key, grad_value);
    hopper::begin_products();
    multiply_rows(grad_scores, hopper::descriptor(keys + PART_BYTES), grad);

    // Keys as rows, queries as columns: P.
    const uint32_t terms = terms_of(step) + first * sizeof(float) + lane % 4 * 8;
    const float unit = p.scale * LOG2_E;
    hopper::wait_for_products<1>(scores);
#pragma unroll
    for (int n = 0; n < COUNT / 8; ++n) {
      const float2 log_sum = load_pair(terms + 8 * n * sizeof(float));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = exp2_of(fmaf(scores[n][i], unit, i % 2 == 0 ? -log_sum.x : -log_sum.y));
      }
    }
    // dS = P * (dP - rowsum(dO * O))
    Fragment left[COUNT / 16], grad_left[COUNT / 16];
    hopper::wait_for_products(grad_scores);
#pragma unroll
    for (int n = 0; n < COUNT / 8; ++n) {
      const float2 row_sum = load_pair(terms + TERMS_BYTES + 8 * n * sizeof(float));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        grad_scores[n][i] = scores[n][i] * (grad_scores[n][i] - (i % 2 == 0 ? row_sum.x : row_sum.y));
      }
    }
    const int row = hidden(warp) * 16 + lane / 4;
    const uint32_t to = grad_scores_of(step) + Tile::at(row, first / 8) + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < COUNT / 16; ++i) {
      left[i] = pack_scores<T>(reinterpret_cast<const float (&)[2][4]>(scores[2 * i]));
      grad_left[i] = pack_scores<T>(reinterpret_cast<const float (&)[2][4]>(grad_scores[2 * i]));
      store_shared(Tile::beside(to, 2 * i), grad_left[i].x);
      store_shared(Tile::beside(to, 2 * i) + Tile::bytes(8), grad_left[i].y);
      store_shared(Tile::beside(to, 2 * i + 1), grad_left[i].z);
      store_shared(Tile::beside(to, 2 * i + 1) + Tile::bytes(8), grad_left[i].w);
    }
    hopper::begin_products();
#pragma unroll
    for (int i = 0; i < COUNT / 16; ++i) {
      hopper::multiply_columns<T, true>(grad_value, left[i], grad + i * TILE_STRIDE);
      hopper::multiply_columns<T, true>(grad_key, grad_left[i], query + i * TILE_STRIDE);
    }
    hopper::commit_products();
  }

  // sum = left right^T, of rows of D.
  template <int N>
  static __device__ void multiply_rows(float (&sum)[N][4], uint64_t left, uint64_t right) {
    hopper::multiply_rows<T, false>(sum, left, right);
#pragma unroll
    for (int i = 1; i < D / 16; ++i) hopper::multiply_rows<T, true>(sum, left + 2 * i, right + 2 * i);
    hopper::commit_products();
  }

  static __device__ float2 load_pair(uint32_t from) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(from) : "memory");
    return pair;
  }
  static __device__ float load_number(uint32_t from) {
    float number;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(number) : "r"(from) : "memory");
    return number;
  }
  static __device__ void store_number(uint32_t to, float number) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(uint16_t(pack<T>(number, 0.0f))) : "memory");
  }

  // A head, for the warpgroup with the last keys. Its sums are transposed.
  __device__ void take_last_keys(unsigned number, unsigned now) const {
    float grad_key[1][4] = {}, grad_value[1][4] = {};
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
      const float log_sum = begin_step(number, now, step);
      add_last_keys(keys_of(hidden(number)), step, grad_key, grad_value);
      end_step(now, step, log_sum);
      write_grad_query(now, keys_of(hidden(number)), step);
    }
    const Head head(p, now);
    write_last_keys(grad_key, p.scale, head.start(p.grad_key), int(p.grad_key.row));
    write_last_keys(grad_value, 1.0f, head.start(p.grad_value), int(p.grad_value.row));
  }

  __device__ void add_last_keys(uint32_t keys, int step, float (&grad_key)[1][4], float (&grad_value)[1][4]) const {
    // In the last step only one warp has queries. What the others read there instead, nobody writes at that time: the
    // first rows of dO, of the next head already, and dS of the step before.
    const bool is_last = step == STEPS - 1;
    const uint32_t at = step * STEP_BYTES;
    const uint32_t last_keys = keys + Tile::bytes(CERTAIN_KEYS), grad_scores_at = grad_scores_of(step);
    float scores[1][4], grad_scores[1][4];
    hopper::begin_products();
    multiply_rows(scores, hopper::descriptor(shared + QUERIES_AT + at), hopper::descriptor(last_keys));
    multiply_rows(grad_scores, hopper::descriptor(shared + GRADS_AT + at), hopper::descriptor(last_keys + PART_BYTES));
    hopper::wait_for_products(scores, grad_scores);
    if (!is_last || warp % 4 == 0) {
      const float unit = p.scale * LOG2_E;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = warp % 4 * 16 + lane / 4 + i / 2 * 8, key = lane % 4 * 2 + i % 2;
        const uint32_t terms = terms_of(step) + query * sizeof(float);
        float probability = exp2_of(fmaf(scores[0][i], unit, -load_number(terms)));
        if (CERTAIN_KEYS + key >= p.keys) probability = 0.0f;
        const uint32_t to = Tile::at(key, query / 8) + query % 8 * sizeof(T);
        store_number(shared + LAST_KEYS_AT + to, probability);
        store_number(grad_scores_at + Tile::bytes(CERTAIN_KEYS) + to,
                     probability * (grad_scores[0][i] - load_number(terms + TERMS_BYTES)));
      }
    }
    hopper::show_to_products();
    hopper::wait_at(1, 128);
    const uint64_t query = hopper::descriptor(shared + QUERIES_AT + at);
    const uint64_t grad = hopper::descriptor(shared + GRADS_AT + at);
    const uint64_t right = hopper::descriptor(shared + LAST_KEYS_AT);
    const uint64_t grad_right = hopper::descriptor(grad_scores_at + Tile::bytes(CERTAIN_KEYS));
    hopper::begin_products();
#pragma unroll
    for (int i = 0; i < STEP / 16; ++i) {
      if (i > 0 && is_last) break;
      hopper::multiply_transposed<T, true>(grad_value, grad + i * TILE_STRIDE, right + 2 * i);
      hopper::multiply_transposed<T, true>(grad_key, query + i * TILE_STRIDE, grad_right + 2 * i);
    }
    hopper::commit_products();
    hopper::wait_for_products(grad_key, grad_value);
  }

  __device__ void write_last_keys(const float (&sum)[1][4], float factor, char* data, int row_bytes) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = warp % 4 * 16 + lane / 4 + i / 2 * 8, key = CERTAIN_KEYS + lane % 4 * 2 + i % 2;
      if (key >= p.keys) continue;
      reinterpret_cast<T*>(data + uint64_t(unsigned(key)) * unsigned(row_bytes))[column] =
          from_float<T>(sum[0][i] * factor);
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
    row_bytes = hidden(row_bytes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = row + lane / 4 + 8 * i;
      hopper::store_row<T>(data + uint64_t(unsigned(own)) * unsigned(row_bytes), sum, i, factor, own < end, lane);
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
  const bool is_plain = p.bias_starts.data == nullptr;
  // float16 needs what normalises before anything else.
  if (p.dtype != DType::bfloat16 || p.head_dim != 64 || !fits || !is_plain) return false;
  // Fewer heads leave multiprocessors idle.
  const int blocks = multiprocessors_of_hopper();
  if (blocks == 0 || int64_t(p.batch) * p.heads < blocks) return false;
  launch<HopperKernel<__nv_bfloat16>>(attention_backward_hopper<__nv_bfloat16>, "attention_backward_hopper", blocks, p,
                                      stream);
  return true;
}

}  // namespace tlalign::cuda
