// The forward: A.V and mean_h(A).share in one pass, on tensor cores of Ampere and newer (mma.sync).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cuda/attention.h"
#include "cuda/hopper.h"
#include "cuda/launch.h"
#include "cuda/scores.h"
#include "cuda/tiles.h"
#include "cuda/windows.h"

namespace tlalign::cuda {
namespace {

constexpr int QUERIES_OF_WARP = 16;
// Blocks take more than one head in turn if at least so many blocks remain: a few times what a GPU holds at once.
constexpr int FEW_BLOCKS = 2048;

// Keys that there are at least where one step has all of them in so many tiles of 16: see launch_for_keys.
constexpr int least_keys(int tiles) {
  return tiles == 13 ? 193 : tiles == 12 ? 129 : tiles == 8 ? 65 : tiles == 4 ? 33 : 1;
}

// Threads of a block of the two small kernels; blocks_of(row, SMALL) of them have an image.
constexpr unsigned SMALL = 64;

constexpr __host__ __device__ unsigned blocks_of(unsigned threads, unsigned of_block) {
  return (threads + of_block - 1) / of_block;
}

// share = hi + mid + lo: rows of parts, zeros from key Nk on. In windows zeros in the padding, too, and a last row with
// ones elsewhere.
template <class T, bool WINDOWS>
__global__ void pack_labels(const __grid_constant__ Forward p) {
  const unsigned row = padded(p.keys), blocks = row / SMALL, image = blockIdx.x / blocks;
  const unsigned key = blockIdx.x % blocks * SMALL + threadIdx.x;
  T* part = static_cast<T*>(p.parts) + uint64_t(image * (p.sources * PARTS + WINDOWS)) * row + key;
  bool is_real = key < p.keys;
  uint64_t token = uint64_t(image) * p.keys + key;
  if (WINDOWS) {
    const Window window(p.windows, image);
    is_real = window.has(key);
    token = window.token_of_all(key);
  }
  const float* share = p.share + token * p.sources;
#pragma unroll 1
  for (int source = 0; source < p.sources; ++source) {
    float rest = is_real ? share[source] : 0.0f;
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      const T rounded = from_float<T>(rest);
      *part = rounded;
      part += row;
      rest -= to_float(rounded);
    }
  }
  if (WINDOWS) *part = from_float<T>(is_real ? 1.0f : 0.0f);
}

// The mean over the heads in which a query sees a key, in fixed order, averaged with the residual. Each row of
// head_share is the sum of the heads that a block had. `MASKED`: a query may see no key.
template <bool MASKED>
__global__ void average_heads(const __grid_constant__ Forward p) {
  const unsigned queries = p.queries, blocks = blocks_of(queries, SMALL), image = blockIdx.x / blocks;
  const unsigned query = blockIdx.x % blocks * SMALL + threadIdx.x;
  if (query >= queries) return;
  int seeing = p.heads;
  if (MASKED) {
    const float* log_sum_exp = p.log_sum_exp + uint64_t(image) * p.heads * queries + query;
    seeing = 0;
    for (int head = 0; head < p.heads; ++head, log_sum_exp += queries) seeing += *log_sum_exp != -INFINITY;
  }
  const float own = p.residual == nullptr ? 0.0f : seeing > 0 ? 0.5f : 1.0f;
  const float mixed = seeing > 0 ? __fdividef(1.0f - own, float(seeing)) : 0.0f;
  const uint64_t out = (uint64_t(image) * queries + query) * p.sources;
#pragma unroll 1
  for (int source = 0; source < p.sources; ++source) {
    const float* share = p.head_share + (uint64_t(image) * p.turns.divisor * p.sources + source) * queries + query;
    float sum = 0.0f;
#pragma unroll 4
    for (unsigned turn = 0; turn < p.turns.divisor; ++turn, share += uint64_t(queries) * p.sources) sum += *share;
    sum *= mixed;
    if (p.residual != nullptr) sum = fmaf(p.residual[out + source], own, sum);
    p.share_out[out + source] = sum;
  }
}

// The same for windows, where the mean is over the labels that there are: divided by their part of the attention, which
// is the last row of head_share.
__global__ void average_heads_of_windows(const __grid_constant__ Forward p) {
  const unsigned queries = p.queries, blocks = blocks_of(queries, SMALL), image = blockIdx.x / blocks;
  const unsigned query = blockIdx.x % blocks * SMALL + threadIdx.x;
  const Window window(p.windows, image);
  if (!window.has(query)) return;
  const uint64_t out = window.token_of_all(query) * p.sources;
  const unsigned turns = p.turns.divisor, rows = p.sources + 1;
  const float* shares = p.head_share + uint64_t(image) * turns * rows * queries + query;
  const auto sum_of = [&](unsigned source) {
    float sum = 0.0f;
#pragma unroll 4
    for (unsigned turn = 0; turn < turns; ++turn) sum += shares[(uint64_t(turn) * rows + source) * queries];
    return sum;
  };
  const float real = sum_of(p.sources);
  const float own = p.residual == nullptr ? 0.0f : real > 0.0f ? 0.5f : 1.0f;
  const float mixed = real > 0.0f ? (1.0f - own) / real : 0.0f;
#pragma unroll 1
  for (int source = 0; source < p.sources; ++source) {
    float sum = sum_of(source) * mixed;
    if (p.residual != nullptr) sum = fmaf(p.residual[out + source], own, sum);
    p.share_out[out + source] = sum;
  }
}

// output = softmax(scale Q K^T + bias + mask) V: a block has 16 queries of a head for each of its WARPS, and all keys
// pass by in steps of TILES x 16. If one step has them all (STREAMS is false) the softmax is exact in one pass, else
// online. Where there are few, a block goes on to the next head, whose Q, K and V come while it is busy with this one.
// Registers hold Q, the scores of a step, and the sums of P V and P [1, share]; shared memory holds K, V and
// the labels of a step, of two if steps pass by. Reads Q once, K and V once a block; writes O, the log-sum-exp and the
// shares of the head. = reference.forward, but for the mean over heads.
template <class T, int D, int TILES, int WARPS, bool STREAMS, Kind KIND, int LABEL_BLOCKS>
struct ForwardKernel {
  using Tile = SharedRows<T, D>;
  static constexpr bool OFFSETS = KIND == Kind::offsets, WINDOWS = KIND == Kind::windows;
  // Whether a query may see no key. Windows have a bias, too.
  static constexpr bool MASKED = KIND != Kind::plain;
  static constexpr int THREADS = 32 * WARPS, QUERIES = QUERIES_OF_WARP * WARPS;
  static constexpr int KEYS = 16 * TILES;
  static constexpr int STAGES = STREAMS ? 2 : 1;
  // Few keys, as in windows: a block takes several heads in turn, which share addresses and labels. Not with offsets,
  // beside which these are little: rather have more warps to wait for them.
  static constexpr bool TURNS = !STREAMS && !OFFSETS && TILES <= 4;
  // Rows that are known to be there, and tiles that are not asked whether they have keys.
  static constexpr int CERTAIN_KEYS = STREAMS ? 0 : least_keys(TILES) - 1;
  static constexpr int CERTAIN_TILES = STREAMS ? 1 : TURNS ? TILES : CERTAIN_KEYS / 16 + 1;
  // Labels lie in shared memory as rows of a column each, ones and the parts of the shares: 16-byte chunks of 8 keys,
  // an odd number of them, so that 8 rows begin in different banks.
  static constexpr int LABEL_ROWS = 1 + PARTS * 2 * LABEL_BLOCKS + WINDOWS;
  static constexpr int LABEL_CHUNKS = 2 * ((TILES + 1) / 2 * 2);
  static constexpr int LABEL_PITCH = 16 * (LABEL_CHUNKS + 1);
  static_assert(LABEL_CHUNKS <= 32, "a warp has a row in one go");
  static constexpr int LABEL_BYTES =
      (LABEL_ROWS * LABEL_PITCH + Tile::ALIGNMENT - 1) / Tile::ALIGNMENT * Tile::ALIGNMENT;
  static constexpr int STAGE_BYTES = 2 * Tile::bytes(KEYS) + LABEL_BYTES;
  // Blocks that the registers of a multiprocessor are to hold at once.
  static constexpr bool IS_WIDE = D > 64 || (WINDOWS && D > 32);
  static constexpr int BLOCKS = WARPS > 4 || D > 64 || (STREAMS && (OFFSETS || LABEL_BLOCKS > 1 || IS_WIDE)) ? 2
                                : STREAMS || TILES > 8 || IS_WIDE                                            ? 3
                                : TURNS && D <= 32 && !WINDOWS                                               ? 5
                                                                                                             : 4;
  // The output passes through shared memory: that of the queries, unless the next ones are already coming.
  static constexpr int END_OF_STAGES = Tile::bytes(QUERIES) + STAGES * STAGE_BYTES;
  static constexpr int OUTPUT_AT = TURNS ? END_OF_STAGES : 0;
  static constexpr int SHARED_BYTES = END_OF_STAGES + (TURNS ? Tile::bytes(QUERIES) : sizeof(uint4));

