// The gradients of query, key, value and bias, from the saved log-sum-exp, on tensor cores of Ampere and newer
// (mma.sync).
//
// Two kernels form all scores a second time: warps of the one have queries, warps of the other keys. So whatever a
// product takes from scores is in the registers of the warp that formed them, nothing is summed across warps, and no
// sum depends on an order that could change. One kernel that forms scores once would save two products of seven, but
// pass both P and dS through shared memory, which is as busy as the tensor cores already. Where there are at most 64
// queries and keys, or 144 of windows, there is such a kernel: it spares loads of all rows and of the bias, and those
// weigh more.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/attention.h"
#include "cuda/launch.h"
#include "cuda/scores.h"
#include "cuda/tiles.h"
#include "cuda/windows.h"

namespace tlalign::cuda {
namespace {

constexpr int ROWS_OF_BLOCK = 64;
// Tokens of the largest windows that a block has all of, 12 x 12.
constexpr int ROWS_OF_WINDOW = 144;
// Blocks that the registers of a multiprocessor are to hold at once, at least, unless these have more rows.
constexpr int BLOCKS = 2;

template <class T>
using RowTermOf = std::conditional_t<std::is_same_v<T, __half>, NormalisedRowTerm, RowTerm>;

// What is to be normalised.
__device__ inline float apply(const RowTerm&, float number) { return number; }
__device__ inline float apply(const NormalisedRowTerm& term, float number) { return number * term.inverse; }

// What the kernels share: whose rows a block has, and where rows are.
template <class T, int D, Kind KIND, int ROWS>
struct Block {
  using Tile = SharedRows<T, D>;
  static constexpr bool STARTS = KIND != Kind::plain, WINDOWS = KIND == Kind::windows;
  // A warp has so many times 16 rows: two where registers hold their sums, which halves what it reads of shared memory.
  static constexpr int M = D <= 64 && ROWS == ROWS_OF_BLOCK ? 2 : 1;
  static constexpr int ROWS_OF_WARP = 16 * M, WARPS = ROWS / ROWS_OF_WARP, THREADS = 32 * WARPS;

  const Backward& p;
  const uint32_t shared;
  const int lane = threadIdx.x % 32;
  // The same in all threads of a warp, as the compiler sees now.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  int first;  // row of the block
  unsigned image, head;

  // A block has a head.
  __device__ Block(const Backward& p, uint32_t shared) : p(p), shared(shared), first(0) { find_head(blockIdx.x); }
  // `blocks` have a head.
  __device__ Block(const Backward& p, uint32_t shared, const Divisor& blocks) : p(p), shared(shared) {
    const unsigned pair = blocks.quotient(blockIdx.x);
    first = int(blockIdx.x - pair * blocks.divisor) * ROWS;
    find_head(pair);
  }

  __device__ void find_head(unsigned pair) {
    image = p.heads_of_image.quotient(pair);
    head = pair - image * p.heads;
  }

  __device__ Window window() const { return Window(p.windows, image); }

  __device__ int64_t pair() const { return int64_t(image) * p.heads + head; }
  __device__ RowTermOf<T>* row_terms() const {
    return static_cast<RowTermOf<T>*>(p.row_terms) + pair() * padded(p.queries);
  }
  // Strides take 32 bits: see aligned_rows.
  __device__ char* start(const Rows& rows) const {
    const unsigned of_rows = WINDOWS ? window().image : image;
    return rows.data + uint64_t(of_rows) * uint32_t(rows.image) + uint64_t(head) * uint32_t(rows.head);
  }

  // `number`: 1 and 2 of keys and values, of which windows, if PADDED, have what lies in the padding, too.
  template <int COUNT, bool PADDED = false>
  __device__ void load(uint32_t to, const Rows& rows, int from, int end, int number = 0) const {
    if constexpr (WINDOWS) {
      const char* padding = p.windows.padding + uint64_t(number * p.heads + head) * unsigned(D * sizeof(T));
      WindowSource<Tile, COUNT, THREADS, PADDED>(window(), from, start(rows), int(rows.row), padding).copy(to);
    } else {
      using Source = typename Tile::template Source<COUNT, THREADS, false>;
      Source(start(rows), int(rows.row), from, end).copy(to);
    }
  }

  // The rows of this warp, of those of the block at `rows`.
  __device__ uint32_t own(uint32_t rows) const { return rows + Tile::bytes(warp * ROWS_OF_WARP); }

  __device__ void load_own(Fragment (&fragments)[M][D / 16], uint32_t rows) const {
    uint32_t from[D / 16];
    find_rows<T, D>(from, own(rows), lane);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < D / 16; ++i) fragments[m][i] = load_matrices(from[i] + Tile::bytes(16 * m));
    }
  }

  // A sum of this warp's rows, by way of those `offset` bytes behind the first ones of shared memory. `number`: of keys
  // and values, whose gradients in the padding of windows are wanted, 0 and 1.
  __device__ void write_own(const float (&sum)[M][D / 8][4], const float (&factor)[M][2], const uint32_t (&at)[D / 8],
                            uint32_t offset, const Rows& to, int end, int number = -1) const {
    const int row = first + warp * ROWS_OF_WARP;
    const uint32_t own_rows = own(shared) + offset;
    store_rows<T, D>(sum, factor, at, offset);
    if constexpr (WINDOWS) {
      char* padding = number < 0 ? nullptr : p.grad_padding;
      const int head_bytes = D * sizeof(T), padding_row = 2 * p.heads * head_bytes;
      if (padding != nullptr) {
        padding += uint64_t(window().image) * unsigned(p.windows.padding_tokens) * unsigned(padding_row) +
                   unsigned(number * p.heads + head) * unsigned(head_bytes);
      }
      WindowTarget<Tile, ROWS_OF_WARP>(window(), row, start(to), int(to.row), own_rows, lane, padding, padding_row)
          .write(lane);
    } else {
      char* rows = start(to) + uint64_t(unsigned(row)) * unsigned(to.row);
      typename Tile::template Target<ROWS_OF_WARP>(rows, int(to.row), end - row, own_rows, lane).write(lane);
    }
  }
};

