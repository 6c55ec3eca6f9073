// The kernel of the forward; for Hopper `hopper.cu` and `hopper_streaming.cu` have others.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/attention.h"
#include "cuda/scores.h"
#include "cuda/tiles.h"
#include "cuda/windows.h"

namespace tlalign::cuda {

constexpr int QUERIES_OF_WARP = 16;

// share = hi + mid + lo, of two at once: a word has a part of both.
template <class T>
__device__ void split(float2 shares, uint32_t (&parts)[PARTS]) {
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    parts[i] = pack<T>(shares.x, shares.y);
    const float2 rounded = unpack<T>(parts[i]);
    shares.x -= rounded.x, shares.y -= rounded.y;
  }
}

// What two keys have of the labels of a source, a word for both: ones for keys that there are, and for those that have
// a label, and the parts of the shares; zeros elsewhere.
struct LabelsOfPair {
  uint32_t is_key, has_label, parts[PARTS];
};

// Of keys 2 pair and 2 pair + 1.
template <class T, bool WINDOWS>
__device__ LabelsOfPair labels_of_pair(const Forward& p, unsigned image, unsigned source, unsigned pair) {
  const unsigned key = 2 * pair, sources = p.sources;
  const bool is_key[2] = {key < p.keys, key + 1 < p.keys};
  bool has_label[2] = {is_key[0], is_key[1]};
  const float* from[2] = {p.share + (uint64_t(image) * p.shares_of_keys + (key * sources + source))};
  from[1] = from[0] + sources;
  if (WINDOWS) {
    const Window window(p.windows, image);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      has_label[i] = window.has(key + i);
      from[i] = p.share + (window.token_of_all(key + i) * sources + source);
    }
  }
  float share[2] = {};
  if (source < sources) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (has_label[i]) share[i] = *from[i];
    }
  }
  LabelsOfPair labels;
  labels.is_key = pack<T>(is_key[0] ? 1.0f : 0.0f, is_key[1] ? 1.0f : 0.0f);
  labels.has_label = pack<T>(has_label[0] ? 1.0f : 0.0f, has_label[1] ? 1.0f : 0.0f);
  split<T>(make_float2(share[0], share[1]), labels.parts);
  return labels;
}

// Makes a sum of shares over the heads their mean, by what their weights sum to, and averages it with the residual.
struct HeadMean {
  float of_residual, of_sum;

  __device__ HeadMean(const Forward& p, float weight)
      : of_residual(p.residual == nullptr ? 0.0f
                    : weight > 0.0f       ? 0.5f
                                          : 1.0f),
        of_sum(weight > 0.0f ? (1.0f - of_residual) / weight : 0.0f) {}
  // Of all heads.
  __device__ explicit HeadMean(const Forward& p) : of_residual(0.5f), of_sum(p.of_sum_of_heads) {}
  __device__ void write(const Forward& p, uint64_t at, float sum) const {
    sum *= of_sum;
    p.share_out[at] = p.residual == nullptr ? sum : fmaf(p.residual[at], of_residual, sum);
  }
};