  // Labels as the right factors of products, for two tiles each. Column 0 is that of the ones, column 4 s + i that of
  // part i = 1, 2, 3 of source s. Of windows column 4 says which keys have labels.
  using Labels = Fragment[(TILES + 1) / 2][LABEL_BLOCKS];
  struct Stage {
    uint32_t key, value, label;
  };
  template <int ROWS, bool REPEATS, int CERTAIN, bool PADS>
  using Source = std::conditional_t<WINDOWS, WindowSource<Tile, ROWS, THREADS, PADS>,
                                    typename Tile::template Source<ROWS, THREADS, REPEATS, CERTAIN>>;
  using Queries = Source<QUERIES, false, 0, false>;
  // Rows of K from key Nk on repeat the last one, so that the maxima are those of the real keys; V, and the column of
  // ones, are zero there. So no score needs a mask. In windows scores begin with -inf there.
  using Keys = Source<KEYS, true, CERTAIN_KEYS, true>;
  using Values = Source<KEYS, false, CERTAIN_KEYS, true>;

  // Where a thread writes what there is one number of for each query: even threads for the first of their rows, odd ones
  // for the second.
  struct Numbers {
    unsigned lane, query;
    bool is_query;
    float* log_sum_exp;

    // `row`: the first query of the warp. `pair`: the number of the head among those of all images.
    __device__ Numbers(const Forward& p, unsigned pair, unsigned row, unsigned lane)
        : lane(lane), query(row + lane / 4 + lane % 2 * 8) {
      is_query = query < p.queries;
      log_sum_exp = p.log_sum_exp + (uint64_t(pair) * unsigned(p.queries) + query);
    }
  };

  // Where a warp writes to.
  struct Destination : Numbers {
    using Rows = std::conditional_t<WINDOWS, WindowTarget<Tile, QUERIES_OF_WARP>,
                                    typename Tile::template Target<QUERIES_OF_WARP>>;
    static constexpr int ROWS = QUERIES_OF_WARP;

    uint32_t words;  // in shared memory: the first of this thread's
    Rows rows;       // of the output

    __device__ Destination(const ForwardKernel& k, unsigned thread)
        : Numbers(k.p, TURNS ? k.image * k.p.heads + k.head : k.turn, k.first + thread / 32 * ROWS, thread % 32),
          words(k.shared + OUTPUT_AT + thread / 32 * Tile::bytes(ROWS)),
          rows(rows_of(k, thread, words, thread % 32)) {
      words += Tile::at(thread % 32 / 4, 0) + thread % 4 * 4;
    }

    static __device__ Rows rows_of(const ForwardKernel& k, unsigned thread, uint32_t words, unsigned lane) {
      char* output = static_cast<char*>(k.p.output);
      const int row_bytes = k.p.heads * int(D * sizeof(T));
      if constexpr (WINDOWS) {
        const Window window = k.window();
        output += (window.first_token() * unsigned(k.p.heads) + k.head) * (D * sizeof(T));
        return Rows(window, k.first + thread / 32 * ROWS, output, row_bytes, words, lane);
      } else {
        output += ((uint64_t(k.image) * unsigned(k.p.queries) + k.first + thread / 32 * ROWS) * unsigned(k.p.heads) +
                   k.head) *
                  (D * sizeof(T));
        return Rows(output, row_bytes, k.p.queries - k.first - int(thread / 32 * ROWS), words, lane);
      }
    }
  };