template <int M, int N>
__device__ void clear(float (&sum)[M][N][4]) {
#pragma unroll
  for (int i = 0; i < M * N * 4; ++i) sum[i / 4 / N][i / 4 % N][i % 4] = 0.0f;
}

template <int M>
__device__ void multiply_elements(Scores<M>& scores, const Scores<M>& factors) {
#pragma unroll
  for (int i = 0; i < M * 8; ++i) scores[i / 8][i / 4 % 2][i % 4] *= factors[i / 8][i / 4 % 2][i % 4];
}

// What the kernels do whose warps have queries.
template <class T, int D, Kind KIND, int ROWS>
struct QueryRows : Block<T, D, KIND, ROWS> {
  using Base = Block<T, D, KIND, ROWS>;
  using Base::Base, Base::M, Base::ROWS_OF_WARP, Base::THREADS, Base::STARTS, Base::WINDOWS;
  using Base::p, Base::shared, Base::lane, Base::warp, Base::first, Base::image, Base::head;
  using typename Base::Tile;
  static constexpr bool NORMALISES = std::is_same_v<RowTermOf<T>, NormalisedRowTerm>;

  // Queries and gradients to the first two tiles of shared memory, and the output.
  __device__ void load_rows(uint32_t output_rows) const {
    Base::template load<ROWS>(shared, p.query, first, p.queries);
    Base::template load<ROWS>(shared + Tile::bytes(ROWS), p.grad_output, first, p.queries);
    const uint32_t row = p.heads * D * sizeof(T);
    if constexpr (WINDOWS) {
      const int64_t image_bytes = int64_t(p.windows.down.tokens) * p.windows.across.tokens * row;
      char* output = static_cast<char*>(const_cast<void*>(p.output));
      Base::template load<ROWS>(output_rows, {output, image_bytes, int64_t(D * sizeof(T)), row}, first, 0);
      return;
    }
    const char* output =
        static_cast<const char*>(p.output) + uint64_t(image) * p.queries * row + head * unsigned(D * sizeof(T));
    typename Tile::template Source<ROWS, THREADS, false>(output, int(row), first, p.queries).copy(output_rows);
  }

  __device__ void load_queries(Fragment (&query)[M][D / 16]) const {
    Base::load_own(query, shared);
    if (STARTS) flip(query, p.flipped);
  }

  // Scores of this warp's queries and 16 keys from `key` on, `at` bytes behind `from`.
  __device__ void multiply_keys(Scores<M>& scores, const Fragment (&query)[M][D / 16], const uint32_t (&from)[D / 16],
                                uint32_t at, int key) const {
    if constexpr (STARTS) {
      const int own_query = first + warp * ROWS_OF_WARP;
      begin_scores<KIND, false>(scores, p.bias_starts, image, head, own_query, key, lane);
      add_scores<T, D>(scores, query, from, at);
      finish_scores<KIND, false>(scores, p, image, head, own_query, key, lane);
    } else {
      multiply_scores<T, D>(scores, query, from, at);
    }
  }

  // Four threads have parts of a row.
  static __device__ float sum_of_row(float part) {
    part += __shfl_xor_sync(0xffffffffu, part, 1);
    return part + __shfl_xor_sync(0xffffffffu, part, 2);
  }