// output = softmax(scale Q K^T + bias + mask) V: a block has 16 queries of a head for each of its WARPS, and all keys
// pass by in steps of OCTETS x 8. If one step has them all (STREAMS is false) the softmax is exact in one pass, else
// online. Where there are few, a block goes on to the next head, whose Q, K and V come while it is busy with this one.
// Registers hold Q, the scores of a step, and the sums of P V and P [1, share]; shared memory holds K and V of a step,
// of two if steps pass by. Labels come from where `pack_labels` has put them, as threads hold them; a block that goes
// on splits shares itself, to shared memory. Reads Q once, K and V once a block; writes O, the log-sum-exp and the
// shares of the head. = reference.forward, but for the mean over heads.
template <class T, int D, int OCTETS, int WARPS, bool STREAMS, Kind KIND, int LABEL_BLOCKS>
struct ForwardKernel {
  using Tile = SharedRows<T, D>;
  static constexpr bool OFFSETS = KIND == Kind::offsets, WINDOWS = KIND == Kind::windows;
  // Whether scores begin with something, so that a query may see no key.
  static constexpr bool STARTS = KIND != Kind::plain;
  static constexpr int THREADS = 32 * WARPS, QUERIES = QUERIES_OF_WARP * WARPS;
  // Products take 16 keys at once, the last one 8 if there are no more.
  static constexpr int TILES = (OCTETS + 1) / 2, KEYS = 8 * OCTETS;
  static constexpr bool ENDS_IN_OCTET = OCTETS % 2 != 0;
  static_assert(!ENDS_IN_OCTET || !STREAMS, "one step has all keys");
  static constexpr int STAGES = STREAMS ? 2 : 1;
  // Few keys, as in windows: a block takes several heads in turn, which share addresses and labels, of up to two
  // sources.
  static constexpr bool TURNS = !STREAMS && TILES <= 4 && LABEL_BLOCKS <= 2;
  // More keys of windows: a block takes all queries in turn, so that K and V are read once, unless labels leave too few
  // registers.
  static constexpr bool QUERY_TURNS = WINDOWS && !STREAMS && !TURNS && LABEL_BLOCKS == 1;
  // Whether a block averages shares itself, since it has all heads of its queries.
  static TLALIGN_BOTH bool has_all_heads(const Forward& p) { return TURNS && p.turns.is_one(); }
  // Keys that there are at least where one step has all of them: see launch_for_keys.
  static constexpr int least_keys() {
    const bool has_several = D <= 64 && LABEL_BLOCKS == 1;
    if (has_several && KIND == Kind::plain) {
      return OCTETS == 32 ? 201 : OCTETS == 25 ? 193 : OCTETS == 24 ? 129 : OCTETS == 16 ? 65 : OCTETS > 4 ? 33 : 1;
    }
    if (has_several && KIND == Kind::offsets && OCTETS == 32) return 201;
    return OCTETS > 8 ? 65 : 1;
  }
  // Rows that are known to be there, and tiles that are not asked whether they have keys.
  static constexpr int CERTAIN_KEYS = STREAMS ? 0 : least_keys() - 1;
  static constexpr int CERTAIN_TILES = STREAMS ? 1 : TURNS ? TILES : CERTAIN_KEYS / 16 + 1;
  static_assert(!TURNS || KEYS <= 64, "a warp splits the labels of a source");
  // Labels that lie in shared memory are rows of a column each: 16-byte chunks of 8 keys, an odd number of them, so
  // that 8 rows begin in different banks.
  static constexpr int LABEL_ROWS = 8 * LABEL_BLOCKS;
  static constexpr int LABEL_CHUNKS = 2 * ((TILES + 1) / 2 * 2);
  static constexpr int LABEL_PITCH = 16 * (LABEL_CHUNKS + 1);
  static constexpr int LABEL_BYTES =
      (LABEL_ROWS * LABEL_PITCH + Tile::ALIGNMENT - 1) / Tile::ALIGNMENT * Tile::ALIGNMENT;
  // All keys of wide heads leave room for two blocks only if V comes where K was.
  static constexpr bool IN_PLACE = !STREAMS && !TURNS && D > 64;
  static constexpr int VALUE_AT = IN_PLACE ? 0 : Tile::bytes(KEYS);
  static constexpr int STAGE_BYTES = VALUE_AT + Tile::bytes(KEYS) + (TURNS ? LABEL_BYTES : 0);
  // Labels that lie elsewhere are read so many tiles before they are needed, as registers allow.
  static constexpr int AHEAD = LABEL_BLOCKS == 1 ? 2 : 0;
  // Blocks that the registers of a multiprocessor are to hold at once.
  static constexpr bool IS_WIDE = D > 64 || (STREAMS ? LABEL_BLOCKS > 1 : TILES > 13);
  static constexpr int BLOCKS = WARPS > 4 || IS_WIDE                                                       ? 2
                                : STREAMS || TILES > 8 || LABEL_BLOCKS > 1 || (TURNS && OFFSETS && D > 32) ? 3
                                : TURNS && D <= 32 && KIND == Kind::plain && OCTETS < 8                    ? 5
                                                                                                           : 4;
  // The output passes through shared memory: that of the queries, unless the next ones are already coming.
  static constexpr int END_OF_STAGES = Tile::bytes(QUERIES) + STAGES * STAGE_BYTES;
  static constexpr int OUTPUT_AT = TURNS || QUERY_TURNS ? END_OF_STAGES : 0;
  static constexpr int SHARED_BYTES = END_OF_STAGES + (OUTPUT_AT > 0 ? Tile::bytes(QUERIES) : sizeof(uint4));