  const Forward& p;
  const uint32_t shared;
  const int lane = threadIdx.x % 32;
  // The same in all threads of a warp, as the compiler sees now.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  int first;  // query of the block
  unsigned turn, image, head;

  __device__ Stage stage(int number) const {
    const uint32_t at = shared + Tile::bytes(QUERIES) + number % STAGES * STAGE_BYTES;
    return {at, at + Tile::bytes(KEYS), at + 2 * Tile::bytes(KEYS)};
  }

  __device__ Window window() const { return Window(p.windows, image); }
  __device__ const char* start(const Rows& rows) const {
    return rows.data + (WINDOWS ? window().image : image) * rows.image + head * rows.head;
  }
  // `number`: 0, 1 and 2 of query, key and value.
  template <class Source>
  __device__ Source source(const Rows& rows, int number, int row, int end) const {
    if constexpr (WINDOWS) {
      const char* padding = p.windows.padding + uint64_t(number * p.heads + head) * unsigned(D * sizeof(T));
      return Source(window(), row, start(rows), int(rows.row), padding);
    } else {
      return Source(start(rows), int(rows.row), row, end);
    }
  }
  __device__ Queries queries() const { return source<Queries>(p.query, 0, first, p.queries); }
  __device__ Keys keys(int step) const { return source<Keys>(p.key, 1, step * KEYS, p.keys); }
  __device__ Values values(int step) const { return source<Values>(p.value, 2, step * KEYS, p.keys); }
  // Rows of the labels: ones, parts, and of windows what says where there are labels.
  __device__ int label_rows() const { return 1 + p.sources * PARTS + (WINDOWS && p.sources > 0); }

  __device__ void load_labels(int step) const { load_labels(stage(step).label, step); }
  __device__ void load_labels(uint32_t to, int step) const {
    // Warps take rows in turn, a thread 8 keys of each.
    const int rows = label_rows(), row_length = padded(p.keys), key = step * KEYS + 8 * lane;
    if (lane >= LABEL_CHUNKS) return;
    const uint32_t to_row = to + lane * 16;
    if (warp == 0) {
      const uint32_t ones = pack<T>(1.0f, 1.0f), one = ones & 0xffff;
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = p.keys > key + 2 * i + 1 ? ones : p.keys > key + 2 * i ? one : 0;
      store_shared(to_row, make_uint4(words[0], words[1], words[2], words[3]));
    }
    const T* parts = static_cast<const T*>(p.parts) + key;
#pragma unroll 1
    for (int row = warp > 0 ? warp : WARPS; row < rows; row += WARPS) {
      copy_async(to_row + row * LABEL_PITCH, parts + uint64_t(image * (rows - 1) + row - 1) * unsigned(row_length),
                 key < row_length);
    }
  }

  __device__ void run() {
    turn = p.blocks.quotient(blockIdx.x);
    first = (blockIdx.x - turn * p.blocks.divisor) * QUERIES;
    image = p.turns.quotient(turn);
    head = (turn - image * p.turns.divisor) * (TURNS ? p.heads_of_block : 1);
    const Queries query_rows = queries();
    const Keys key_rows = keys(0);
    const Values value_rows = values(0);
    query_rows.copy(shared);
    key_rows.copy(stage(0).key);
    if (TURNS) load_labels(0);
    commit_copies();
    value_rows.copy(stage(0).value);
    if (!TURNS) load_labels(0);
    commit_copies();
    if constexpr (STREAMS) {
      take_steps();
    } else if constexpr (TURNS) {
      take_heads(query_rows, key_rows, value_rows);
    } else {
      take_head();
    }
  }

  // A warp without queries helps to load, no more.
  __device__ bool works() const { return first + warp * QUERIES_OF_WARP < p.queries; }

  __device__ void take_steps() const {
    Fragment query[D / 16], weights[TILES];
    Labels labels;
    float scores[2 * TILES][4], output[D / 8][4], label[LABEL_BLOCKS][4];
    float highest[2] = {-INFINITY, -INFINITY};
    const int steps = (p.keys + KEYS - 1) / KEYS;
    for (int step = 0; step < steps; ++step) {
      if (WINDOWS && works()) read_starts(scores, find_starts(step), step);
      wait_for_copies<1>();
      __syncthreads();
      if (works()) {
        if (step == 0) read_queries(query, query_address());
        multiply_keys(query, scores, step, key_address(step));
        if (WINDOWS) add_regions(scores, find_regions(step), step);
      }
      if (step + 1 < steps) keys(step + 1).copy(stage(step + 1).key);
      commit_copies();
      if (works()) exponentiate(scores, weights, highest, output, label, step);
      wait_for_copies<1>();
      __syncthreads();
      if (works()) multiply_values(weights, output, label, labels, step, value_address(step));
      if (step + 1 < steps) {
        values(step + 1).copy(stage(step + 1).value);
        load_labels(step + 1);
      }
      commit_copies();
    }
    if (works()) write_all(output, label, highest, Destination(*this, threadIdx.x));
  }

  __device__ void take_head() {
    Fragment query[D / 16], weights[TILES];
    Labels labels;
    float scores[2 * TILES][4], output[D / 8][4], label[LABEL_BLOCKS][4], highest[2];
    const bool works = this->works();
    // Where the block is, so that no registers keep it where most of them are needed.
    if (threadIdx.x == 0) store_shared(shared + END_OF_STAGES, make_uint4(turn, first, image, head));
    wait_for_copies<1>();
    __syncthreads();
    if (works) {
      read_queries(query, query_address());
      multiply_keys(query, scores, 0, key_address(0));
      exponentiate(scores, weights, highest, output, label, 0);
    }
    wait_for_copies<0>();
    __syncthreads();
    if (!works) return;
    multiply_values(weights, output, label, labels, 0, value_address(0));
    const uint4 place = load_shared(shared + END_OF_STAGES);
    turn = place.x, first = int(place.y), image = place.z, head = place.w;
    // Hides from the compiler what registers could keep.
    unsigned thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    write_all(output, label, highest, Destination(*this, thread));
  }