  // All but what normalises. Those of a query that there is not, or that sees no key, make its probabilities 0.
  __device__ void find_row_terms(const Fragment (&grad)[M][D / 16], uint32_t output_rows,
                                 RowTermOf<T> (&terms)[M][2]) const {
    uint32_t from[D / 16];
    find_rows_of_scores<T, D>(from, Base::own(output_rows), lane);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      // The diagonal of dO O^T: fewer instructions than products of single numbers.
      Scores<1> products;
      const Fragment(&left)[1][D / 16] = reinterpret_cast<const Fragment(&)[1][D / 16]>(grad[m]);
      multiply_scores<T, D>(products, left, from, Tile::bytes(16 * m));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int query = first + warp * ROWS_OF_WARP + 16 * m + lane / 4 + 8 * i;
        const bool is_query = WINDOWS ? Base::window().has(query) : query < p.queries;
        const float known = is_query ? p.log_sum_exp[Base::pair() * p.queries + query] : -INFINITY;
        terms[m][i].log_sum_exp = known == -INFINITY ? INFINITY : known * LOG2_E;
        // The thread whose columns are 2 (lane % 4) and the next has one of row lane / 4.
        const float own = lane / 4 % 2 == 0 ? products[0][i][2 * i] : products[0][i][2 * i + 1];
        terms[m][i].row_sum = sum_of_row(lane / 8 == lane % 4 ? own : 0.0f);
      }
    }
  }

  // What normalises, from a thread's sums of probabilities that are not normalised.
  static __device__ void normalise(RowTermOf<T> (&terms)[M][2], const float (&total)[M][2]) {
    if constexpr (NORMALISES) {
#pragma unroll
      for (int i = 0; i < 2 * M; ++i) {
        const float sum = sum_of_row(total[i / 2][i % 2]);
        terms[i / 2][i % 2].inverse = sum > 0.0f ? 1.0f / sum : 1.0f;
      }
    }
  }

  __device__ void write_row_terms(const RowTermOf<T> (&terms)[M][2]) const {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      if (lane % 4 == 0) Base::row_terms()[first + warp * ROWS_OF_WARP + lane / 4 + 8 * i] = terms[i / 2][i % 2];
    }
  }

  // Probabilities, not normalised, in place of the scores of 16 keys from `key` on, and `total` += them. `ENDS`: there
  // are fewer keys.
  template <bool ENDS>
  __device__ void exponentiate(Scores<M>& scores, const RowTermOf<T> (&terms)[M][2], int key,
                               float (&total)[M][2]) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& score = scores[m][i / 4][i % 4];
        score = exp2_of(fmaf(score, p.unit, -terms[m][i / 2 % 2].log_sum_exp));
        if (ENDS && !STARTS && key + i / 4 * 8 + lane % 4 * 2 + i % 2 >= p.keys) score = 0.0f;
        if (NORMALISES) total[m][i / 2 % 2] += score;
      }
    }
  }

  // dO V^T - rowsum(dO * O)
  __device__ void multiply_values(Scores<M>& scores, const Fragment (&grad)[M][D / 16],
                                  const RowTermOf<T> (&terms)[M][2], const uint32_t (&from)[D / 16],
                                  uint32_t offset) const {
    float minus_row_sum[M][2];
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) minus_row_sum[i / 2][i % 2] = -terms[i / 2][i % 2].row_sum;
    multiply_scores<T, D>(scores, grad, from, offset, minus_row_sum);
  }
};

// dQ = scale dS K with dS = P * (dO V^T - rowsum(dO * O)): a block has 64 queries of a head, and the keys pass by.
// Writes the row terms, too.
template <class T, int D, Kind KIND>
struct QueriesKernel : QueryRows<T, D, KIND, ROWS_OF_BLOCK> {
  using Base = QueryRows<T, D, KIND, ROWS_OF_BLOCK>;
  using Base::M, Base::ROWS_OF_WARP, Base::NORMALISES;
  using Base::p, Base::shared, Base::lane, Base::warp, Base::first;
  using typename Base::Tile;
  // Keys that pass by in a step: so many that shared memory holds two steps for as many blocks as registers do.
  static constexpr int STEP = 32;
  static constexpr int STAGE_BYTES = 2 * Tile::bytes(STEP);
  static constexpr int STAGES_AT = 2 * Tile::bytes(ROWS_OF_BLOCK);
  static constexpr int SHARED_BYTES = STAGES_AT + 2 * STAGE_BYTES;
  static_assert(Tile::bytes(ROWS_OF_BLOCK) <= STAGE_BYTES, "the output has room in the second stage");

  __device__ QueriesKernel(const Backward& p, uint32_t shared) : Base(p, shared, p.query_blocks) {}

  __device__ uint32_t stage(int step) const { return shared + STAGES_AT + step % 2 * STAGE_BYTES; }

  __device__ void load_step(int step) const {
    Base::template load<STEP, true>(stage(step), p.key, step * STEP, p.keys, 1);
    Base::template load<STEP, true>(stage(step) + Tile::bytes(STEP), p.value, step * STEP, p.keys, 2);
  }

  __device__ void run() {
    // A warp without queries helps to load, no more.
    const bool works = first + warp * ROWS_OF_WARP < p.queries;
    const uint32_t grad_rows = shared + Tile::bytes(ROWS_OF_BLOCK), output_rows = stage(1);
    Base::load_rows(output_rows);
    commit_copies();
    load_step(0);
    commit_copies();

    wait_for_copies<1>();
    __syncthreads();
    Fragment query[M][D / 16], grad[M][D / 16];
    Base::load_queries(query);
    Base::load_own(grad, grad_rows);
    RowTermOf<T> terms[M][2];
    Base::find_row_terms(grad, output_rows, terms);

    float sum[M][D / 8][4], total[M][2] = {};
    clear(sum);
    uint32_t scores_from[D / 16], sums_from[D / 16];
    find_rows_of_scores<T, D>(scores_from, stage(0), lane);
    find_rows<T, D>(sums_from, stage(0), lane);
    const int steps = (p.keys + STEP - 1) / STEP;
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<0>();
      // Nobody reads what the next step overwrites any more, and everybody's copies for this one have landed.
      __syncthreads();
      if (step + 1 < steps) load_step(step + 1);
      commit_copies();
      if (works) add_step(query, grad, scores_from, sums_from, terms, step, sum, total);
    }
    Base::normalise(terms, total);
    Base::write_row_terms(terms);
    float factor[M][2];
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) factor[i / 2][i % 2] = apply(terms[i / 2][i % 2], p.scale);
    if (!works) return;
    uint32_t to[D / 8];
    find_sums<T, D>(to, Base::own(shared), lane);
    Base::write_own(sum, factor, to, 0, p.grad_query, p.queries);
  }

  __device__ void add_step(const Fragment (&query)[M][D / 16], const Fragment (&grad)[M][D / 16],
                           const uint32_t (&scores_from)[D / 16], const uint32_t (&sums_from)[D / 16],
                           const RowTermOf<T> (&terms)[M][2], int step, float (&sum)[M][D / 8][4],
                           float (&total)[M][2]) const {
    const int keys = p.keys - step * STEP, whole_tiles = keys / 16;
#pragma unroll
    for (int tile = 0; tile < STEP / 16; ++tile) {
      if (tile >= whole_tiles) break;
      add_tile<false>(query, grad, scores_from, sums_from, terms, step, tile, sum, total);
    }
    if (whole_tiles < STEP / 16 && keys % 16 != 0) {
      add_tile<true>(query, grad, scores_from, sums_from, terms, step, whole_tiles, sum, total);
    }
  }

  // `ENDS`: there are fewer than 16 keys.
  template <bool ENDS>
  __device__ void add_tile(const Fragment (&query)[M][D / 16], const Fragment (&grad)[M][D / 16],
                           const uint32_t (&scores_from)[D / 16], const uint32_t (&sums_from)[D / 16],
                           const RowTermOf<T> (&terms)[M][2], int step, int tile, float (&sum)[M][D / 8][4],
                           float (&total)[M][2]) const {
    const uint32_t at = step % 2 * STAGE_BYTES + Tile::bytes(16 * tile);
    Scores<M> scores, grad_scores;
    const int key = step * STEP + 16 * tile;
    Base::multiply_keys(scores, query, scores_from, at, key);
    Base::multiply_values(grad_scores, grad, terms, scores_from, at + Tile::bytes(STEP));
    Base::template exponentiate<ENDS>(scores, terms, key, total);
    multiply_elements(grad_scores, scores);
    add_product<T, D>(sum, grad_scores, sums_from, at);
  }
};