  // Labels as the right factors of products, for two tiles each. Column 0 is that of the ones, column 4 s + i that of
  // part i = 1, 2, 3 of source s. Of windows column 4 says which keys have labels. Where blocks take heads in turn a
  // source has eight columns: ones in the even ones, so that no thread asks another for the row sum of each head; in
  // the odd ones the parts and, of windows, which keys have labels.
  using Labels = Fragment[(TILES + 1) / 2][LABEL_BLOCKS];
  struct Stage {
    uint32_t key, value, label;
  };
  // Of two rows, over the heads that a block takes in turn: what a thread has of the labels of each source; of windows,
  // if it takes no turns, of the attention that goes to labels; and with offsets, if it does, in how many heads a query
  // sees a key.
  struct Shares {
    float label[LABEL_BLOCKS][2], weight[2];
  };
  template <int ROWS, bool REPEATS, int CERTAIN, bool PADS>
  using Source = std::conditional_t<WINDOWS, WindowSource<Tile, ROWS, THREADS, PADS>,
                                    typename Tile::template Source<ROWS, THREADS, REPEATS, CERTAIN>>;
  using Queries = Source<QUERIES, false, 0, false>;
  // Rows of K from key Nk on repeat the last one, so that the maxima are those of the real keys; V, and the column of
  // ones, are zero there. So no score needs a mask. In windows scores begin with -inf there.
  using Keys = Source<KEYS, true, CERTAIN_KEYS, true>;
  using Values = Source<KEYS, false, CERTAIN_KEYS, true>;

  // Where a thread writes what there is one number of for each query: even threads for the first of their rows, odd
  // ones for the second.
  struct Numbers {
    unsigned lane, query;
    bool is_query;
    float* log_sum_exp;