  __device__ void write_all(const float (&output)[D / 8][4], const float (&label)[LABEL_BLOCKS][4],
                            const float (&highest)[2], const Destination& to) const {
    float shares[LABEL_BLOCKS][4];
    write(output, label, highest, shares, to);
    write_shares(shares, to);
  }

  __device__ void take_heads(Queries query_rows, Keys key_rows, Values value_rows) const {
    Fragment query[D / 16], weights[TILES];
    Labels labels;
    float scores[2 * TILES][4], output[D / 8][4], label[LABEL_BLOCKS][4], highest[2];
    const uint32_t from_query = kept(query_address()), from_key = kept(key_address(0));
    const uint32_t from_value = kept(value_address(0));
    Destination destination(*this, threadIdx.x);
    query_rows.own = key_rows.own = value_rows.own = kept(value_rows.own);
    destination.lane = kept(destination.lane);
    destination.rows.from = kept(destination.rows.from);
    float shares[LABEL_BLOCKS][4] = {};
    const float* starts = WINDOWS ? find_starts(0) : nullptr;
    if (WINDOWS) read_starts(scores, starts, 0);
    const Differing differing = find_regions(0);
    wait_for_copies<1>();
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < TILES; tile += 2) read_labels(labels, tile, stage(0).label);
    for (int more = min(p.heads_of_block, p.heads - int(head)) - 1;; --more) {
      read_queries(query, from_query);
      multiply_keys(query, scores, 0, from_key);
      if (WINDOWS) add_regions(scores, differing, 0);
      exponentiate(scores, weights, highest, output, label, 0);
      // V is there, and nobody needs Q and K any more.
      wait_for_copies<0>();
      __syncthreads();
      if (more > 0) {
        query_rows.next_head(p.query.head);
        key_rows.next_head(p.key.head);
        query_rows.copy(shared);
        key_rows.copy(stage(0).key);
        commit_copies();
      }
      multiply_values(weights, output, label, labels, 0, from_value);
      if (WINDOWS && more > 0) read_starts(scores, starts += p.windows.start_head, 0);
      write(output, label, highest, shares, destination);
      if (more == 0) break;
      value_rows.next_head(p.value.head);
      destination.rows.to += D * sizeof(T);
      destination.log_sum_exp += p.queries;
      // The next Q and K are there, and nobody needs V any more.
      wait_for_copies<0>();
      __syncthreads();
      value_rows.copy(stage(0).value);
      commit_copies();
    }
    write_shares(shares, destination);
  }

  // Where the first of the matrices are that this thread loads.
  __device__ uint32_t query_address() const { return shared + Tile::at(warp * QUERIES_OF_WARP + lane % 16, lane / 16); }
  __device__ uint32_t key_address(int step) const {
    return stage(step).key + Tile::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  __device__ uint32_t value_address(int step) const { return stage(step).value + Tile::at(lane % 16, lane / 16); }

  __device__ void read_labels(Labels& labels, int tile, uint32_t from) const {
#pragma unroll
    for (int n = 0; n < LABEL_BLOCKS; ++n) {
      // Columns that nobody asks for have what other ones have.
      const int column = 8 * n + lane % 8, last = label_rows() - 1;
      const int row = WINDOWS && column == 4 ? last : min(column - column / 4, last);
      labels[tile / 2][n] = load_matrices(from + row * LABEL_PITCH + lane / 8 * 16 + 32 * tile);
    }
  }

  // Hides from the compiler how to compute it, which it would do anew for each head.
  static __device__ uint32_t kept(uint32_t address) {
    asm volatile("" : "+r"(address));
    return address;
  }

  __device__ void read_queries(Fragment (&query)[D / 16], uint32_t from) const {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) query[i] = load_matrices(Tile::beside(from, 2 * i));
    if (WINDOWS) flip(reinterpret_cast<Fragment(&)[1][D / 16]>(query), p.windows.flipped);
  }

  // Whether the keys of a step end before a tile; in one pass asked for every other tile.
  __device__ bool ends_before(int tile, int step) const {
    return tile >= CERTAIN_TILES && (STREAMS || (tile - CERTAIN_TILES) % 2 == 0) && step * KEYS + 16 * tile >= p.keys;
  }