// dV = P^T dO and dK = scale dS^T Q: a block has 64 keys of a head, and the queries pass by.
template <class T, int D, Kind KIND>
struct KeysKernel : Block<T, D, KIND, ROWS_OF_BLOCK> {
  using Base = Block<T, D, KIND, ROWS_OF_BLOCK>;
  using Base::M, Base::ROWS_OF_WARP, Base::STARTS;
  using Base::p, Base::shared, Base::lane, Base::warp, Base::first, Base::image, Base::head;
  using typename Base::Tile;
  static constexpr int STEP = 32;  // as in QueriesKernel
  static constexpr int TERMS_BYTES = STEP * sizeof(RowTermOf<T>);
  static constexpr int STAGE_BYTES = 2 * Tile::bytes(STEP) + TERMS_BYTES;
  static constexpr int STAGES_AT = 2 * Tile::bytes(ROWS_OF_BLOCK);
  static constexpr int SHARED_BYTES = STAGES_AT + 2 * STAGE_BYTES;
  // Whether registers hold the rows of keys and values all the time.
  static constexpr bool HOLDS = D * M <= 96;

  __device__ KeysKernel(const Backward& p, uint32_t shared) : Base(p, shared, p.key_blocks) {}

  __device__ uint32_t stage(int step) const { return shared + STAGES_AT + step % 2 * STAGE_BYTES; }

  __device__ void load_step(int step) const {
    const uint32_t to = stage(step), terms = to + 2 * Tile::bytes(STEP);
    Base::template load<STEP>(to, p.query, step * STEP, p.queries);
    Base::template load<STEP>(to + Tile::bytes(STEP), p.grad_output, step * STEP, p.queries);
    if (threadIdx.x < TERMS_BYTES / 16) {
      const char* from = reinterpret_cast<const char*>(Base::row_terms() + step * STEP);
      copy_async(terms + threadIdx.x * 16, from + threadIdx.x * 16, true);
    }
  }

  __device__ void run() {
    const bool works = first + warp * ROWS_OF_WARP < p.keys;
    const uint32_t value_rows = shared + Tile::bytes(ROWS_OF_BLOCK);
    Base::template load<ROWS_OF_BLOCK, true>(shared, p.key, first, p.keys, 1);
    Base::template load<ROWS_OF_BLOCK, true>(value_rows, p.value, first, p.keys, 2);
    commit_copies();
    load_step(0);
    commit_copies();

    wait_for_copies<1>();
    __syncthreads();
    Fragment key[M][D / 16], value[M][D / 16];
    if (HOLDS) {
      load_keys(key);
      Base::load_own(value, value_rows);
    }
    float grad_key[M][D / 8][4], grad_value[M][D / 8][4];
    clear(grad_key);
    clear(grad_value);
    uint32_t scores_from[D / 16], sums_from[D / 16];
    find_rows_of_scores<T, D>(scores_from, stage(0), lane);
    find_rows<T, D>(sums_from, stage(0), lane);
    const int steps = (p.queries + STEP - 1) / STEP;
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<0>();
      __syncthreads();
      if (step + 1 < steps) load_step(step + 1);
      commit_copies();
      if (!works) continue;
#pragma unroll
      for (int tile = 0; tile < STEP / 16; ++tile) {
        const int query = step * STEP + 16 * tile;
        if (query >= p.queries) break;
        const uint32_t at = step % 2 * STAGE_BYTES + Tile::bytes(16 * tile);
        Scores<M> scores, grad_scores;
        if (!HOLDS) load_keys(key);
        if constexpr (STARTS) {
          const int own_key = first + warp * ROWS_OF_WARP;
          begin_scores<KIND, true>(scores, p.bias_starts, image, head, own_key, query, lane);
          add_scores<T, D>(scores, key, scores_from, at);
          finish_scores<KIND, true>(scores, p, image, head, own_key, query, lane);
        } else {
          multiply_scores<T, D>(scores, key, scores_from, at);
        }
        if (!HOLDS) Base::load_own(value, value_rows);
        multiply_scores<T, D>(grad_scores, value, scores_from, at + Tile::bytes(STEP));
        const uint32_t terms = stage(step) + 2 * Tile::bytes(STEP) + 16 * tile * sizeof(RowTermOf<T>);
        find_grad_scores<0>(scores, grad_scores, terms);
        find_grad_scores<1>(scores, grad_scores, terms);
        add_product<T, D>(grad_value, scores, sums_from, at + Tile::bytes(STEP));
        add_product<T, D>(grad_key, grad_scores, sums_from, at);
      }
    }
    if (!works) return;
    uint32_t to[D / 8];
    find_sums<T, D>(to, Base::own(shared), lane);
    float scale[M][2], one[M][2];
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) scale[i / 2][i % 2] = p.scale, one[i / 2][i % 2] = 1.0f;
    Base::write_own(grad_key, scale, to, 0, p.grad_key, p.keys, 0);
    Base::write_own(grad_value, one, to, Tile::bytes(ROWS_OF_BLOCK), p.grad_value, p.keys, 1);
  }

  __device__ void load_keys(Fragment (&key)[M][D / 16]) const {
    Base::load_own(key, shared);
    if (STARTS) flip(key, p.flipped);
  }

  // Probabilities in place of scores of keys and 8 queries, the lower or upper ones of 16, and gradients of scores in
  // place of those of probabilities.
  template <int HALF>
  __device__ void find_grad_scores(Scores<M>& scores, Scores<M>& grad_scores, uint32_t terms) const {
    constexpr int BYTES = sizeof(RowTermOf<T>), WORDS = 2 * BYTES / 16;
    uint4 words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = load_shared(terms + (8 * HALF + lane % 4 * 2) * BYTES + 16 * i);
    const RowTermOf<T>(&term)[2] = reinterpret_cast<const RowTermOf<T>(&)[2]>(words);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float &score = scores[m][HALF][i], &grad = grad_scores[m][HALF][i];
        score = apply(term[i % 2], exp2_of(fmaf(score, p.unit, -term[i % 2].log_sum_exp)));
        grad = score * (grad - term[i % 2].row_sum);
      }
    }
  }
};