    __device__ explicit Numbers(unsigned lane) : lane(lane) {}
    // `row`: the first query of the warp. `pair`: the number of the head among those of all images.
    __device__ Numbers(const Forward& p, unsigned pair, unsigned row, unsigned lane) : lane(lane) {
      find(p, pair, row);
    }
    __device__ void find(const Forward& p, unsigned pair, unsigned row) {
      query = row + lane / 4 + lane % 2 * 8;
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
        : Numbers(thread % 32),
          words(k.shared + OUTPUT_AT + thread / 32 * Tile::bytes(ROWS)),
          rows(rows_of(k, thread, words, this->lane)) {
      this->find(k.p, TURNS ? k.image * k.p.heads + k.head : k.turn, k.first + thread / 32 * ROWS);
      words += Tile::at(this->lane / 4, 0) + this->lane % 4 * 4;
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
    return {at, at + VALUE_AT, at + VALUE_AT + Tile::bytes(KEYS)};
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
  // What `pack_labels` does for other blocks: so many threads as there are pairs of keys write one each. The image is
  // hidden, here and below, for its number to be one of 32 bits where it is multiplied.
  __device__ void store_labels(uint32_t to, int source, int pair) const {
    if (2 * pair >= 8 * LABEL_CHUNKS) return;
    const LabelsOfPair labels = labels_of_pair<T, WINDOWS>(p, hidden(image), source, pair);
    to += source * (8 * LABEL_PITCH) + pair * 4;
#pragma unroll
    for (int i = 0; i <= PARTS; ++i) {
      const uint32_t between = i < PARTS ? labels.parts[i] : WINDOWS ? labels.has_label : 0;
      store_shared(to + 2 * i * LABEL_PITCH, labels.is_key);
      store_shared(to + (2 * i + 1) * LABEL_PITCH, between);
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
    commit_copies();
    if (!IN_PLACE) value_rows.copy(stage(0).value);
    if (TURNS && warp < LABEL_BLOCKS) store_labels(stage(0).label, warp, lane);
    commit_copies();
    if constexpr (STREAMS) {
      take_steps();
    } else if constexpr (TURNS) {
      take_heads(query_rows, key_rows, value_rows);
    } else if constexpr (QUERY_TURNS) {
      take_queries();
    } else {
      take_head();
    }
  }

  // A warp without queries helps to load, no more.
  __device__ bool works() const { return first + warp * QUERIES_OF_WARP < p.queries; }

  __device__ void take_steps() const {
    Fragment query[D / 16], weights[TILES];
    Labels labels;
    float scores[OCTETS][4], output[D / 8][4], label[LABEL_BLOCKS][4];
    float highest[2] = {-INFINITY, -INFINITY};
    const PackedLabels packed = packed_labels(lane);
    const int steps = (p.keys + KEYS - 1) / KEYS;
    for (int step = 0; step < steps; ++step) {
      if (STARTS && works()) read_starts(scores, find_starts(p.bias_starts, step), step);
      wait_for_copies<1>();
      __syncthreads();
      if (works()) {
        if (step == 0) read_queries(query, query_address());
        multiply_keys(query, scores, step, key_address(step));
        if (WINDOWS) add_regions(scores, step);
        if (OFFSETS && has_mask()) add_starts(scores, find_starts(p.mask_starts, step), step);
      }
      if (step + 1 < steps) keys(step + 1).copy(stage(step + 1).key);
      commit_copies();
      if (works()) {
        exponentiate(scores, weights, highest, output, label, step);
        if (AHEAD > 0) read_labels(labels, 0, packed, step);
      }
      wait_for_copies<1>();
      __syncthreads();
      if (works()) {
        multiply_values(weights, output, label, labels, packed, step, value_address(step), key_address(step));
      }
      if (step + 1 < steps) values(step + 1).copy(stage(step + 1).value);
      commit_copies();
    }
    if (works()) write_all(output, label, highest, Destination(*this, threadIdx.x));
  }

  __device__ void take_head() {
    Fragment query[D / 16], weights[TILES];
    Labels labels;
    float scores[OCTETS][4], output[D / 8][4], label[LABEL_BLOCKS][4], highest[2];
    const bool works = this->works();
    // Where the block is, so that no registers keep it where most of them are needed.
    if (threadIdx.x == 0) store_shared(shared + END_OF_STAGES, make_uint4(turn, first, image, head));
    if (STARTS && works) read_starts(scores, find_starts(p.bias_starts, 0), 0);
    wait_for_copies<1>();
    __syncthreads();
    if (works) {
      read_queries(query, query_address());
      multiply_keys(query, scores, 0, key_address(0));
      if (WINDOWS) add_regions(scores, 0);
      if (OFFSETS && has_mask()) add_starts(scores, find_starts(p.mask_starts, 0), 0);
    }
    if constexpr (IN_PLACE) {
      __syncthreads();
      // No registers are to keep where K was copied to.
      values(0).copy(stage(0).value, hidden(threadIdx.x));
      commit_copies();
    }
    if (works) exponentiate(scores, weights, highest, output, label, 0);
    wait_for_copies<0>();
    __syncthreads();
    if (!works) return;
    const uint4 place = load_shared(shared + END_OF_STAGES);
    turn = place.x, first = int(place.y), image = place.z, head = place.w;
    const PackedLabels packed = packed_labels(lane);
    if (AHEAD > 0) read_labels(labels, 0, packed, 0);
    multiply_values(weights, output, label, labels, packed, 0, value_address(0), key_address(0));
    // No registers are to keep through the products what follows from it.
    write_all(output, label, highest, Destination(*this, hidden(threadIdx.x)));
  }

  __device__ void take_queries() {
    Fragment query[D / 16], weights[TILES];
    Labels labels;
    float scores[OCTETS][4], output[D / 8][4], label[LABEL_BLOCKS][4], highest[2];
    for (;;) {
      const bool works = this->works();
      if (works) read_starts(scores, find_starts(p.bias_starts, 0), 0);
      wait_for_copies<0>();
      __syncthreads();
      if (works) read_queries(query, query_address());
      // Nobody needs Q any more.
      __syncthreads();
      const int next = first + QUERIES;
      if (next < p.queries) source<Queries>(p.query, 0, next, p.queries).copy(shared);
      commit_copies();
      if (works) {
        multiply_keys(query, scores, 0, key_address(0));
        add_regions(scores, 0);
        exponentiate(scores, weights, highest, output, label, 0);
        const PackedLabels packed = packed_labels(hidden(lane));
        if (AHEAD > 0) read_labels(labels, 0, packed, 0);
        multiply_values(weights, output, label, labels, packed, 0, value_address(0), key_address(0));
        write_all(output, label, highest, Destination(*this, hidden(threadIdx.x)));
      }
      if (next >= p.queries) break;
      first = next;
      // No registers are to keep through the loop what it takes of the window, nor where labels are and the output
      // goes.
      image = hidden(image);
    }
  }

  __device__ void write_all(const float (&output)[D / 8][4], const float (&label)[LABEL_BLOCKS][4],
                            const float (&highest)[2], const Destination& to) const {
    Shares shares;
    write(output, label, highest, shares, to);
    write_shares(shares, to);
  }

  __device__ void take_heads(Queries query_rows, Keys key_rows, Values value_rows) const {
    Fragment query[D / 16], weights[TILES];
    Labels labels;
    float scores[OCTETS][4], output[D / 8][4], label[LABEL_BLOCKS][4], highest[2];
    const uint32_t from_query = hidden(query_address()), from_key = hidden(key_address(0));
    const uint32_t from_value = hidden(value_address(0));
    Destination destination(*this, threadIdx.x);
    query_rows.own = key_rows.own = value_rows.own = hidden(value_rows.own);
    destination.lane = hidden(destination.lane);
    destination.rows.from = hidden(destination.rows.from);
    Shares shares = {};
    const float* starts = STARTS ? find_starts(p.bias_starts, 0) : nullptr;
    if (STARTS) read_starts(scores, starts, 0);
    const float* mask = OFFSETS && has_mask() ? find_starts(p.mask_starts, 0) : nullptr;
    // Those of all heads.
    const bool has_regions = WINDOWS && window().has_regions();
    Regions regions[(TILES + 1) / 2];
    if (has_regions) {
#pragma unroll
      for (int i = 0; i < OCTETS; i += 4) regions[i / 4] = find_regions(window(), 8 * i);
    }
    wait_for_copies<1>();
    __syncthreads();
    read_labels(labels, label_address(stage(0).label));
    unsigned next = 0;
    for (int more = min(p.heads_of_block, p.heads - int(head)) - 1;; --more) {
      read_queries(query, from_query);
      multiply_keys(query, scores, 0, from_key);
      if (has_regions) {
#pragma unroll
        for (int i = 0; i < OCTETS; i += 4) add_regions(scores, regions[i / 4], i);
      }
      if (OFFSETS && mask != nullptr) add_starts(scores, mask, 0);
      exponentiate(scores, weights, highest, output, label, 0);
      // V is there, and nobody needs Q and K any more.
      wait_for_copies<0>();
      __syncthreads();
      if (more > 0) {
        next = hidden(next + 1);
        query_rows.of_head(next, p.query_head_bytes).copy(shared);
        key_rows.of_head(next, p.key_head_bytes).copy(stage(0).key);
        commit_copies();
      }
      multiply_values(weights, output, label, labels, {}, 0, from_value, from_key);
      if (STARTS && more > 0) read_starts(scores, starts += p.bias_starts.head, 0);
      if (OFFSETS && mask != nullptr) mask += p.mask_starts.head;
      write(output, label, highest, shares, destination);
      if (more == 0) break;
      destination.rows.to += D * sizeof(T);
      destination.log_sum_exp += p.queries;
      // The next Q and K are there, and nobody needs V any more.
      wait_for_copies<0>();
      __syncthreads();
      value_rows.of_head(next, p.value_head_bytes).copy(stage(0).value);
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

  // Where this thread's matrices of labels are in shared memory.
  __device__ uint32_t label_address(uint32_t labels) const { return labels + lane % 8 * LABEL_PITCH + lane / 8 * 16; }
  __device__ void read_labels(Labels& labels, uint32_t from) const {
#pragma unroll
    for (int i = 0; i < (TILES + 1) / 2; ++i) {
#pragma unroll
      for (int n = 0; n < LABEL_BLOCKS; ++n) labels[i][n] = load_matrices(from + 8 * n * LABEL_PITCH + 64 * i);
    }
  }

  // Where `pack_labels` has put them. Columns that nobody asks for have what other ones have.
  struct PackedLabels {
    const Fragment* from[LABEL_BLOCKS];
  };
  __device__ PackedLabels packed_labels(unsigned lane) const {
    PackedLabels packed;
#pragma unroll
    for (int n = 0; n < LABEL_BLOCKS; ++n) {
      const unsigned group = min(2 * n + lane / 16, p.label_groups - 1);
      packed.from[n] = static_cast<const Fragment*>(p.labels) + image * p.labels_of_image +
                       (group * unsigned(laid_out(p.keys)) / 2 + lane % 16);
    }
    return packed;
  }
  __device__ void read_labels(Labels& labels, int tile, const PackedLabels& packed, int step) const {
#pragma unroll
    for (int n = 0; n < LABEL_BLOCKS; ++n) labels[tile / 2][n] = __ldg(packed.from[n] + (step * TILES + tile) * 8);
  }

  __device__ void read_queries(Fragment (&query)[D / 16], uint32_t from) const {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) query[i] = load_matrices(Tile::beside(from, 2 * i));
    if (STARTS) flip(reinterpret_cast<Fragment(&)[1][D / 16]>(query), p.flipped);
  }

  // Whether the keys of a step end before a tile; in one pass asked for every other tile, but where scores begin with
  // what is in memory, since nothing is there beyond padded(keys).
  __device__ bool ends_before(int tile, int step) const {
    const bool asks = STREAMS || STARTS || (tile - CERTAIN_TILES) % 2 == 0;
    return tile >= CERTAIN_TILES && asks && step * KEYS + 16 * tile >= p.keys;
  }

  __device__ void multiply_keys(const Fragment (&query)[D / 16], float (&scores)[OCTETS][4], int step,
                                uint32_t from) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (ends_before(tile, step)) break;
      if (is_octet(tile)) {
        multiply_last_keys(query, scores[2 * tile], from);
        break;
      }
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        const Fragment key = load_matrices(Tile::beside(from, 2 * i) + 16 * tile * Tile::PITCH);
        if (i == 0 && !STARTS) {
          multiply<T>(scores[2 * tile], query[i], key.x, key.y);
          multiply<T>(scores[2 * tile + 1], query[i], key.z, key.w);
        } else {
          multiply_add<T>(scores[2 * tile], query[i], key.x, key.y);
          multiply_add<T>(scores[2 * tile + 1], query[i], key.z, key.w);
        }
      }
    }
  }

  // Whether a tile has 8 keys.
  static constexpr __device__ bool is_octet(int tile) { return ENDS_IN_OCTET && tile == TILES - 1; }
  __device__ void multiply_last_keys(const Fragment (&query)[D / 16], float (&scores)[4], uint32_t from) const {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const uint2 key = load_two_matrices(Tile::beside(from, 2 * i) + 16 * (TILES - 1) * Tile::PITCH);
      if (i == 0 && !STARTS) {
        multiply<T>(scores, query[i], key.x, key.y);
      } else {
        multiply_add<T>(scores, query[i], key.x, key.y);
      }
    }
  }