  __device__ void multiply_keys(const Fragment (&query)[D / 16], float (&scores)[2 * TILES][4], int step,
                                uint32_t from) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (ends_before(tile, step)) break;
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        const Fragment key = load_matrices(Tile::beside(from, 2 * i) + 16 * tile * Tile::PITCH);
        if (i == 0 && !WINDOWS) {
          multiply<T>(scores[2 * tile], query[i], key.x, key.y);
          multiply<T>(scores[2 * tile + 1], query[i], key.z, key.w);
        } else {
          multiply_add<T>(scores[2 * tile], query[i], key.x, key.y);
          multiply_add<T>(scores[2 * tile + 1], query[i], key.z, key.w);
        }
      }
      if (OFFSETS) add_offsets(scores[2 * tile], scores[2 * tile + 1], step * KEYS + 16 * tile);
    }
  }

  __device__ const float* find_starts(int step) const {
    return cuda::find_starts(p.windows, head, first + warp * QUERIES_OF_WARP, step * KEYS, p.keys);
  }
  __device__ void read_starts(float (&scores)[2 * TILES][4], const float* from, int step) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (ends_before(tile, step)) break;
      cuda::read_starts(reinterpret_cast<Scores<1>&>(scores[2 * tile]), from + 256 * tile, p.keys, lane);
    }
  }

  // Of the keys of a step.
  struct Differing {
    bool is_needed;
    Regions regions[(TILES + 1) / 2];
  };
  __device__ Differing find_regions(int step) const {
    Differing d;
    d.is_needed = WINDOWS && window().has_regions();
    if (d.is_needed) {
#pragma unroll
      for (int i = 0; i < (TILES + 1) / 2; ++i) {
        d.regions[i] = Regions(window(), first + warp * QUERIES_OF_WARP, step * KEYS + 32 * i, lane);
      }
    }
    return d;
  }
  __device__ void add_regions(float (&scores)[2 * TILES][4], const Differing& differing, int step) const {
    if (!differing.is_needed) return;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (ends_before(tile, step)) break;
      cuda::add_regions(reinterpret_cast<Scores<1>&>(scores[2 * tile]), p.windows, differing.regions[tile / 2],
                        tile % 2 * 16);
    }
  }

  // Scores in units of ln 2, with what is added to them.
  __device__ void add_offsets(float (&left)[4], float (&right)[4], int key) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = i < 4 ? left[i] : right[i - 4];
      const int query = first + warp * QUERIES_OF_WARP + lane / 4 + i / 2 % 2 * 8;
      score = with_offsets(p, score, image, head, query, key + i / 4 * 8 + lane % 4 * 2 + i % 2);
    }
  }

  // Without offsets the factor, if it is positive, waits for the exponential.
  __device__ float unit() const { return OFFSETS ? 1.0f : WINDOWS ? p.windows.unit : p.scale * LOG2_E; }

  // Of two rows, and what to subtract from their scores.
  __device__ void find_highest(const float (&scores)[2 * TILES][4], float (&highest)[2], float (&shift)[2],
                               int step) const {
    float now[2] = {scores[0][0], scores[0][2]};
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (ends_before(tile, step)) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) now[i / 2 % 2] = fmaxf(now[i / 2 % 2], scores[2 * tile + i / 4][i % 4]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      now[i] = fmaxf(now[i], __shfl_xor_sync(0xffffffffu, now[i], 1));
      now[i] = fmaxf(now[i], __shfl_xor_sync(0xffffffffu, now[i], 2)) * unit();
      highest[i] = STREAMS ? fmaxf(now[i], highest[i]) : now[i];
      shift[i] = MASKED && highest[i] == -INFINITY ? 0.0f : highest[i];
    }
  }

  // Scores become weights, of 16 bits.
  __device__ void exponentiate(float (&scores)[2 * TILES][4], Fragment (&weights)[TILES], float (&highest)[2],
                               float (&output)[D / 8][4], float (&label)[LABEL_BLOCKS][4], int step) const {
    float now[2] = {highest[0], highest[1]}, shift[2];
    find_highest(scores, now, shift, step);
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
    for (int tile = 0; tile < TILES; ++tile) {
      if (ends_before(tile, step)) break;
      weights[tile] = weights_of(scores[2 * tile], scores[2 * tile + 1], shift);
    }
    highest[0] = now[0], highest[1] = now[1];
  }
  // Of 16 keys, 8 and 8.
  __device__ Fragment weights_of(float (&l)[4], float (&r)[4], const float (&shift)[2]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      l[i] = exp2_of(fmaf(l[i], unit(), -shift[i / 2]));
      r[i] = exp2_of(fmaf(r[i], unit(), -shift[i / 2]));
    }
    return {pack<T>(l[0], l[1]), pack<T>(l[2], l[3]), pack<T>(r[0], r[1]), pack<T>(r[2], r[3])};
  }

  __device__ void multiply_values(const Fragment (&weights)[TILES], float (&output)[D / 8][4],
                                  float (&label)[LABEL_BLOCKS][4], Labels& labels, int step, uint32_t from) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (ends_before(tile, step)) break;
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        const Fragment value = load_matrices_transposed(Tile::beside(from, 2 * n) + 16 * tile * Tile::PITCH);
        if (tile == 0 && !STREAMS) {
          multiply<T>(output[2 * n], weights[tile], value.x, value.y);
          multiply<T>(output[2 * n + 1], weights[tile], value.z, value.w);
        } else {
          multiply_add<T>(output[2 * n], weights[tile], value.x, value.y);
          multiply_add<T>(output[2 * n + 1], weights[tile], value.z, value.w);
        }
      }
      if (!TURNS && tile % 2 == 0) read_labels(labels, tile, stage(step).label);
      multiply_labels(weights[tile], label, labels, tile);
    }
  }
  __device__ void multiply_labels(const Fragment& weights, float (&label)[LABEL_BLOCKS][4], const Labels& labels,
                                  int tile) const {
#pragma unroll
    for (int n = 0; n < LABEL_BLOCKS; ++n) {
      const Fragment& l = labels[tile / 2][n];
      const uint32_t upper = tile % 2 == 0 ? l.x : l.z, lower = tile % 2 == 0 ? l.y : l.w;
      if (tile == 0 && !STREAMS) {
        multiply<T>(label[n], weights, upper, lower);
      } else {
        multiply_add<T>(label[n], weights, upper, lower);
      }
    }
  }

  // `label`: the sum of P [1, share], which divided by the row sum is added to `shares`, the sum over the heads.
  __device__ void write(const float (&output)[D / 8][4], const float (&label)[LABEL_BLOCKS][4],
                        const float (&highest)[2], float (&shares)[LABEL_BLOCKS][4], const Destination& to) const {
    const float2 factor = write_log_sum(label, highest, shares, to);
    const float inverse[2] = {factor.x, factor.y};
    // Through shared memory that only this warp uses, so that a thread writes 16 bytes.
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = pack<T>(output[n][2 * i] * inverse[i], output[n][2 * i + 1] * inverse[i]);
        store_shared(Tile::beside(to.words, n) + 8 * i * Tile::PITCH, word);
      }
    }
    __syncwarp();
    to.rows.write(to.lane);
  }

  // Returns what the two rows of a thread are to be multiplied by.
  __device__ float2 write_log_sum(const float (&label)[LABEL_BLOCKS][4], const float (&highest)[2],
                                  float (&shares)[LABEL_BLOCKS][4], const Numbers& to) const {
    // Of the four threads that share a row the first has columns 0 and 1, the next 2 and 3, ...
    const float total[2] = {__shfl_sync(0xffffffffu, label[0][0], to.lane & ~3),
                            __shfl_sync(0xffffffffu, label[0][2], to.lane & ~3)};
    // Else a query sees every key.
    const float inverse[2] = {MASKED && total[0] == 0.0f ? 0.0f : inverse_of(total[0]),
                              MASKED && total[1] == 0.0f ? 0.0f : inverse_of(total[1])};
#pragma unroll
    for (int n = 0; n < LABEL_BLOCKS; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) shares[n][i] = fmaf(label[n][i], inverse[i / 2], TURNS ? shares[n][i] : 0.0f);
    }
    // log2(0) plus the maximum, -inf, is -inf: a query that sees no key.
    const bool is_odd = to.lane % 2 != 0;
    const float log_sum = (is_odd ? highest[1] : highest[0]) + log2_of(is_odd ? total[1] : total[0]);
    if (to.is_query && to.lane % 4 < 2) *to.log_sum_exp = log_sum * LN_2;
    return make_float2(inverse[0], inverse[1]);
  }

  // The label of a source is the sum of its parts: the first of them has an even thread, the others its neighbour.
  __device__ void write_shares(const float (&shares)[LABEL_BLOCKS][4], const Numbers& to) const {
    const bool is_odd = to.lane % 2 != 0;
    const unsigned rows = p.sources + WINDOWS;
    if (WINDOWS && p.sources > 0 && to.lane % 4 == 2) {
      // Column 4, the last row: the part of the attention that goes to labels.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned query = to.query + 8 * i;
        if (query < p.queries) {
          p.head_share[(uint64_t(turn) * rows + rows - 1) * unsigned(p.queries) + query] = shares[0][2 * i];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < LABEL_BLOCKS; ++n) {
      const float (&s)[4] = shares[n];
      const float own[2] = {is_odd ? s[0] + s[1] : s[1], is_odd ? s[2] + s[3] : s[3]};
      const float share = (is_odd ? own[1] : own[0]) + __shfl_xor_sync(0xffffffffu, is_odd ? own[0] : own[1], 1);
      const unsigned source = 2 * n + to.lane % 4 / 2;
      if (to.is_query && source < p.sources) {
        p.head_share[(uint64_t(turn) * rows + source) * unsigned(p.queries) + to.query] = share;
      }
    }
  }
};