// All three where there are at most ROWS queries and keys: a block has a head. Its warps form P and dS for their
// queries, exchange them through shared memory, and multiply those of their keys. A block has that head of several
// windows, one after the other, and sums dS in registers, which is the gradient of the bias.
template <class T, int D, Kind KIND, int ROWS>
struct HeadKernel : QueryRows<T, D, KIND, ROWS> {
  using Base = QueryRows<T, D, KIND, ROWS>;
  using Base::M, Base::ROWS_OF_WARP, Base::NORMALISES, Base::STARTS, Base::WINDOWS;
  using Base::p, Base::shared, Base::lane, Base::warp, Base::image, Base::head;
  using typename Base::Tile;
  using Square = SharedRows<T, ROWS>;
  static constexpr int TILES = ROWS / 16;
  // Whether dS waits in registers until P, which it takes the place of, has been read.
  static constexpr bool WAITS = ROWS > ROWS_OF_BLOCK;
  static constexpr int BLOCKS = WAITS ? 1 : cuda::BLOCKS;
  // Queries, gradients, keys and values, then P and dS, at first the output.
  static constexpr int TILE_BYTES = Tile::bytes(ROWS), SQUARE_BYTES = Square::bytes(ROWS);
  static constexpr int GRAD_AT = WAITS ? 0 : SQUARE_BYTES;
  static constexpr int KEYS_AT = 2 * TILE_BYTES, VALUES_AT = 3 * TILE_BYTES, SQUARES_AT = 4 * TILE_BYTES;
  static constexpr int SHARED_BYTES = SQUARES_AT + GRAD_AT + SQUARE_BYTES;
  static_assert(TILE_BYTES <= GRAD_AT + SQUARE_BYTES, "the output has room");

  // Of windows the sum of dS: of this warp's queries and 16 keys each.
  using GradBias = Scores<M>[TILES];
  // P or dS of this warp's queries and 16 keys, as the left factor of a product.
  using Packed = Fragment[M];

  using Base::Base;

  __device__ void run() {
    GradBias grad_bias;
    if constexpr (WINDOWS) {
      run_windows(grad_bias);
    } else {
      run_head(grad_bias);
    }
  }

  __device__ void run_windows(GradBias& grad_bias) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) clear(grad_bias[tile]);
    const unsigned sum = image, end = unsigned(min(p.batch, (int64_t(sum) + 1) * p.images_of_sum));
    for (image = sum * p.images_of_sum;;) {
      run_head(grad_bias);
      if (++image == end) break;
      // Nobody reads what the next window overwrites any more.
      __syncthreads();
    }
    if (p.bias_sums == nullptr) return;
    float* to = p.bias_sums + (int64_t(sum) * p.heads + head) * p.queries * p.keys;