  __device__ const float* find_starts(const Starts& starts, int step) const {
    return cuda::find_starts<KIND>(starts, image, head, first + warp * QUERIES_OF_WARP, step * KEYS);
  }
  __device__ void read_starts(float (&scores)[OCTETS][4], const float* from, int step) const {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
      if (i % 2 == 0 && ends_before(i / 2, step)) break;
      cuda::read_starts(scores[i], from + 128 * i, lane);
    }
  }
  __device__ bool has_mask() const { return p.mask_starts.data != nullptr; }
  __device__ void add_starts(float (&scores)[OCTETS][4], const float* from, int step) const {
#pragma unroll
    for (int i = 0; i < OCTETS; ++i) {
      if (i % 2 == 0 && ends_before(i / 2, step)) break;
      float starts[4];
      cuda::read_starts(starts, from + 128 * i, lane);
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[i][j] += starts[j];
    }
  }

  __device__ Regions find_regions(const Window& window, int key) const {
    return Regions(window, first + warp * QUERIES_OF_WARP, key, lane);
  }
  // Of 32 keys; they begin with score number `from`.
  __device__ void add_regions(float (&scores)[OCTETS][4], const Regions& regions, int from) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (from + i < OCTETS) cuda::add_regions(scores[from + i], p.windows, regions, 8 * i);
    }
  }
  __device__ void add_regions(float (&scores)[OCTETS][4], int step) const {
    const Window window = this->window();
    if (!window.has_regions()) return;
#pragma unroll
    for (int i = 0; i < OCTETS; i += 4) {
      if (i > 0 && step * KEYS + 8 * i >= p.keys) break;
      add_regions(scores, find_regions(window, step * KEYS + 8 * i), i);
    }
  }

  // Of two rows, and what to subtract from their scores.
  __device__ void find_highest(const float (&scores)[OCTETS][4], float (&highest)[2], float (&shift)[2],
                               int step) const {
    float now[2] = {scores[0][0], scores[0][2]};
#pragma unroll
    for (int n = 0; n < OCTETS; ++n) {
      if (n % 2 == 0 && ends_before(n / 2, step)) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) now[i / 2] = fmaxf(now[i / 2], scores[n][i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      now[i] = fmaxf(now[i], __shfl_xor_sync(0xffffffffu, now[i], 1));
      now[i] = fmaxf(now[i], __shfl_xor_sync(0xffffffffu, now[i], 2)) * p.unit;
      highest[i] = STREAMS ? fmaxf(now[i], highest[i]) : now[i];
      shift[i] = STARTS && highest[i] == -INFINITY ? 0.0f : highest[i];
    }
  }

  // Scores become weights, of 16 bits.
  __device__ void exponentiate(float (&scores)[OCTETS][4], Fragment (&weights)[TILES], float (&highest)[2],
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
      weights[tile] = weights_of(scores, tile, shift);
    }
    highest[0] = now[0], highest[1] = now[1];
  }
  // Of 16 keys, or of 8 and zeros.
  __device__ Fragment weights_of(float (&scores)[OCTETS][4], int tile, const float (&shift)[2]) const {
    const uint2 first = weights_of(scores[2 * tile], shift);
    if (is_octet(tile)) return {first.x, first.y, 0, 0};
    const uint2 second = weights_of(scores[2 * tile + 1], shift);
    return {first.x, first.y, second.x, second.y};
  }
  __device__ uint2 weights_of(float (&scores)[4], const float (&shift)[2]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = exp2_of(fmaf(scores[i], p.unit, -shift[i / 2]));
    return {pack<T>(scores[0], scores[1]), pack<T>(scores[2], scores[3])};
  }

  // `from_key`: where this thread's matrices of K are, to which those of the last 8 rows of V correspond.
  __device__ void multiply_values(const Fragment (&weights)[TILES], float (&output)[D / 8][4],
                                  float (&label)[LABEL_BLOCKS][4], Labels& labels, const PackedLabels& packed, int step,
                                  uint32_t from, uint32_t from_key) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (ends_before(tile, step)) break;
      if (is_octet(tile)) {
        multiply_last_values(weights[tile], output, from_key + Tile::bytes(KEYS));
      } else {
        multiply_values(weights[tile], output, tile, from);
      }
      if (!TURNS && tile % 2 == 0 && tile + AHEAD < TILES) read_labels(labels, tile + AHEAD, packed, step);
      multiply_labels(weights[tile], label, labels, tile);
    }
  }
  __device__ void multiply_values(const Fragment& weights, float (&output)[D / 8][4], int tile, uint32_t from) const {
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      const Fragment value = load_matrices_transposed(Tile::beside(from, 2 * n) + 16 * tile * Tile::PITCH);
      if (tile == 0 && !STREAMS) {
        multiply<T>(output[2 * n], weights, value.x, value.y);
        multiply<T>(output[2 * n + 1], weights, value.z, value.w);
      } else {
        multiply_add<T>(output[2 * n], weights, value.x, value.y);
        multiply_add<T>(output[2 * n + 1], weights, value.z, value.w);
      }
    }
  }
  __device__ void multiply_last_values(const Fragment& weights, float (&output)[D / 8][4], uint32_t from) const {
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      const uint2 value = load_two_matrices_transposed(Tile::beside(from, 2 * n) + 16 * (TILES - 1) * Tile::PITCH);
      multiply_add<T>(output[2 * n], weights, value.x);
      multiply_add<T>(output[2 * n + 1], weights, value.y);
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
      } else if (is_octet(tile)) {
        multiply_add<T>(label[n], weights, upper);
      } else {
        multiply_add<T>(label[n], weights, upper, lower);
      }
    }
  }

  // `label`: the sum of P [1, share], which divided by the row sum is added to `shares`, the sum over the heads.
  __device__ void write(const float (&output)[D / 8][4], const float (&label)[LABEL_BLOCKS][4],
                        const float (&highest)[2], Shares& shares, const Destination& to) const {
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
  __device__ float2 write_log_sum(const float (&label)[LABEL_BLOCKS][4], const float (&highest)[2], Shares& shares,
                                  const Numbers& to) const {
    float total[2] = {label[0][0], label[0][2]};
    if (!TURNS) {
      // Of the four threads that share a row the first has columns 0 and 1, the next 2 and 3, ...
#pragma unroll
      for (int i = 0; i < 2; ++i) total[i] = __shfl_sync(0xffffffffu, total[i], to.lane & ~3);
    }
    // Else a query sees every key.
    const float inverse[2] = {STARTS && total[0] == 0.0f ? 0.0f : inverse_of(total[0]),
                              STARTS && total[1] == 0.0f ? 0.0f : inverse_of(total[1])};
    const bool is_odd = to.lane % 2 != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < LABEL_BLOCKS; ++n) {
        const float first = label[n][2 * i], second = label[n][2 * i + 1];
        shares.label[n][i] =
            TURNS ? fmaf(second, inverse[i], shares.label[n][i]) : (is_odd ? first + second : second) * inverse[i];
      }
      if (WINDOWS && !TURNS) shares.weight[i] = label[0][2 * i] * inverse[i];
      if (OFFSETS && TURNS) shares.weight[i] += total[i] == 0.0f ? 0.0f : 1.0f;
    }
    // log2(0) plus the maximum, -inf, is -inf: a query that sees no key.
    const float log_sum = (is_odd ? highest[1] : highest[0]) + log2_of(is_odd ? total[1] : total[0]);
    if (to.is_query && to.lane % 4 < 2) *to.log_sum_exp = log_sum * LN_2;
    return make_float2(inverse[0], inverse[1]);
  }

  // The label of a source, which is the sum of its parts, and what the mean over the heads divides it by, if it is not
  // their number: in windows the part of the attention that goes to labels.
  // Of the four threads that share two rows the even ones have those of the first row, the odd ones of the second. A
  // thread has both, where blocks take heads in turn, so that two threads write the same: in windows, if it is one of
  // the first two. Elsewhere the first two have the label of a source, the others that of the next.
  struct RowShare {
    float label, weight;
  };
  __device__ RowShare row_share(const Shares& shares, int n, unsigned lane) const {
    const auto from = [](float x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); };
    const bool is_odd = lane % 2 != 0;
    const float own = is_odd ? shares.label[n][1] : shares.label[n][0];
    const float other = from(is_odd ? shares.label[n][0] : shares.label[n][1], 1);
    if constexpr (!TURNS) {
      // Column 4.
      const float weight[2] = {__shfl_sync(0xffffffffu, shares.weight[0], lane & ~3 | 2),
                               __shfl_sync(0xffffffffu, shares.weight[1], lane & ~3 | 2)};
      return {own + other, is_odd ? weight[1] : weight[0]};
    } else if constexpr (WINDOWS) {
      // The third thread has the last part, the fourth what says which keys have labels.
      return {own + other + from(is_odd ? other : own, 2), from(is_odd ? own : other, 2)};
    } else {
      return {own + other + from(own + other, 2), is_odd ? shares.weight[1] : shares.weight[0]};
    }
  }

  __device__ void write_shares(const Shares& shares, const Numbers& to) const {
    RowShare rows[LABEL_BLOCKS];
#pragma unroll
    for (int n = 0; n < LABEL_BLOCKS; ++n) rows[n] = row_share(shares, n, to.lane);
    const bool is_first = to.is_query && to.lane % 4 < 2;
    if (p.sources == 0 || !(TURNS && WINDOWS ? is_first : to.is_query)) return;
    if (has_all_heads(p)) {
      if (WINDOWS && !window().has(to.query)) return;
      const uint64_t first = WINDOWS ? window().token_of_all(to.query) * unsigned(p.sources)
                                     : uint64_t(hidden(image)) * p.shares_of_queries + to.query * unsigned(p.sources);
      const HeadMean mean = STARTS ? HeadMean(p, rows[0].weight) : HeadMean(p);
#pragma unroll
      for (int n = 0; n < LABEL_BLOCKS; ++n) {
        if (n == 0 || n < p.sources) mean.write(p, first + n, rows[n].label);
      }
      return;
    }
    if (WINDOWS && is_first) head_share(p.sources, to.query) = rows[0].weight;
#pragma unroll
    for (int n = 0; n < LABEL_BLOCKS; ++n) {
      const unsigned source = TURNS ? n : 2 * n + to.lane % 4 / 2;
      if (source < p.sources) head_share(source, to.query) = rows[n].label;
    }
  }
  __device__ float& head_share(unsigned row, unsigned query) const {
    const unsigned queries = p.queries;
    if (WINDOWS) return p.head_share[(uint64_t(turn) * (p.sources + 1) + row) * queries + query];
    return p.head_share[uint64_t(turn) * p.shares_of_queries + (row * queries + query)];
  }
};

}  // namespace tlalign::cuda