// The same on Hopper, for heads of 64 with 193 to 200 keys and 193 to 208 queries. A block has a multiprocessor for
// itself and takes whole heads in turn, of which shared memory holds two: one warpgroup copies the next one, while the
// others multiply 64 queries each.
template <class T>
struct HopperKernel : ForwardKernel<T, 64, 13, 4, false, Kind::plain, 1> {
  using Base = ForwardKernel<T, 64, 13, 4, false, Kind::plain, 1>;
  using typename Base::Labels;
  using typename Base::Numbers;
  using typename Base::Tile;
  using Base::p, Base::shared, Base::lane, Base::warp, Base::turn, Base::image, Base::head;
  static constexpr int D = 64, TILES = 13, ROWS = 16 * TILES, LEAST_ROWS = Base::CERTAIN_KEYS + 1, MOST_KEYS = 200;
  // Warpgroups that multiply, and all threads.
  static constexpr int GROUPS = 3, THREADS = 128 * (GROUPS + 1);
  static constexpr int COPYING_REGISTERS = 32, MULTIPLYING_REGISTERS = 160;
  static constexpr int PART_BYTES = Tile::bytes(ROWS), STAGE_BYTES = 3 * PART_BYTES + Base::LABEL_BYTES;
  static constexpr int PAST_LABELS = STAGE_BYTES % 1024 == 0 ? 0 : 1024 - STAGE_BYTES % 1024;
  static constexpr int STAGE_PITCH = STAGE_BYTES + PAST_LABELS, SHARED_BYTES = 2 * STAGE_PITCH;
  // Tiles of weights that are multiplied together, while the next exponentials are taken.
  static constexpr int AT_ONCE = 4;
  using Queries = typename Tile::template Source<ROWS, 128, false, Base::CERTAIN_KEYS>;

  static bool takes(const Forward& p) {
    return p.queries >= LEAST_ROWS && p.queries <= ROWS && p.keys >= LEAST_ROWS && p.keys <= MOST_KEYS;
  }

  // What lies in a stage.
  __device__ uint32_t queries_of(unsigned stage) const { return shared + stage * STAGE_PITCH; }
  __device__ uint32_t keys_of(unsigned stage) const { return queries_of(stage) + PART_BYTES; }
  __device__ uint32_t values_of(unsigned stage) const { return queries_of(stage) + 2 * PART_BYTES; }
  __device__ uint32_t labels_of(unsigned stage) const { return queries_of(stage) + 3 * PART_BYTES; }

  // Barriers. Q and K, or V and the labels, of a stage are there for a warpgroup: it waits, those who copy arrive. Nobody
  // needs them any more: all warpgroups arrive, those who copy wait.
  static __device__ unsigned scores_can_begin(unsigned stage, unsigned group) { return GROUPS * stage + group; }
  static __device__ unsigned values_are_there(unsigned stage, unsigned group) { return GROUPS * (2 + stage) + group; }
  static __device__ unsigned scores_are_done(unsigned stage) { return 4 * GROUPS + stage; }
  static __device__ unsigned values_are_done(unsigned stage) { return 4 * GROUPS + 2 + stage; }
  static constexpr int OF_A_GROUP = 128 + 128, OF_ALL = THREADS;

  __device__ void find(unsigned number) {
    turn = number;
    image = p.turns.quotient(turn);
    head = turn - image * p.turns.divisor;
  }

  __device__ void run() {
    const unsigned heads = unsigned(p.batch) * unsigned(p.heads);
    if (warp < 4) {
      hopper::take_fewer_registers<COPYING_REGISTERS>();
#pragma unroll 1
      for (unsigned number = 0, now = blockIdx.x; now < heads; ++number, now += gridDim.x) {
        find(now);
        copy_head(number % 2, number >= 2);
      }
    } else {
      hopper::take_more_registers<MULTIPLYING_REGISTERS>();
      const unsigned group = unsigned(warp) / 4 - 1;
#pragma unroll 1
      for (unsigned number = 0, now = blockIdx.x; now < heads; ++number, now += gridDim.x) {
        find(now);
        // Of 13 tiles of queries a warpgroup has 4. One is left, which they take in turn: one of its warps has it, in
        // turn, the others multiply something.
        const unsigned stage = number % 2, alone = number / GROUPS % 4;
        const unsigned parts = number % GROUPS == group ? 2 : 1;
        hopper::wait_at(scores_can_begin(stage, group), OF_A_GROUP);
#pragma unroll 1
        for (unsigned part = 0; part < parts; ++part) {
          const unsigned row = part == 1 ? 64 - 16 * alone : group == 0 ? 0 : 16 + 64 * group;
          take_queries(stage, group, row, part == 0 || warp % 4 == alone, part == 0, part + 1 == parts);
        }
      }
    }
  }