#pragma unroll
    for (int row = 0; row < 2 * M; ++row) {
      const int query = warp * ROWS_OF_WARP + 8 * row + lane / 4, keys = p.keys - lane % 4 * 2;
      if (query >= p.queries) break;
      float* own = to + (query * p.keys + lane % 4 * 2);
#pragma unroll
      for (int i = 0; i < ROWS / 4; ++i) {
        const int key = i / 2 * 8 + i % 2;
        if (key < keys) own[key] = grad_bias[i / 4][row / 2][i / 2 % 2][row % 2 * 2 + i % 2];
      }
    }
  }

  __device__ void run_head(GradBias& grad_bias) const {
    const uint32_t squares = shared + SQUARES_AT;
    Base::load_rows(squares);
    Base::template load<ROWS, true>(shared + KEYS_AT, p.key, 0, p.keys, 1);
    Base::template load<ROWS, true>(shared + VALUES_AT, p.value, 0, p.keys, 2);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    uint32_t sums_from[D / 16], square_to[ROWS / 8];
    find_rows<T, D>(sums_from, shared, lane);
    find_sums<T, ROWS>(square_to, squares + Square::bytes(warp * ROWS_OF_WARP), lane);
    float sum[M][D / 8][4], factor[M][2];
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) factor[i / 2][i % 2] = p.scale;
    clear(sum);
    Packed waiting[WAITS ? TILES : 1];
    multiply_queries(squares, square_to, sums_from, sum, grad_bias, waiting);
    __syncthreads();
    // The tile of values is free for what is to be written.
    uint32_t to[D / 8];
    find_sums<T, D>(to, Base::own(shared), lane);
    if (!WAITS) Base::write_own(sum, factor, to, VALUES_AT, p.grad_query, p.queries);
    multiply_rows(squares, sums_from, TILE_BYTES, sum);
    float one[M][2];
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) one[i / 2][i % 2] = 1.0f;
    Base::write_own(sum, one, to, VALUES_AT, p.grad_value, p.keys, 1);
    if constexpr (WAITS) {
      // Nobody reads P any more.
      __syncthreads();
      if (has_queries()) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) store(waiting[tile], square_to, 0, tile);
      }
      __syncthreads();
      if (has_queries()) {
        multiply_square(squares, sums_from, sum);
        Base::write_own(sum, factor, to, VALUES_AT, p.grad_query, p.queries);
      }
    }
    multiply_rows(squares + GRAD_AT, sums_from, 0, sum);
    Base::write_own(sum, factor, to, VALUES_AT, p.grad_key, p.keys, 0);
  }

  // Whether this warp forms scores. Where there are only two warps it is not worth asking.
  __device__ bool has_queries() const { return !WAITS || warp * ROWS_OF_WARP < p.queries; }

  // P and dS of this warp's queries, and dQ, which lacks `factor`, unless dS WAITS.
  __device__ void multiply_queries(uint32_t squares, const uint32_t (&square_to)[ROWS / 8],
                                   const uint32_t (&sums_from)[D / 16], float (&sum)[M][D / 8][4], GradBias& grad_bias,
                                   Packed (&waiting)[WAITS ? TILES : 1]) const {
    Fragment query[M][D / 16], grad[M][D / 16];
    Base::load_queries(query);
    Base::load_own(grad, shared + TILE_BYTES);
    RowTermOf<T> terms[M][2];
    Base::find_row_terms(grad, squares, terms);
    uint32_t scores_from[D / 16];
    find_rows_of_scores<T, D>(scores_from, shared, lane);
    // Nobody reads the output any more.
    __syncthreads();
    if (!has_queries()) return;
    const int tiles = (p.keys + 15) / 16;
    float total[M][2] = {};
    if (NORMALISES) {
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        Scores<M> scores;
        Base::multiply_keys(scores, query, scores_from, KEYS_AT + Tile::bytes(16 * tile), 16 * tile);
        Base::template exponentiate<true>(scores, terms, 16 * tile, total);
      }
      Base::normalise(terms, total);
    }
    if (!WINDOWS && p.bias_sums != nullptr) Base::write_row_terms(terms);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      // There is one, as the compiler can't know.
      if (tile > 0 && tile >= tiles) break;
      const uint32_t at = KEYS_AT + Tile::bytes(16 * tile);
      Scores<M> scores, grad_scores;
      // What sums up and what waits leave no registers to hold these.
      if (WAITS) Base::load_queries(query);
      Base::multiply_keys(scores, query, scores_from, at, 16 * tile);
      if (WAITS) Base::load_own(grad, shared + TILE_BYTES);
      Base::multiply_values(grad_scores, grad, terms, scores_from, at + TILE_BYTES);
      if (STARTS || 16 * tile + 16 <= p.keys) {
        Base::template exponentiate<false>(scores, terms, 16 * tile, total);
      } else {
        Base::template exponentiate<true>(scores, terms, 16 * tile, total);
      }
#pragma unroll
      for (int i = 0; i < 8 * M; ++i) {
        float& probability = scores[i / 8][i / 4 % 2][i % 4];
        probability = apply(terms[i / 8][i / 2 % 2], probability);
      }
      multiply_elements(grad_scores, scores);
      if (WINDOWS) {
#pragma unroll
        for (int i = 0; i < 8 * M; ++i)
          grad_bias[tile][i / 8][i / 4 % 2][i % 4] += grad_scores[i / 8][i / 4 % 2][i % 4];
      }
      Packed probabilities;
      Packed& grad_packed = waiting[WAITS ? tile : 0];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        probabilities[m] = pack_scores<T>(scores[m]), grad_packed[m] = pack_scores<T>(grad_scores[m]);
      }
      store(probabilities, square_to, 0, tile);
      if (WAITS) continue;
      store(grad_packed, square_to, GRAD_AT, tile);
      add_product<T, D>(sum, grad_packed, sums_from, at);
    }
  }

  static __device__ void store(const Packed& packed, const uint32_t (&to)[ROWS / 8], uint32_t offset, int tile) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const uint32_t low = to[2 * tile] + (offset + Square::bytes(16 * m));
      const uint32_t high = to[2 * tile + 1] + (offset + Square::bytes(16 * m));
      store_shared(low, packed[m].x);
      store_shared(low + Square::bytes(8), packed[m].y);
      store_shared(high, packed[m].z);
      store_shared(high + Square::bytes(8), packed[m].w);
    }
  }

  // sum = dS of this warp's queries, which the square has now, times the keys.
  __device__ void multiply_square(uint32_t square, const uint32_t (&sums_from)[D / 16],
                                  float (&sum)[M][D / 8][4]) const {
    clear(sum);
    const uint32_t from = square + Square::at(warp * ROWS_OF_WARP + lane % 16, lane / 16);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (tile > 0 && 16 * tile >= p.keys) break;
      const Packed left = {load_matrices(from + 32 * tile)};
      add_product<T, D>(sum, left, sums_from, KEYS_AT + Tile::bytes(16 * tile));
    }
  }

  // sum = the transposed square, of this warp's keys, times the rows `offset` bytes behind the queries.
  __device__ void multiply_rows(uint32_t square, const uint32_t (&sums_from)[D / 16], uint32_t offset,
                                float (&sum)[M][D / 8][4]) const {
    clear(sum);
    uint32_t from[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      from[m] = square + Square::at(lane % 8 + lane / 16 * 8, 2 * (warp * M + m) + lane / 8 % 2);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (tile > 0 && 16 * tile >= p.queries) break;
      Fragment left[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (warp * ROWS_OF_WARP + 16 * m < p.keys) {
          left[m] = load_matrices_transposed(from[m] + Square::bytes(16 * tile));
        }
      }
      add_product<T, D>(sum, left, sums_from, offset + Tile::bytes(16 * tile));
    }
  }
};

// The sum of dS over images, and over heads if they share the bias: a block has 64 queries, a warp 16 of them, and 64
// keys; images and heads pass by in order.
template <class T, int D, Kind KIND>
struct BiasKernel {
  static constexpr bool WINDOWS = KIND == Kind::windows;
  using Tile = SharedRows<T, D>;
  static constexpr int ROWS_OF_WARP = 16, THREADS = ROWS_OF_BLOCK / ROWS_OF_WARP * 32;
  static constexpr int TILE_BYTES = Tile::bytes(ROWS_OF_BLOCK);
  static constexpr int SHARED_BYTES = 4 * TILE_BYTES;
  // Whether registers hold a warp's queries while its keys pass by.
  static constexpr bool HOLDS = D <= 64;

  const Backward& p;
  const uint32_t shared;

  __device__ void run() const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned query_blocks = p.query_blocks.divisor, key_blocks = p.key_blocks.divisor;
    const int first_query = int(blockIdx.x % query_blocks) * ROWS_OF_BLOCK;
    const unsigned rest = blockIdx.x / query_blocks;
    const int first_key = int(rest % key_blocks) * ROWS_OF_BLOCK;
    const int64_t sum_number = rest / key_blocks;  // sum and head of the bias
    const int first_image = int(sum_number / p.bias_heads) * p.images_of_sum;
    const int images = int(min(int64_t(p.images_of_sum), p.batch - first_image));
    const int first_head = int(sum_number % p.bias_heads), heads = p.bias_heads == 1 ? p.heads : 1;
    const int own_query = first_query + warp * ROWS_OF_WARP;

    uint32_t own_from[D / 16], scores_from[D / 16];
    find_rows<T, D>(own_from, shared + Tile::bytes(warp * ROWS_OF_WARP), lane);
    find_rows_of_scores<T, D>(scores_from, shared, lane);
    Scores<1> sum[ROWS_OF_BLOCK / 16];
#pragma unroll
    for (int tile = 0; tile < ROWS_OF_BLOCK / 16; ++tile) clear(sum[tile]);
    for (int pass = 0; pass < images * heads; ++pass) {
      const int image = first_image + pass / heads, head = first_head + pass % heads;
      __syncthreads();
      load<false>(0, p.query, 0, image, head, first_query, p.queries);
      load<false>(1, p.grad_output, 0, image, head, first_query, p.queries);
      load<true>(2, p.key, 1, image, head, first_key, p.keys);
      load<true>(3, p.value, 2, image, head, first_key, p.keys);
      commit_copies();
      const RowTermOf<T>* own_terms = static_cast<const RowTermOf<T>*>(p.row_terms) +
                                      (int64_t(image) * p.heads + head) * padded(p.queries) + own_query + lane / 4;
      const RowTermOf<T> terms[2] = {own_terms[0], own_terms[8]};
      wait_for_copies<0>();
      __syncthreads();
      Fragment query[1][D / 16], grad[1][D / 16];
#pragma unroll
      for (int tile = 0; tile < ROWS_OF_BLOCK / 16; ++tile) {
        if (tile == 0 || !HOLDS) {
#pragma unroll
          for (int i = 0; i < D / 16; ++i) {
            query[0][i] = load_matrices(own_from[i]);
            grad[0][i] = load_matrices(own_from[i] + TILE_BYTES);
          }
          flip(query, p.flipped);
        }
        Scores<1> scores, grad_scores;
        const int key = first_key + 16 * tile;
        begin_scores<KIND, false>(scores, p.bias_starts, image, head, own_query, key, lane);
        add_scores<T, D>(scores, query, scores_from, 2 * TILE_BYTES + Tile::bytes(16 * tile));
        finish_scores<KIND, false>(scores, p, image, head, own_query, key, lane);
        multiply_scores<T, D>(grad_scores, grad, scores_from, 3 * TILE_BYTES + Tile::bytes(16 * tile));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const RowTermOf<T>& term = terms[i / 2 % 2];
          const float probability = apply(term, exp2_of(fmaf(scores[0][i / 4][i % 4], p.unit, -term.log_sum_exp)));
          sum[tile][0][i / 4][i % 4] += probability * (grad_scores[0][i / 4][i % 4] - term.row_sum);
        }
      }
    }
    float* to = p.bias_sums + sum_number * p.queries * p.keys;