  __device__ void copy_head(unsigned stage, bool was_in_use) {
    if (was_in_use) hopper::wait_at(scores_are_done(stage), OF_ALL);
    this->template source<Queries>(p.query, 0, 0, p.queries).copy(queries_of(stage));
    this->keys(0).copy(keys_of(stage));
    commit_copies();
    if (was_in_use) hopper::wait_at(values_are_done(stage), OF_ALL);
    this->values(0).copy(values_of(stage));
    this->load_labels(labels_of(stage), 0);
    commit_copies();
    wait_for_copies<1>();
    hopper::show_to_products();
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) hopper::arrive_at(scores_can_begin(stage, group), OF_A_GROUP);
    wait_for_copies<0>();
    hopper::show_to_products();
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) hopper::arrive_at(values_are_there(stage, group), OF_A_GROUP);
  }

  __device__ void take_queries(unsigned stage, unsigned group, unsigned row, bool works, bool is_first, bool is_last) {
    Fragment weights[TILES];
    Labels labels;
    float scores[2 * TILES][4], output[D / 8][4], label[1][4], highest[2], shift[2];
    multiply_keys(scores, hopper::descriptor(queries_of(stage) + row * Tile::PITCH),
                  hopper::descriptor(keys_of(stage)));
    if (is_last) hopper::arrive_at(scores_are_done(stage), OF_ALL);
    this->find_highest(scores, highest, shift, 0);
    if (is_first) hopper::wait_at(values_are_there(stage, group), OF_A_GROUP);
    const uint64_t values = hopper::descriptor(values_of(stage));
    const uint32_t label_rows = find_labels(labels_of(stage));
#pragma unroll
    for (int first = 0; first < TILES; first += AT_ONCE) {
#pragma unroll
      for (int tile = first; tile < min(first + AT_ONCE, TILES); ++tile) {
        weights[tile] = this->weights_of(scores[2 * tile], scores[2 * tile + 1], shift);
        if (tile == TILES - 1) weights[tile].z = weights[tile].w = 0;
        if (tile % 2 == 0) labels[tile / 2][0] = load_matrices(label_rows + 32 * tile);
        this->multiply_labels(weights[tile], label, labels, tile);
      }
      hopper::begin_products();
#pragma unroll
      for (int tile = first; tile < min(first + AT_ONCE, TILES); ++tile) {
        const uint64_t right = values + tile * (16 * Tile::PITCH / 16);
        if (tile == 0) {
          hopper::multiply_columns<T, false>(output, weights[tile], right);
        } else {
          hopper::multiply_columns<T, true>(output, weights[tile], right);
        }
      }
      hopper::commit_products();
    }
    hopper::wait_for_products(output);
    if (is_last) hopper::arrive_at(values_are_done(stage), OF_ALL);
    if (works) write(output, label, highest, row + warp % 4 * 16);
  }

  static __device__ void multiply_keys(float (&all)[2 * TILES][4], uint64_t queries, uint64_t keys) {
    float(&scores)[2 * TILES - 1][4] = reinterpret_cast<float(&)[2 * TILES - 1][4]>(all);
    hopper::begin_products();
    hopper::multiply_rows<T, false>(scores, queries, keys);
#pragma unroll
    for (int i = 1; i < D / 16; ++i) hopper::multiply_rows<T, true>(scores, queries + 2 * i, keys + 2 * i);
    hopper::commit_products();
    hopper::wait_for_products(scores);
#pragma unroll
    for (int i = 0; i < 4; ++i) all[2 * TILES - 1][i] = -INFINITY;
  }

  __device__ uint32_t find_labels(uint32_t from) const {
    const int column = lane % 8, row = min(column - column / 4, this->label_rows() - 1);
    return from + row * Base::LABEL_PITCH + lane / 8 * 16;
  }

  __device__ void write(const float (&output)[D / 8][4], const float (&label)[1][4], const float (&highest)[2],
                        unsigned row) const {
    const Numbers numbers(p, turn, row, lane);
    float shares[1][4];
    const float2 factor = this->write_log_sum(label, highest, shares, numbers);
    this->write_shares(shares, numbers);
    char* to = static_cast<char*>(p.output) + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned query = row + lane / 4 + 8 * i;
      char* to_row = to + ((uint64_t(image) * unsigned(p.queries) + query) * unsigned(p.heads) + head) * (D * sizeof(T));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t words[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float(&sums)[4] = output[4 * j + n];
          const float inverse = i == 0 ? factor.x : factor.y;
          words[n] = pack<T>(sums[2 * i] * inverse, sums[2 * i + 1] * inverse);
        }
        transpose(words, lane);
        if (query < p.queries) store_global(to_row + 64 * j, make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }

  // Word i of thread k of four becomes word k of thread i.
  static __device__ void transpose(uint32_t (&words)[4], int lane) {
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
};

template <class T>
__global__ void __launch_bounds__(HopperKernel<T>::THREADS, 1)
    attention_forward_hopper(const __grid_constant__ Forward p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char stages[];
  HopperKernel<T>{{p, uint32_t(__cvta_generic_to_shared(stages))}}.run();
#endif
}

template <class T, int D, int TILES, int WARPS, bool STREAMS, Kind KIND, int LABEL_BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, ForwardKernel<T, D, TILES, WARPS, STREAMS, KIND, LABEL_BLOCKS>::BLOCKS)
    attention_forward(const __grid_constant__ Forward p) {
  extern __shared__ __align__(256) unsigned char shared[];
  ForwardKernel<T, D, TILES, WARPS, STREAMS, KIND, LABEL_BLOCKS>{p, uint32_t(__cvta_generic_to_shared(shared))}.run();
}