#pragma unroll
    for (int tile = 0; tile < ROWS_OF_BLOCK / 16; ++tile) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int of_query = own_query + lane / 4 + i / 2 % 2 * 8;
        const int of_key = first_key + 16 * tile + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (of_query < p.queries && of_key < p.keys) {
          to[int64_t(of_query) * p.keys + of_key] = sum[tile][0][i / 4][i % 4];
        }
      }
    }
  }

  // `number`: 1 and 2 of keys and values, which PAD windows.
  template <bool PADS>
  __device__ void load(int tile, const Rows& rows, int number, int image, int head, int first, int end) const {
    const uint32_t to = shared + tile * TILE_BYTES;
    const Window window(p.windows, image);
    const char* start = rows.data + uint64_t(WINDOWS ? window.image : unsigned(image)) * uint32_t(rows.image) +
                        uint64_t(head) * uint32_t(rows.head);
    if constexpr (WINDOWS) {
      const char* padding = p.windows.padding + uint64_t(number * p.heads + head) * unsigned(D * sizeof(T));
      WindowSource<Tile, ROWS_OF_BLOCK, THREADS, PADS>(window, first, start, int(rows.row), padding).copy(to);
    } else {
      typename Tile::template Source<ROWS_OF_BLOCK, THREADS, false>(start, int(rows.row), first, end).copy(to);
    }
  }
};

template <class Kernel>
__device__ void run(const Backward& p) {
  extern __shared__ __align__(256) unsigned char shared[];
  Kernel{p, uint32_t(__cvta_generic_to_shared(shared))}.run();
}
// Names that a profiler shows.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, BLOCKS)
    attention_backward_queries(const __grid_constant__ Backward p) {
  run<Kernel>(p);
}
template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, BLOCKS) attention_backward_keys(const __grid_constant__ Backward p) {
  run<Kernel>(p);
}
template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, Kernel::BLOCKS)
    attention_backward_head(const __grid_constant__ Backward p) {
  run<Kernel>(p);
}
template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, BLOCKS) attention_backward_bias(const __grid_constant__ Backward p) {
  run<Kernel>(p);
}

template <class Head>
void launch_head(int64_t blocks, const Backward& p, cudaStream_t stream) {
  launch<Head>(attention_backward_head<Head>, "attention_backward_head", blocks, p, stream);
}

template <class T, int D, Kind KIND>
void launch_kernels(const Backward& p, cudaStream_t stream) {
  using Queries = QueriesKernel<T, D, KIND>;
  using Keys = KeysKernel<T, D, KIND>;
  // A bias comes with offsets, but for windows.
  using Bias = BiasKernel<T, D, KIND == Kind::windows ? Kind::windows : Kind::offsets>;
  const int64_t heads = p.batch * p.heads, query_blocks = p.query_blocks.divisor, key_blocks = p.key_blocks.divisor;
  if constexpr (KIND == Kind::windows) {
    const int64_t blocks = (p.batch + p.images_of_sum - 1) / p.images_of_sum * p.heads;
    if (p.queries <= ROWS_OF_BLOCK) return launch_head<HeadKernel<T, D, KIND, ROWS_OF_BLOCK>>(blocks, p, stream);
    if (p.queries <= ROWS_OF_WINDOW) return launch_head<HeadKernel<T, D, KIND, ROWS_OF_WINDOW>>(blocks, p, stream);
  }
  if (KIND != Kind::windows && query_blocks == 1 && key_blocks == 1) {
    launch_head<HeadKernel<T, D, KIND, ROWS_OF_BLOCK>>(heads, p, stream);
  } else {
    launch<Queries>(attention_backward_queries<Queries>, "attention_backward_queries", query_blocks * heads, p, stream);
    launch<Keys>(attention_backward_keys<Keys>, "attention_backward_keys", key_blocks * heads, p, stream);
  }
  if (p.bias_sums != nullptr) {
    const int64_t sums = (p.batch + p.images_of_sum - 1) / p.images_of_sum * p.bias_heads;
    launch<Bias>(attention_backward_bias<Bias>, "attention_backward_bias", query_blocks * key_blocks * sums, p, stream);
  }
}

}  // namespace

void backward(const Backward& arguments, cudaStream_t stream) {
  Backward p = arguments;
  p.query_blocks = Divisor(padded(p.queries) / ROWS_OF_BLOCK);
  p.key_blocks = Divisor(padded(p.keys) / ROWS_OF_BLOCK);
  p.heads_of_image = Divisor(p.heads);
  prepare(p, stream);
  if (launch_on_hopper(p, stream)) return;
  if (p.windows.places != nullptr) {
    return with_dtype(
        p, [&](auto type) { launch_kernels<decltype(type), HEAD_DIM_OF_WINDOWS, Kind::windows>(p, stream); });
  }
  with_types(p, [&](auto type, auto head_dim) {
    using T = decltype(type);
    if (p.bias_starts.data != nullptr) {
      launch_kernels<T, head_dim(), Kind::offsets>(p, stream);
    } else {
      launch_kernels<T, head_dim(), Kind::plain>(p, stream);
    }
  });
}

}  // namespace tlalign::cuda