template <class T>
void count_in_bytes(Forward& p) {
  for (Rows* rows : {&p.query, &p.key, &p.value}) {
    rows->image *= sizeof(T), rows->head *= sizeof(T), rows->row *= sizeof(T);
  }
}

template <Kind KIND>
void average(const Forward& p, cudaStream_t stream) {
  if (p.sources == 0) return;
  const auto kernel = KIND == Kind::windows   ? average_heads_of_windows
                      : KIND == Kind::offsets ? average_heads<true>
                                              : average_heads<false>;
  kernel<<<unsigned(p.batch * blocks_of(p.queries, SMALL)), SMALL, 0, stream>>>(p);
  check(cudaGetLastError(), "average_heads", p);
}

// Multiprocessors of the current device if it is a Hopper that there is code for, else 0.
int multiprocessors_of_hopper() {
#if defined(TLALIGN_HOPPER)
  static const std::vector<int> of_devices = [] {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
    std::vector<int> counts(devices);
    for (int device = 0; device < devices; ++device) {
      int major = 0, minor = 0;
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
      if (major == 9 && minor == 0) {
        cudaDeviceGetAttribute(&counts[device], cudaDevAttrMultiProcessorCount, device);
      }
    }
    return counts;
  }();
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess && device < int(of_devices.size())) return of_devices[device];
#endif
  return 0;
}

template <class T>
void launch_on_hopper(Forward p, int multiprocessors, cudaStream_t stream) {
  using Kernel = HopperKernel<T>;
  const auto kernel = attention_forward_hopper<T>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SHARED_BYTES),
        "attention_forward_hopper", p);
  p.heads_of_block = 1;
  p.turns = Divisor(p.heads);
  count_in_bytes<T>(p);
  const auto blocks = std::min<int64_t>(p.batch * p.heads, multiprocessors);
  kernel<<<unsigned(blocks), Kernel::THREADS, Kernel::SHARED_BYTES, stream>>>(p);
  check(cudaGetLastError(), "attention_forward_hopper", p);
  average<Kind::plain>(p, stream);
}

template <class T, int D, int TILES, int WARPS, bool STREAMS, Kind KIND, int LABEL_BLOCKS>
void launch(Forward p, cudaStream_t stream) {
  if constexpr (D == 64 && TILES == 13) {
    const int multiprocessors = multiprocessors_of_hopper();
    if (multiprocessors > 0 && HopperKernel<T>::takes(p)) {
      return launch_on_hopper<T>(p, multiprocessors, stream);
    }
  }
  using Kernel = ForwardKernel<T, D, TILES, WARPS, STREAMS, KIND, LABEL_BLOCKS>;
  const auto kernel = attention_forward<T, D, TILES, WARPS, STREAMS, KIND, LABEL_BLOCKS>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SHARED_BYTES),
        "attention_forward", p);
  p.blocks = Divisor(blocks_of(p.queries, Kernel::QUERIES));
  const int64_t pairs = p.blocks.divisor * p.batch * p.heads;
  p.heads_of_block = Kernel::TURNS ? int(std::clamp<int64_t>(pairs / FEW_BLOCKS, 1, p.heads)) : 1;
  p.turns = Divisor(blocks_of(p.heads, p.heads_of_block));
  const int64_t blocks = p.blocks.divisor * p.batch * p.turns.divisor;
  count_in_bytes<T>(p);
  kernel<<<unsigned(blocks), Kernel::THREADS, Kernel::SHARED_BYTES, stream>>>(p);
  check(cudaGetLastError(), "attention_forward", p);
  average<KIND>(p, stream);
}

// All keys in one step where registers hold their scores: up to 64, or up to 208 of heads of at most 64.
template <class T, int D, Kind KIND>
void launch_for_keys(const Forward& p, cudaStream_t stream) {
  if (p.sources > 2) return launch<T, D, D <= 96 ? 4 : 2, 4, true, KIND, 4>(p, stream);
  if constexpr (KIND != Kind::windows) {
    if (p.keys <= 32) return launch<T, D, 2, 4, false, KIND, 1>(p, stream);
  }
  if (p.keys <= 64) return launch<T, D, 4, 4, false, KIND, 1>(p, stream);
  if constexpr (D <= 64 && KIND == Kind::plain) {
    if (p.keys <= 128) return launch<T, D, 8, 4, false, KIND, 1>(p, stream);
    if (p.keys <= 192) return launch<T, D, 12, 4, false, KIND, 1>(p, stream);
    // As many queries as keys are 13 times 16: two blocks of 7 warps load K and V half as often as four of 4. But with
    // heads of 32 ptxas does not get by with 128 registers, and with more only one such block is resident.
    if (p.keys <= 208) return launch<T, D, 13, D == 64 ? 7 : 4, false, KIND, 1>(p, stream);
  }
  launch<T, D, 4, 4, true, KIND, 1>(p, stream);
}

}  // namespace

void forward(const Forward& p, cudaStream_t stream) {
  const bool in_windows = p.windows.starts != nullptr;
  if (in_windows) prepare_windows(p, stream);
  with_types(p, [&](auto type, auto head_dim) {
    using T = decltype(type);
    if (p.sources > 0) {
      const auto pack = in_windows ? pack_labels<T, true> : pack_labels<T, false>;
      pack<<<unsigned(p.batch * padded(p.keys) / SMALL), SMALL, 0, stream>>>(p);
      check(cudaGetLastError(), "pack_labels", p);
    }
    if (in_windows) return launch_for_keys<T, head_dim(), Kind::windows>(p, stream);
    // A scale that is not positive can't wait for the exponential.
    if (p.bias.data != nullptr || p.mask.data != nullptr || !(p.scale > 0.0f)) {
      launch_for_keys<T, head_dim(), Kind::offsets>(p, stream);
    } else {
      launch_for_keys<T, head_dim(), Kind::plain>(p, stream);
    }
  });
}

}  // namespace tlalign::cuda
