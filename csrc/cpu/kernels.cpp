// Attention with label propagation for one instruction set, from matrix products in registers.
//
// Scores are kept transposed, keys as rows and queries as lanes: the softmax is then a walk down the rows without a
// sum across lanes, and the share of a key a broadcast factor, one multiply-add per score. They are in units of ln 2,
// so that a power of two is all that the softmax takes. Keys and values of a block are copied into scratch as padded
// floats, once for all queries (short images and windows are read in place); what is computed from them never leaves
// the cache. Where images are windows of a map, its table of tokens is followed.
//
//   forward    for each block of keys, each panel of queries:  S = K Q^T and its maximum;  online softmax and share;
//              O = E^T V
//   backward   for each block of keys, each block of queries:  P = exp(K Q^T - lse);  dS = P (V dO^T - delta);
//              dQ += dS^T K;  dK += dS Q;  dV += P dO
//
// No function or template of the standard library is used here, see `vector.h`.
#include "kernels.h"

#include "vector.h"

namespace tlalign::cpu {
namespace {

constexpr float INFINITE = __builtin_inff();
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// Registers decide how many rows a tile of V vectors has: its sums, V vectors of the right factor and one broadcast.
#if TLALIGN_LANES == 16
constexpr int MAX_VECTORS = 4;
constexpr int TILE_ROWS[] = {0, 14, 12, 8, 6};
#elif TLALIGN_LANES == 8
constexpr int MAX_VECTORS = 3;
constexpr int TILE_ROWS[] = {0, 12, 6, 4};
#elif defined(__aarch64__)
constexpr int MAX_VECTORS = 4;
constexpr int TILE_ROWS[] = {0, 12, 12, 8, 6};
#else
constexpr int MAX_VECTORS = 2;
constexpr int TILE_ROWS[] = {0, 8, 4};
#endif

// Instructions that only bfloat16 has; compiled for them, all else would be the same as without.
#if defined(__AVX512BF16__)
constexpr bool ONLY_BFLOAT16 = true;
#else
constexpr bool ONLY_BFLOAT16 = false;
#endif

// Keys of a block at head dimension 64: N up to 272, that is all of ViT at 224 pixels, is one block.
constexpr int64_t KEY_BLOCK = 272;
constexpr int64_t QUERY_CHUNK = 272;  // of the forward, at most
// Of the backward: whole panels, 64 or a little more; of bfloat16, whose products are half as deep, twice as many.
constexpr int64_t PANEL = MAX_VECTORS * LANES;
constexpr int64_t QUERY_BLOCK = ((ONLY_BFLOAT16 ? 128 : 64) + PANEL - 1) / PANEL * PANEL;

constexpr int64_t LABEL_BLOCK = 64;  // labels of a pass over dense ones
// Rows that are read no more often than this aren't worth a copy: those of short windows.
constexpr int64_t MAX_REUSE_IN_PLACE = 4;
// A bias or mask that all images share is transposed once a task, if it is no larger than this.
constexpr int64_t OFFSET_CACHE = KEY_BLOCK * QUERY_CHUNK;
// Added to scores across regions, in units of ln 2: a trained Swin knows this number, not minus infinity.
constexpr float REGION_BIAS = -100 * LOG2_E;
// exp(score - log_sum_exp) is good to half a unit in the last place of the log-sum-exp: up to here to 2e-6.
constexpr float PRECISE_LOG_SUM_EXP = 32;

TLALIGN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TLALIGN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Of `floats`, a whole number of vectors: rows that are a multiple of two cache lines apart would crowd into few sets.
constexpr int64_t row_length(int64_t floats) { return floats % 32 == 0 ? floats + 16 : floats; }

// `total` in as few parts of at most `most` as there can be, sizes differing by at most one.
struct Split {
  int64_t count, base, extra;
  Split(int64_t total, int64_t most) : count((total + most - 1) / most), base(total / count), extra(total % count) {}
  int64_t begin(int64_t i) const { return i * base + smaller(i, extra); }
  int64_t size(int64_t i) const { return base + (i < extra); }
};

template <int V>
struct Vectors {
  static constexpr int count = V;
};

// Calls `work` with the number of vectors as a constant.
template <class Work>
TLALIGN_INLINE void with_vectors(int64_t vectors, Work work) {
  static_assert(MAX_VECTORS <= 4, "all numbers have their case");
  if (vectors == 1) return work(Vectors<1>{});
  if constexpr (MAX_VECTORS >= 2)
    if (vectors == 2) return work(Vectors<2>{});
  if constexpr (MAX_VECTORS >= 3)
    if (vectors == 3) return work(Vectors<3>{});
  if constexpr (MAX_VECTORS >= 4)
    if (vectors == 4) return work(Vectors<4>{});
}

// Calls `work` with an element of the type.
template <class Work>
void with_type(DType dtype, Work work) {
  if (dtype == DType::float32) return work(0.0f);
  if (dtype == DType::bfloat16) return work(BFloat16{});
  work(Float16{});
}

// The same of query, key, value, output and their gradients.
template <class Work>
void with_type_of_tokens(DType dtype, Work work) {
  if constexpr (ONLY_BFLOAT16)
    work(BFloat16{});
  else
    with_type(dtype, work);
}

// Rows in order of the tokens of an image: evenly strided, or, in a window, those that its table names.
template <class T>
struct TokenRows {
  T* data;
  int64_t stride;
  const int32_t* tokens;  // null: evenly strided
  T* padding;             // the row in the padding; null: there is none, or it is not to be written

  T* operator[](int64_t token) const {
    if (tokens == nullptr) return data + token * stride;
    return tokens[token] < 0 ? padding : data + tokens[token] * stride;
  }
  // Of which a row begins with one of its elements.
  TokenRows at(int64_t element) const { return {data + element, stride, tokens, padding}; }
  TokenRows from(int64_t token) const {
    if (tokens == nullptr) return {data + token * stride, stride, nullptr, padding};
    return {data, stride, tokens + token, padding};
  }
};

// Fetches rows that will be read or written next into the cache, spread over the work at hand: the strides of heads
// defeat the processor's own prefetching, and many lines at once fill its queue of misses and wait there. So do stores
// to what isn't in the cache.
class Prefetcher {
 public:
  // `work`, an estimate: vector operations until then. The last rows are fetched after eight tenths of them: many at
  // once are waited for, as is what comes late, and few queries make less work.
  explicit Prefetcher(int64_t work) : work_(work) {}

  template <class T>
  void add(const TokenRows<T>& source, int64_t rows, int64_t width) {
    row_bytes_ = width * sizeof(T);
    parts_[count_++] = {reinterpret_cast<const char*>(source.data), source.stride * static_cast<int64_t>(sizeof(T)),
                        source.tokens, rows};
    rows_ = larger(rows_, rows);
    interval_ = larger(work_ * 8 / 10 / rows_, 1);
  }

  // So many vector operations are done.
  void advance(int64_t work) {
    for (credit_ += work; credit_ >= interval_ && row_ < rows_; credit_ -= interval_, ++row_)
      for (const Part* part = parts_; part < parts_ + count_; ++part) {
        if (row_ >= part->rows) continue;
        const int64_t token = part->tokens == nullptr ? row_ : larger(part->tokens[row_], 0);
        const char* row = part->data + token * part->stride;
        for (const char* line = row; line < row + row_bytes_; line += LINE)
          __builtin_prefetch(line, 0, 2);  // into the second level
      }
  }

 private:
  static constexpr int64_t LINE = 64;
  struct Part {
    const char* data;
    int64_t stride;
    const int32_t* tokens;
    int64_t rows;
  };
  Part parts_[8];
  int64_t work_, row_bytes_ = 0, row_ = 0, rows_ = 0, interval_ = 1, credit_ = 0;
  int count_ = 0;
};

// Vector operations that the softmax, or its gradient, takes for a vector of scores; rows of scores between fetches.
constexpr int64_t SOFTMAX_WORK = 16, GRADIENT_WORK = 24, ROWS_BETWEEN_FETCHES = 4;

// Matrix products

// Rows of a factor, floats or words of two bfloat16.
struct Factor {
  const float* data;
  int64_t row;
  const int32_t* tokens = nullptr;  // where the rows lie; null: after one another
  const float* operator[](int64_t i) const { return data + (tokens == nullptr ? i : tokens[i]) * row; }
  Factor from(int64_t i) const {
    return tokens == nullptr ? Factor{data + i * row, row} : Factor{data, row, tokens + i};
  }
};

// Sums: C = scale . (A B + init_scale . init), scales by row. Scores: C = factor A B + offset, and `maximum` becomes
// that of its columns. Rows of A lie along memory, or across it (A transposed); a table of tokens can name those along
// memory, or, beside an A across it, the rows of B. A and B hold floats, or words of two bfloat16 that follow one
// another along the depth, which then counts words.
struct Product {
  Factor a;
  float* c;
  int64_t c_row;
  Factor b = {};
  int64_t depth = 0;
  const float* init = nullptr;  // null: 0
  int64_t init_row = 0;
  const float* init_scale = nullptr;  // null: 1
  const float* scale = nullptr;       // null: 1
  const int32_t* c_tokens = nullptr;  // the row of C for each of A; null: as they lie
  bool streams = false;               // C past the caches
  bool rounds = false;                // C holds bfloat16; of products of pairs only
  float factor = 1.0f;
  const float* offset = nullptr;  // null: 0
  int64_t offset_row = 0;
  float* maximum = nullptr;  // null: not wanted
  Prefetcher* prefetcher = nullptr;
};

template <bool PAIRS>
TLALIGN_INLINE Vector add_product(Vector sum, Vector left, Vector right) {
  if constexpr (PAIRS) return add_products(sum, bits<UintVector>(left), bits<UintVector>(right));
  return sum + left * right;
}

// The same of one word for all lanes.
template <bool PAIRS>
TLALIGN_INLINE Vector add_product(Vector sum, const float* left, Vector right) {
  if constexpr (PAIRS) {
    uint32_t word;
    memcpy(&word, left, sizeof word);
    return add_products(sum, UintVector{} + word, bits<UintVector>(right));
  } else {
    return sum + broadcast(*left) * right;
  }
}

template <int R, int V, bool ACROSS, bool PAIRS, bool FOLLOWS_TOKENS>
__attribute__((noinline)) void multiply_tile(const Product& p, int64_t row, int64_t column) {
  const int64_t a_row = p.a.row, b_row = p.b.row;
  const float* b = p.b.data + column;
  const int32_t* b_tokens = p.b.tokens;
  // A pointer for three rows: an address can add once or twice the stride, so that no more registers are needed.
  constexpr int OF_POINTER = FOLLOWS_TOKENS ? 1 : 3, POINTERS = ACROSS ? 1 : (R + OF_POINTER - 1) / OF_POINTER;
  const float* a[POINTERS];
  for (int g = 0; g < POINTERS; ++g)
    a[g] = p.a.data + (ACROSS ? row : (FOLLOWS_TOKENS ? p.a.tokens[row + g] : row + OF_POINTER * g) * a_row);
  Vector sums[R][V];
  TLALIGN_UNROLL
  for (int r = 0; r < R; ++r) {
    TLALIGN_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = Vector{};
  }
  for (int64_t k = p.depth; k > 0; --k) {
    if constexpr (ACROSS && FOLLOWS_TOKENS) b = p.b.data + *b_tokens++ * b_row + column;
    Vector right[V];
    TLALIGN_UNROLL
    for (int v = 0; v < V; ++v) right[v] = load(b + v * LANES);
    TLALIGN_UNROLL
    for (int r = 0; r < R; ++r) {
      const float* left = ACROSS ? a[0] + r : a[r / OF_POINTER] + r % OF_POINTER * a_row;
      TLALIGN_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] = add_product<PAIRS>(sums[r][v], left, right[v]);
    }
    TLALIGN_UNROLL
    for (int g = 0; g < POINTERS; ++g) a[g] += ACROSS ? a_row : 1;
    if constexpr (!(ACROSS && FOLLOWS_TOKENS)) b += b_row;
  }
  // The conditions outside, not at each vector.
  const auto each = [&](auto work) __attribute__((always_inline)) {
    TLALIGN_UNROLL
    for (int r = 0; r < R; ++r) {
      TLALIGN_UNROLL
      for (int v = 0; v < V; ++v) work(sums[r][v], r, v * LANES);
    }
  };
  if (p.init != nullptr) {
    const float* init = p.init + row * p.init_row + column;
    const int64_t init_row = p.init_row;
    if (p.init_scale != nullptr)
      each([&](Vector& sum, int r, int lane) { sum += load(init + r * init_row + lane) * p.init_scale[row + r]; });
    else
      each([&](Vector& sum, int r, int lane) { sum += load(init + r * init_row + lane); });
  }
  if (p.scale != nullptr) each([&](Vector& sum, int r, int) { sum *= p.scale[row + r]; });
  if constexpr (!ACROSS) {
    if (p.offset != nullptr) {
      const float* offset = p.offset + row * p.offset_row + column;
      const int64_t offset_row = p.offset_row;
      each([&](Vector& sum, int r, int lane) { sum = sum * p.factor + load(offset + r * offset_row + lane); });
    } else if (p.factor != 1.0f) {
      each([&](Vector& sum, int, int) { sum *= p.factor; });
    }
    if (p.maximum != nullptr) {
      TLALIGN_UNROLL
      for (int v = 0; v < V; ++v) {
        float* at = p.maximum + column + v * LANES;
        Vector highest = load(at);
        TLALIGN_UNROLL
        for (int r = 0; r < R; ++r) highest = maximum(sums[r][v], highest);
        store(at, highest);
      }
    }
  }
  // Known before the first of them is written, which might be anywhere.
  int64_t at[R];
  TLALIGN_UNROLL
  for (int r = 0; r < R; ++r) at[r] = (p.c_tokens == nullptr ? row + r : p.c_tokens[row + r]) * p.c_row + column;
  float* c = p.c;
  if constexpr (PAIRS) {
    if (p.rounds)
      return each([&](Vector& sum, int r, int lane) { store(reinterpret_cast<BFloat16*>(c) + at[r] + lane, sum); });
  }
  if (p.streams)
    each([&](Vector& sum, int r, int lane) { stream(c + at[r] + lane, sum); });
  else
    each([&](Vector& sum, int r, int lane) { store(c + at[r] + lane, sum); });
}

using TileFunction = void (*)(const Product&, int64_t row, int64_t column);

template <int V, bool ACROSS, bool PAIRS, bool FOLLOWS_TOKENS, int R = TILE_ROWS[V]>
TLALIGN_INLINE TileFunction tile_of(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return tile_of<V, ACROSS, PAIRS, FOLLOWS_TOKENS, R - 1>(rows);
  }
  return &multiply_tile<R, V, ACROSS, PAIRS, FOLLOWS_TOKENS>;
}

template <bool ACROSS, bool PAIRS = false, bool FOLLOWS_TOKENS = false>
void multiply(const Product& p, int64_t rows, int64_t vectors) {
  if constexpr (!PAIRS && !FOLLOWS_TOKENS)
    if ((ACROSS ? p.b : p.a).tokens != nullptr) return multiply<ACROSS, PAIRS, true>(p, rows, vectors);
  const Split columns(vectors, MAX_VECTORS);
  for (int64_t j = 0; j < columns.count; ++j)
    with_vectors(columns.size(j), [&](auto width) {
      constexpr int V = decltype(width)::count;
      const Split tiles(rows, TILE_ROWS[V]);
      const int64_t column = columns.begin(j) * LANES;
      int64_t row = 0;
      const auto multiply_tiles = [&](int64_t count, int64_t size) {
        const TileFunction tile = tile_of<V, ACROSS, PAIRS, FOLLOWS_TOKENS>(size);
        for (int64_t i = 0; i < count; ++i, row += size) {
          tile(p, row, column);
          if (p.prefetcher != nullptr) p.prefetcher->advance(size * V * p.depth);
        }
      };
      if (tiles.extra > 0) multiply_tiles(tiles.extra, tiles.base + 1);
      multiply_tiles(tiles.count - tiles.extra, tiles.base);
    });
}

// Copies between tensors and scratch

// Whether products take the numbers of a tensor as pairs of bfloat16, not as floats.
template <class T>
constexpr bool PAIRED = false;
template <>
constexpr bool PAIRED<BFloat16> = ONLY_BFLOAT16;

// Words along the depth of a product of so many numbers.
template <bool PAIRS>
TLALIGN_INLINE int64_t words_of(int64_t numbers) {
  return PAIRS ? (numbers + 1) / 2 : numbers;
}

// LANES words from the first `count` elements, the others 0.
template <bool PAIRS, class T>
TLALIGN_INLINE Vector load_words_of(const T* p, int64_t count) {
  if constexpr (PAIRS) {
    Vector words = {};
    memcpy(&words, p, static_cast<size_t>(smaller(count, 2 * LANES)) * sizeof(T));
    return words;
  } else {
    return load_first(p, count);
  }
}

// `count` rows of `width` elements as words, filled up with zeros to whole vectors.
template <bool PAIRS = false, class T>
void pack_rows(const TokenRows<T> source, int64_t count, int64_t width, float* rows, int64_t row) {
  constexpr int64_t STEP = PAIRS ? 2 * LANES : LANES;
  // Outside of the loops, what all rows have in common.
  const auto pack = [&](auto whole) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; ++i, rows += row) {
      const T* from = source[i];
      for (int64_t d = 0; d < width; d += STEP)
        store(rows + d / STEP * LANES, load_words_of<PAIRS>(from + d, decltype(whole)::count ? STEP : width - d));
    }
  };
  width % STEP == 0 ? pack(Vectors<1>{}) : pack(Vectors<0>{});
}

// The same rows as columns of words: (words, vectors * LANES), 0 in the lanes beyond `count`. Floats are multiplied
// with `factor`.
template <bool PAIRS = false, class T>
void pack_columns(const TokenRows<T> source, int64_t count, int64_t width, float factor, float* columns, int64_t row,
                  int64_t vectors) {
  constexpr int64_t STEP = PAIRS ? 2 * LANES : LANES;
  for (int64_t lane = 0; lane < vectors * LANES; lane += LANES) {
    const T* from[LANES];
    for (int i = 0; i < LANES; ++i) from[i] = lane + i < count ? source[lane + i] : nullptr;
    for (int64_t d = 0; d < width; d += STEP) {
      const int64_t present = smaller(width - d, STEP), words = words_of<PAIRS>(present);
      Vector square[LANES];
      if (lane + LANES <= count && present == STEP) {
        for (int i = 0; i < LANES; ++i) square[i] = load_words_of<PAIRS>(from[i] + d, STEP);
      } else {
        for (int i = 0; i < LANES; ++i)
          square[i] = from[i] != nullptr ? load_words_of<PAIRS>(from[i] + d, present) : Vector{};
      }
      transpose(square);
      for (int i = 0; i < words; ++i)
        store(columns + (d / STEP * LANES + i) * row + lane, PAIRS ? square[i] : square[i] * factor);
    }
  }
}

// A row of what isn't there: of the padding in some tensors.
alignas(64) const char ZEROS[256 * sizeof(float)] = {};

// Two rows after one another as one row of pairs, an odd one with zeros.
[[maybe_unused]] void pair_rows(const TokenRows<BFloat16> source, int64_t count, int64_t width, float* rows,
                                int64_t row) {
  const auto pack = [&](auto whole) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; i += 2, rows += row) {
      const BFloat16 *even = source[i], *odd = i + 1 < count ? source[i + 1] : reinterpret_cast<const BFloat16*>(ZEROS);
      for (int64_t d = 0; d < width; d += LANES) {
        const int64_t present = decltype(whole)::count ? LANES : width - d;
        const Vector first = load_first(even + d, present), second = load_first(odd + d, present);
        store(rows + d, bits<Vector>(bits<UintVector>(first) >> 16 | bits<UintVector>(second)));
      }
    }
  };
  width % LANES == 0 ? pack(Vectors<1>{}) : pack(Vectors<0>{});
}

// Rows of floats to the tensor; what lies in the padding is added to `padding_sum` (width), or dropped if that is null.
template <class T>
void unpack_rows(const float* rows, int64_t row, int64_t count, int64_t width, const TokenRows<T> target,
                 bool streams = false, float* padding_sum = nullptr) {
  for (int64_t i = 0; i < count; ++i, rows += row) {
    T* to = target[i];
    if (to == nullptr) {
      for (int64_t d = 0; padding_sum != nullptr && d < width; ++d) padding_sum[d] += rows[d];
    } else if (streams) {
      for (int64_t d = 0; d < width; d += LANES) stream(reinterpret_cast<float*>(to + d), load(rows + d));
    } else {
      for (int64_t d = 0; d < width; d += LANES) store_first(to + d, load(rows + d), width - d);
    }
  }
}

// Whether products write their results as rows of the tensor itself.
template <class T>
bool writes_in_place(const Problem& p, bool padded) {
  return (sizeof(T) == sizeof(float) || PAIRED<T>) && p.head_dim % LANES == 0 && !padded;
}

// Whether even sums that are not complete can be kept there.
bool sums_in_place(const Problem& p) {
  return p.dtype == DType::float32 && p.windows.count == 0 && writes_in_place<float>(p, false);
}

// Whether results of so many floats are written past the caches, which they would only fill.
bool streams(const Problem& p, const Rows& rows, int64_t floats) {
  constexpr int64_t SMALLEST = 2 << 20;
  constexpr uint64_t VECTOR = sizeof(Vector);
  const uint64_t strides = static_cast<uint64_t>(rows.image | rows.head | rows.row | p.head_dim) * sizeof(float);
  return p.dtype == DType::float32 && floats >= SMALLEST &&
         (reinterpret_cast<uintptr_t>(rows.data) | strides) % VECTOR == 0;
}

// Rows of one image and head. `padding`: see `TokenRows`.
template <class T>
TLALIGN_INLINE TokenRows<T> rows_of(const Problem& p, const Rows& rows, int64_t image, int64_t head,
                                    const void* padding = nullptr) {
  T* data = reinterpret_cast<T*>(rows.data) + head * rows.head;
  const Windows& w = p.windows;
  if (w.count == 0) return {data + image * rows.image, rows.row, nullptr, nullptr};
  return {data + image / w.count * rows.image, rows.row, w.tokens + image % w.count * p.queries,
          static_cast<T*>(const_cast<void*>(padding))};
}

// Row of the query (0), key (1) or value (2) in the padding.
template <class T>
TLALIGN_INLINE const T* padding_of(const Problem& p, int64_t which, int64_t head) {
  if (p.windows.padding == nullptr) return nullptr;
  return reinterpret_cast<const T*>(p.windows.padding) + (which * p.heads + head) * p.head_dim;
}

template <class T>
struct QueryKeyValue {
  TokenRows<T> query, key, value;
  QueryKeyValue(const Problem& p, int64_t image, int64_t head, bool padded)
      : query(rows_of<T>(p, p.query, image, head, padded ? padding_of<T>(p, 0, head) : nullptr)),
        key(rows_of<T>(p, p.key, image, head, padded ? padding_of<T>(p, 1, head) : nullptr)),
        value(rows_of<T>(p, p.value, image, head, padded ? padding_of<T>(p, 2, head) : nullptr)) {}
};

// Labels of an image, from one of the sources on.
TLALIGN_INLINE TokenRows<float> labels_of(const Problem& p, const float* labels, int64_t image, int64_t tokens,
                                          int64_t source) {
  auto* data = reinterpret_cast<char*>(const_cast<float*>(labels + source));
  const int64_t of_image = (p.windows.count == 0 ? tokens : p.windows.map_tokens) * p.sources;
  return rows_of<float>(p, {data, of_image, 0, p.sources}, image, 0, ZEROS);
}

// Whether some tokens of a window are padding.
bool is_padded(const Problem& p, int64_t image) {
  if (p.windows.padding == nullptr) return false;
  const int32_t* tokens = p.windows.tokens + image % p.windows.count * p.queries;
  int32_t signs = 0;
  for (int64_t i = 0; i < p.queries; ++i) signs |= tokens[i];
  return signs < 0;
}

// Regions of the tokens of a window, or null if all lie in one.
const int32_t* regions_of(const Problem& p, int64_t image) {
  if (p.windows.regions == nullptr) return nullptr;
  const int32_t* regions = p.windows.regions + image % p.windows.count * p.queries;
  int32_t differences = 0;
  for (int64_t i = 1; i < p.queries; ++i) differences |= regions[i] ^ regions[0];
  return differences == 0 ? nullptr : regions;
}

// Rows as left factor of a product along them: in place if they are words in whole vectors and `reuse`, how often they
// are read, is small, else a copy, which lies closer together. Those of a window are floats there, and none is padding.
template <class T>
Factor left_factor(const Problem& p, const TokenRows<T>& rows, int64_t count, int64_t reuse, float* scratch,
                   int64_t scratch_row) {
  constexpr int64_t PER_WORD = sizeof(float) / sizeof(T);
  const bool has_words =
      (PER_WORD == 1 || PAIRED<T>) && p.head_dim % (LANES * PER_WORD) == 0 && rows.stride % PER_WORD == 0;
  const bool is_whole = rows.tokens == nullptr || (PER_WORD == 1 && rows.padding == nullptr);
  if (has_words && is_whole && reuse <= MAX_REUSE_IN_PLACE)
    return {reinterpret_cast<const float*>(rows.data), rows.stride / PER_WORD, rows.tokens};
  pack_rows<PAIRED<T>>(rows, count, p.head_dim, scratch, scratch_row);
  return {scratch, scratch_row};
}

// Rows as right factor of a product across them; `across`: whether the rows of the left one lie across memory.
template <class T>
Factor right_factor(const Problem& p, bool across, const TokenRows<T>& rows, int64_t count, int64_t reuse,
                    float* scratch, int64_t scratch_row) {
  if constexpr (PAIRED<T>)
    pair_rows(rows, count, p.head_dim, scratch, scratch_row);
  else if (across || rows.tokens == nullptr)
    return left_factor<T>(p, rows, count, reuse, scratch, scratch_row);
  else
    pack_rows(rows, count, p.head_dim, scratch, scratch_row);
  return {scratch, scratch_row};
}

// What is added to the scores, transposed, in units of ln 2.
struct OffsetColumns {
  const float* data = nullptr;  // null: there is nothing to add
  int64_t row = 0;
  OffsetColumns from(int64_t lane) const { return {data == nullptr ? nullptr : data + lane, row}; }
};

// Finite numbers are brought to the greatest of float16, as masks are before: beside -1e9 float32 rounds scores away.
TLALIGN_INLINE Vector within_reach(Vector number) {
  constexpr float GREATEST = 65504;
  number = ((number > GREATEST) & (number < INFINITE)) ? broadcast(GREATEST) : number;
  return ((number < -GREATEST) & (number > -INFINITE)) ? broadcast(-GREATEST) : number;
}

// Writes the offsets of some queries and keys as columns, or adds them to what is there.
void pack_offsets(const Offsets& offsets, bool adds, int64_t image, int64_t head, int64_t query, int64_t queries,
                  int64_t key, int64_t keys, float* columns, int64_t row, int64_t vectors) {
  const auto pack = [&](auto element) {
    const auto* first = reinterpret_cast<const decltype(element)*>(offsets.data) + image * offsets.image +
                        head * offsets.head + query * offsets.query + key * offsets.key;
    for (int64_t lane = 0; lane < vectors * LANES; lane += LANES)
      for (int64_t j = 0; j < keys; j += LANES) {
        const int64_t present = smaller(keys - j, LANES);
        Vector square[LANES];
        for (int i = 0; i < LANES; ++i) {
          const auto* at = first + (lane + i) * offsets.query + j * offsets.key;
          square[i] = lane + i < queries ? load_strided(at, offsets.key, present) : Vector{};
        }
        transpose(square);
        for (int i = 0; i < present; ++i) {
          float* at = columns + (j + i) * row + lane;
          store(at, within_reach(square[i]) * LOG2_E + (adds ? load(at) : Vector{}));
        }
      }
  };
  if (offsets.dtype == DType::boolean)
    pack(Boolean{});
  else
    with_type(offsets.dtype, pack);
}

// Bias, mask and regions of a problem, and their sum as the kernels read it. What images share is summed once a task,
// for all queries and keys of `heads` heads from the first on, if it is small; the rest, or all if `heads` is 0, once a
// panel.
class OffsetReader {
 public:
  // Floats of scratch for panels of `lanes` queries and `keys` keys.
  static int64_t scratch(const Problem& p, int64_t heads, int64_t keys, int64_t lanes) {
    if (p.bias.data == nullptr && p.mask.data == nullptr && p.windows.regions == nullptr) return 0;
    return (is_shared(p, p.bias) || is_shared(p, p.mask) ? heads * shared_offsets(p, LANES) : 0) + keys * lanes;
  }

  OffsetReader(const Problem& problem, int64_t first_head, int64_t heads, float* scratch)
      : problem_(problem),
        first_head_(first_head),
        cache_(scratch),
        panel_(scratch),
        padded_(padded_queries(problem, LANES)) {
    const Offsets* const both[] = {&problem.bias, &problem.mask};
    for (const Offsets* offsets : both) {
      if (offsets->data == nullptr) continue;
      if (heads == 0 || !is_shared(problem, *offsets)) {
        varying_[varying_count_++] = offsets;
        continue;
      }
      for (int64_t head = first_head; head < first_head + heads; ++head)
        pack_offsets(*offsets, has_cache_, 0, head, 0, problem.queries, 0, problem.keys, cache_of(head), padded_,
                     padded_ / LANES);
      has_cache_ = true;
      panel_ = cache_of(first_head + heads);
    }
  }

  OffsetColumns panel(int64_t image, int64_t head, int64_t query, int64_t vectors, int64_t key, int64_t keys) const {
    const OffsetColumns cached{has_cache_ ? cache_of(head) + key * padded_ + query : nullptr, padded_};
    const int32_t* regions = regions_of(problem_, image);
    if (varying_count_ == 0 && regions == nullptr) return cached;
    const int64_t lanes = vectors * LANES;
    for (int i = 0; i < varying_count_; ++i)
      pack_offsets(*varying_[i], i > 0, image, head, query, smaller(problem_.queries - query, lanes), key, keys, panel_,
                   lanes, vectors);
    for (int64_t lane = 0; (has_cache_ || regions != nullptr) && lane < lanes; lane += LANES) {
      IntVector own = {};
      if (regions != nullptr)
        own = bits<IntVector>(
            load_first(reinterpret_cast<const float*>(regions + query + lane), problem_.queries - query - lane));
      for (int64_t j = 0; j < keys; ++j) {
        float* at = panel_ + j * lanes + lane;
        Vector sum = varying_count_ > 0 ? load(at) : Vector{};
        if (has_cache_) sum += load(cached.data + j * padded_ + lane);
        if (regions != nullptr) sum += own == regions[key + j] ? Vector{} : broadcast(REGION_BIAS);
        store(at, sum);
      }
    }
    return {panel_, lanes};
  }

 private:
  static bool is_shared(const Problem& p, const Offsets& offsets) {
    return offsets.data != nullptr && offsets.image == 0 && shared_offsets(p, LANES) <= OFFSET_CACHE;
  }
  float* cache_of(int64_t head) const { return cache_ + (head - first_head_) * shared_offsets(problem_, LANES); }

  const Problem& problem_;
  int64_t first_head_;
  float *cache_, *panel_;
  int64_t padded_;
  bool has_cache_ = false;
  const Offsets* varying_[2] = {};
  int varying_count_ = 0;
};

// The image and head after this one in a task, or where its thread will probably go on.
struct Next {
  int64_t image, head;
  Next(const Task& task, int64_t now_image, int64_t now_head) : image(now_image), head(now_head + 1) {
    if (head < task.first_head + task.heads) return;
    head = task.first_head;
    ++image;
    if (image < task.first_image + task.images) return;
    image = task.next_image;
    head = task.next_head;
  }
};

template <class T>
void prefetch_rows(Prefetcher& prefetcher, const Problem& p, const Rows& rows, const Next& next, int64_t first,
                   int64_t count) {
  prefetcher.add(rows_of<T>(p, rows, next.image, next.head).from(first), count, p.head_dim);
}

// Hands out parts of the scratch, each on its own cache lines. Asked with a null pointer it only counts.
class Arena {
 public:
  explicit Arena(float* scratch) : scratch_(scratch) {}
  float* take(int64_t floats) {
    float* part = scratch_ == nullptr ? nullptr : scratch_ + used_;
    used_ += (floats + 15) / 16 * 16;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  float* scratch_;
  int64_t used_ = 0;
};

// Sizes that all kernels derive from the problem.
struct Plan {
  int64_t width_vectors, row;  // of a packed row of head_dim floats
  Split keys;                  // blocks of keys

  explicit Plan(const Problem& p)
      : width_vectors((p.head_dim + LANES - 1) / LANES),
        row(row_length(width_vectors * LANES)),
        keys(p.keys, KEY_BLOCK * 64 / (width_vectors * LANES > 64 ? width_vectors * LANES : 64)) {}
  int64_t key_block() const { return keys.size(0); }
};

// Dropout

// The first word of Philox4x32-10 (Salmon et al., SC 2011), as the reference computes it.
TLALIGN_INLINE UintVector philox(LongVector index, uint64_t seed) {
  constexpr uint64_t WORD = 0xffffffff;
  LongVector counter[4] = {index & WORD, index >> 32, LongVector{}, LongVector{}};
  uint64_t key[2] = {seed & WORD, seed >> 32};
  for (int round = 0; round < 10; ++round) {
    const LongVector first = counter[0] * 0xD2511F53, second = counter[2] * 0xCD9E8D57;
    counter[0] = (second >> 32) ^ counter[1] ^ key[0];
    counter[1] = second & WORD;
    counter[2] = (first >> 32) ^ counter[3] ^ key[1];
    counter[3] = first & WORD;
    key[0] = (key[0] + 0x9E3779B9) & WORD;
    key[1] = (key[1] + 0xBB67AE85) & WORD;
  }
  return __builtin_convertvector(counter[0], UintVector);
}

// What attention weights are multiplied with: 0, or 1 / (1 - p).
class Dropout {
 public:
  Dropout(const Problem& p, int64_t image, int64_t head) : seed_(p.dropout_seed), keys_(p.keys) {
    const double threshold = p.dropout_p * 4294967296.0 + 0.5;
    threshold_ = threshold >= 4294967295.0 ? 0xffffffff : static_cast<uint32_t>(threshold);
    kept_ = static_cast<float>(1.0 / (1.0 - p.dropout_p));
    first_ = (image * p.heads + head) * p.queries * p.keys;
    for (int lane = 0; lane < LANES; ++lane) lanes_[lane] = lane * p.keys;
  }
  // Of the weights of LANES queries and one key.
  Vector factor(int64_t query, int64_t key) const {
    const LongVector index = lanes_ + static_cast<uint64_t>(first_ + query * keys_ + key);
    return philox(index, seed_) >= threshold_ ? broadcast(kept_) : Vector{};
  }

 private:
  uint64_t seed_;
  int64_t keys_, first_;
  uint32_t threshold_;
  float kept_;
  LongVector lanes_;
};

// Products of keys and queries

// A last vector of at most so many queries isn't worth a product of whole vectors.
constexpr int64_t MAX_FEW = LANES / 8;

// Products of one query and LANES keys, one to a lane: sums along the rows, the last of `present` keys repeated.
template <class T>
TLALIGN_INLINE Vector multiply_one(const T* query, const Factor& keys, int64_t present, int64_t width) {
  if (present == 1) {
    Vector product = {};
    for (int64_t d = 0; d < width; d += LANES) product += load(keys[0] + d) * load_first(query + d, width - d);
    return fold(product, plus);
  }
  const float* rows[LANES];
  for (int i = 0; i < LANES; ++i) rows[i] = keys[smaller(i, present - 1)];
  Vector products[LANES] = {};
  for (int64_t d = 0; d < width; d += LANES) {
    const Vector right = load_first(query + d, width - d);
    TLALIGN_UNROLL
    for (int i = 0; i < LANES; ++i) products[i] += load(rows[i] + d) * right;
  }
  return sum_rows(products);
}

// One column of vectors of a product as scores, for a few queries, the last of them repeated in the lanes beyond. The
// right factor of the product is not used.
template <class T>
void multiply_few(const Product& product, int64_t keys, const TokenRows<T> queries, int64_t count, int64_t width) {
  const Product p = product;  // which no store can change
  Vector highest = p.maximum != nullptr ? load(p.maximum) : Vector{};
  for (int64_t j = 0; j < keys; j += LANES) {
    const int64_t present = smaller(keys - j, LANES);
    Vector sums[MAX_FEW];
    TLALIGN_UNROLL
    for (int q = 0; q < MAX_FEW; ++q)
      if (q < count) sums[q] = multiply_one(queries[q], p.a.from(j), present, width);
    for (int64_t i = 0; i < present; ++i) {
      Vector score = broadcast(sums[0][i]);
      TLALIGN_UNROLL
      for (int q = 1; q < MAX_FEW; ++q) score = q < count && LANE_NUMBERS >= q ? broadcast(sums[q][i]) : score;
      score *= p.factor;
      if (p.offset != nullptr) score += load(p.offset + (j + i) * p.offset_row);
      highest = maximum(score, highest);
      store(p.c + (j + i) * p.c_row, score);
    }
  }
  if (p.maximum != nullptr) store(p.maximum, highest);
}

// The product, as scores, of the keys of a block and V vectors of queries, `rows` from `query` on, packed into
// `columns`. Floats take the product's factor there: queries are fewer than scores.
template <int V, bool PAIRS, class T>
void multiply_queries(Product product, const Problem& p, const TokenRows<T>& rows, int64_t query, int64_t keys,
                      float* columns) {
  constexpr bool TAKES_FEW = !PAIRS && MAX_FEW > 0;
  const TokenRows<T> first = rows.from(query);
  const int64_t queries = smaller(p.queries - query, V * LANES), few = queries - (V - 1) * LANES;
  const int64_t vectors = TAKES_FEW && few <= MAX_FEW ? V - 1 : V;
  const float factor = product.factor;
  pack_columns<PAIRS>(first, queries, p.head_dim, factor, columns, V * LANES, vectors);
  product.factor = PAIRS ? factor : 1.0f;
  product.depth = words_of<PAIRS>(p.head_dim);
  product.b = {columns, V * LANES};
  if (vectors > 0) multiply<false, PAIRS>(product, keys, vectors);
  if constexpr (TAKES_FEW) {
    if (vectors == V) return;
    constexpr int64_t LANE = (V - 1) * LANES;
    product.factor = factor;
    product.c += LANE;
    if (product.offset != nullptr) product.offset += LANE;
    if (product.maximum != nullptr) product.maximum += LANE;
    multiply_few(product, keys, first.from(LANE), few, p.head_dim);
  }
}

// Scores of the keys of a block, (keys, V vectors), and in `maximum` (unless null) the maximum of each query.
template <int V, bool PAIRS, class T>
void multiply_scores(const Problem& p, const TokenRows<T>& queries, int64_t query, Factor key_rows, int64_t keys,
                     OffsetColumns offsets, float* columns, float* scores, int64_t row, float* maximum,
                     Prefetcher* prefetcher = nullptr) {
  Product product{key_rows, scores, row};
  product.factor = p.scale * LOG2_E;
  product.offset = offsets.data;
  product.offset_row = offsets.row;
  product.maximum = maximum;
  product.prefetcher = prefetcher;
  multiply_queries<V, PAIRS>(product, p, queries, query, keys, columns);
}

// Forward

// Softmax over the keys, block after block: what is known of the queries of a panel so far.
struct RunningSoftmax {
  float *maximum, *sum, *share;  // share: (S, share_row)
  int64_t share_row;
  RunningSoftmax from(int64_t lane) const { return {maximum + lane, sum + lane, share + lane, share_row}; }
};

// Scores (keys, V vectors) become exp(score - maximum), with PAIR those of two keys after one another a row of pairs:
// row i of the pairs takes that of the scores. `keep`, the maximum before these keys, becomes what earlier results are
// to be multiplied with.
template <int V, bool SHARE, bool PAIR>
void softmax_panel(float* scores, int64_t row, int64_t keys, const float* share, const RunningSoftmax& running,
                   float* keep, Prefetcher& prefetcher) {
  Vector shift[V], sum[V], mixed[V];
  TLALIGN_UNROLL
  for (int v = 0; v < V; ++v) {
    const Vector highest = load(running.maximum + v * LANES);
    shift[v] = highest == -INFINITE ? Vector{} : highest;  // no key seen yet: keep infinities apart
    const Vector kept = power_of_two(load(keep + v * LANES) - shift[v]);
    store(keep + v * LANES, kept);
    sum[v] = load(running.sum + v * LANES) * kept;
    if (SHARE) mixed[v] = load(running.share + v * LANES) * kept;
  }
  const auto add = [&](Vector weight, int64_t j, int v) __attribute__((always_inline)) {
    sum[v] += weight;
    if (SHARE) mixed[v] += weight * share[j];
  };
  const auto weigh = [&](int64_t j, int v) __attribute__((always_inline)) {
    const Vector weight = power_of_two(load(scores + j * row + v * LANES) - shift[v]);
    if (PAIR) add(weight, j, v);
    return weight;
  };
  // Floats are summed so many rows later: what waits for a power of two leaves the processor less room for others.
  constexpr int64_t DELAY = 8;
  const auto add_row = [&](int64_t j) __attribute__((always_inline)) {
    TLALIGN_UNROLL
    for (int v = 0; v < V; ++v) add(load(scores + j * row + v * LANES), j, v);
  };
  const int64_t whole = PAIR ? keys / 2 * 2 : keys;
  for (int64_t j = 0; j < whole; j += PAIR ? 2 : 1) {
    if (j % ROWS_BETWEEN_FETCHES == 0) prefetcher.advance(ROWS_BETWEEN_FETCHES * V * SOFTMAX_WORK);
    TLALIGN_UNROLL
    for (int v = 0; v < V; ++v) {
      Vector weight = weigh(j, v);
      if constexpr (PAIR) weight = bits<Vector>(pair(weight, weigh(j + 1, v)));
      store(scores + (PAIR ? j / 2 : j) * row + v * LANES, weight);
    }
    if (!PAIR && j >= DELAY) add_row(j - DELAY);
  }
  for (int64_t j = larger(keys - DELAY, 0); !PAIR && j < keys; ++j) add_row(j);
  if (whole < keys) TLALIGN_UNROLL
  for (int v = 0; v < V; ++v)
    store(scores + whole / 2 * row + v * LANES, bits<Vector>(pair(weigh(whole, v), Vector{})));
  TLALIGN_UNROLL
  for (int v = 0; v < V; ++v) {
    store(running.sum + v * LANES, sum[v]);
    if (SHARE) store(running.share + v * LANES, mixed[v]);
  }
}

// The shares of more than one source, once the weights are there.
template <int V>
void mix_shares(const float* weights, int64_t row, int64_t keys, const float* share, int64_t sources,
                const RunningSoftmax& running, const float* keep) {
  for (int64_t s = 0; s < sources; ++s) {
    float* sums = running.share + s * running.share_row;
    Vector mixed[V];
    TLALIGN_UNROLL
    for (int v = 0; v < V; ++v) mixed[v] = load(sums + v * LANES) * load(keep + v * LANES);
    for (int64_t j = 0; j < keys; ++j) TLALIGN_UNROLL
    for (int v = 0; v < V; ++v) mixed[v] += load(weights + j * row + v * LANES) * share[j * sources + s];
    TLALIGN_UNROLL
    for (int v = 0; v < V; ++v) store(sums + v * LANES, mixed[v]);
  }
}

// The last few queries, of which a vector would be nearly empty: their scores, softmax and shares, with keys as lanes.
// Their weights become columns of the panel, `weights` the first one. The other arguments are those of these queries;
// `scores` is scratch for a row of keys.
template <class T>
void weigh_few(const Problem& p, Factor key_rows, int64_t keys, const TokenRows<T> queries, int64_t count,
               OffsetColumns offsets, const float* share, int64_t sources, const RunningSoftmax& running, float* keep,
               float* scores, float* weights, int64_t row) {
  const float factor = p.scale * LOG2_E;
  for (int64_t q = 0; q < count; ++q) {
    const T* query = queries[q];
    Vector highest = broadcast(running.maximum[q]);
    // All of them long before they are loaded as vectors, which waits for numbers that have just been stored.
    for (int64_t j = 0; offsets.data != nullptr && j < keys; ++j) scores[j] = offsets.data[j * offsets.row + q];
    for (int64_t j = 0; j < keys; j += LANES) {
      const int64_t present = smaller(keys - j, LANES);
      Vector score = multiply_one(query, key_rows.from(j), present, p.head_dim) * factor;
      if (offsets.data != nullptr) score += load(scores + j);
      score = LANE_NUMBERS < static_cast<int32_t>(present) ? score : -INFINITE;
      highest = maximum(score, highest);
      store(scores + j, score);
    }
    highest = fold(highest, maximum);
    const Vector shift = highest == -INFINITE ? Vector{} : highest;
    const Vector kept = power_of_two(keep[q] - shift);
    Vector sum = {};
    for (int64_t j = 0; j < keys; j += LANES) {
      const Vector weight = power_of_two(load(scores + j) - shift);
      store(scores + j, weight);
      sum += weight;
    }
    for (int64_t j = 0; j < keys; ++j) weights[j * row + q] = scores[j];
    running.maximum[q] = highest[0];
    running.sum[q] = running.sum[q] * kept[0] + fold(sum, plus)[0];
    keep[q] = kept[0];
    for (int64_t s = 0; s < sources; ++s) {
      Vector mixed = {};
      for (int64_t j = 0; j < keys; j += LANES)
        mixed += load(scores + j) * load_strided(share + j * sources + s, sources, keys - j);
      float* share_sum = running.share + s * running.share_row + q;
      *share_sum = *share_sum * kept[0] + fold(mixed, plus)[0];
    }
  }
}

template <int V>
void drop_weights(float* weights, int64_t row, int64_t keys, const Dropout& dropout, int64_t query, int64_t key) {
  for (int64_t j = 0; j < keys; ++j) TLALIGN_UNROLL
  for (int v = 0; v < V; ++v) {
    float* at = weights + j * row + v * LANES;
    store(at, load(at) * dropout.factor(query + v * LANES, key + j));
  }
}

// Weights become pairs as in `softmax_panel`, where something else needs them before.
template <int V>
void pair_weights(float* weights, int64_t row, int64_t keys) {
  for (int64_t j = 0; j < keys; j += 2) TLALIGN_UNROLL
  for (int v = 0; v < V; ++v) {
    const float* at = weights + j * row + v * LANES;
    const Vector second = j + 1 < keys ? load(at + row) : Vector{};
    store(weights + j / 2 * row + v * LANES, bits<Vector>(pair(load(at), second)));
  }
}

Split chunks_of(const Problem& p, int64_t queries) { return Split(padded_queries(p, LANES) / LANES, queries / LANES); }

// Labels (keys, sources) of a window, the fused ones, and last, if it has padding, 1 for real keys and 0 for the
// others. Labels of the next window, and where those of this one will go, are fetched ahead.
void gather_labels(const Forward& f, int64_t image, bool padded, float* labels) {
  constexpr int64_t TOKENS_BETWEEN_FETCHES = 4;
  const int64_t fused = fused_sources(f), sources = fused + padded;
  const TokenRows<float> rows = labels_of(f, f.share, image, f.keys, 0);
  const TokenRows<float> next = labels_of(f, f.share, smaller(image + 1, f.batch - 1), f.keys, 0);
  const TokenRows<float> target = labels_of(f, f.share_out, image, f.keys, 0);
  for (int64_t key = 0; key < f.keys; key += TOKENS_BETWEEN_FETCHES) {
    __builtin_prefetch(next[key], 0, 2);
    __builtin_prefetch(target[key], 1, 2);
  }
  for (int64_t s = 0; s < fused; ++s)
    for (int64_t key = 0; key < f.keys; ++key) labels[key * sources + s] = rows[key][s];
  for (int64_t key = 0; padded && key < f.keys; ++key)
    labels[key * sources + fused] = rows.tokens[key] < 0 ? 0.0f : 1.0f;
}

struct ForwardScratch {
  static constexpr int64_t SCORE_ROW = row_length(PANEL);
  float *key, *value, *query, *scores, *output, *maximum, *sum, *share, *keep, *inverse, *labels, *head_share, *offsets,
      *few;
  int64_t size;

  ForwardScratch(const Problem& p, const Plan& plan, float* scratch) {
    Arena arena(scratch);
    const int64_t keys = plan.key_block(), chunk = chunks_of(p, QUERY_CHUNK).size(0) * LANES;
    key = arena.take(keys * plan.row);
    query = arena.take(p.head_dim * PANEL);
    scores = arena.take(keys * SCORE_ROW);
    value = arena.take(keys * plan.row);
    maximum = arena.take(chunk);
    sum = arena.take(chunk);
    share = arena.take(head_sums(p) * chunk);
    keep = arena.take(PANEL);
    inverse = arena.take(PANEL);
    output = arena.take(chunk * plan.row);
    labels = arena.take(p.windows.count > 0 ? head_sums(p) * p.keys : 0);
    head_share = arena.take(chunks_of(p, QUERY_CHUNK).count == 1 ? p.heads * head_sums(p) * p.queries : 0);
    offsets = arena.take(OffsetReader::scratch(p, shares_bias(p) ? heads_together(p, LANES) : 0, keys, PANEL));
    few = arena.take(keys + LANES);
    size = arena.used();
  }
};

// Writes what the last block of keys completes: the log-sum-exp, the shares of this head into those of its image, and
// `inverse`, 1 / sum.
void finish_softmax(const Forward& f, int64_t image, int64_t head, int64_t query, int64_t vectors, int64_t sources,
                    const RunningSoftmax& running, float* head_share, float* inverse) {
  const int64_t index = image * f.heads + head;
  for (int64_t lane = 0; lane < vectors * LANES; lane += LANES) {
    const int64_t first = query + lane, count = f.queries - first;
    if (count <= 0) return;
    const Vector sum = load(running.sum + lane), highest = load(running.maximum + lane);
    const Vector inverted = sum == 0.0f ? Vector{} : 1.0f / sum;
    store(inverse + lane, inverted);
    // sum - sum is 0, or NaN if sum is: that the logarithm would lose.
    const Vector log_sum_exp = sum == 0.0f ? broadcast(-INFINITE) : highest * LN_2 + logarithm(sum) + (sum - sum);
    store_first(f.log_sum_exp + index * f.queries + first, log_sum_exp, count);
    for (int64_t s = 0; s < sources; ++s) {
      float* target = head_share + (head * head_sums(f) + s) * f.queries + first;
      store_first(target, load(running.share + s * running.share_row + lane) * inverted, count);
    }
  }
}

// Labels of LANES tokens, one source.
TLALIGN_INLINE Vector load_labels(const TokenRows<float> rows, int64_t count) {
  if (rows.tokens == nullptr) return load_strided(rows.data, rows.stride, count);
  Vector labels = {};
  for (int64_t i = 0; i < count; ++i) labels[i] = *rows[i];
  return labels;
}

TLALIGN_INLINE void store_labels(const TokenRows<float> rows, Vector labels, int64_t count) {
  if (rows.tokens == nullptr) return store_strided(rows.data, labels, rows.stride, count);
  float whole[LANES];
  store(whole, labels);
  for (int64_t i = 0; i < count; ++i) {
    if (rows.tokens[i] >= 0) *rows[i] = whole[i];
    asm volatile("" ::: "memory");  // or it becomes an instruction that scatters, which is slower
  }
}

// share = mean over the heads that see a key, averaged with the residual; without any such head the residual, or 0.
// With padding it is the mean over the real keys that they see. `labels`: those of the image's keys, as it mixes them,
// or null where only the tensor has them; `head_share`: the shares of the image.
void average_heads(const Forward& f, const float* labels, const float* head_share, int64_t image) {
  const bool padded = is_padded(f, image);
  const int64_t label_row = f.sources + padded;
  const bool is_gathered = f.residual == f.share && labels != nullptr;
  const TokenRows<float> target = labels_of(f, f.share_out, image, f.queries, 0);
  for (int64_t query = 0; query < f.queries; query += LANES) {
    const int64_t count = smaller(f.queries - query, LANES);
    const auto of_head = [&](const float* p, int64_t row) { return load_first(p + row * f.queries + query, count); };
    Vector seeing = {};
    for (int64_t head = 0; head < f.heads; ++head)
      if (padded)
        seeing += of_head(head_share, head * head_sums(f) + f.sources);
      else
        seeing += of_head(f.log_sum_exp, image * f.heads + head) == -INFINITE ? Vector{} : broadcast(1.0f);
    for (int64_t s = 0; s < f.sources; ++s) {
      Vector mean = {};
      for (int64_t head = 0; head < f.heads; ++head) mean += of_head(head_share, head * head_sums(f) + s);
      mean = seeing != 0.0f ? mean / seeing : Vector{};
      if (f.residual != nullptr) {
        const Vector own = is_gathered ? load_strided(labels + query * label_row + s, label_row, count)
                                       : load_labels(labels_of(f, f.residual, image, f.queries, s).from(query), count);
        mean = seeing != 0.0f ? (mean + own) * 0.5f : own;
      }
      store_labels(target.from(query).at(s), mean, count);
    }
  }
}

template <class T>
void forward_of(const Forward& f, const Task& task, int64_t* heads_left, float* head_share, float* scratch) {
  const Plan plan(f);
  const ForwardScratch at(f, plan, scratch);
  const int64_t vectors = padded_queries(f, LANES) / LANES;
  const Split chunks(vectors, (vectors + task.chunks - 1) / task.chunks), panels(chunks.size(task.chunk), MAX_VECTORS);
  constexpr bool PAIRS = PAIRED<T>;
  const int64_t chunk_query = chunks.begin(task.chunk) * LANES, chunk_lanes = chunks.size(task.chunk) * LANES;
  const int64_t queries = smaller(f.queries - chunk_query, chunk_lanes);
  const int64_t few = !PAIRS && queries % LANES <= MAX_FEW && !(f.dropout_p > 0) ? queries % LANES : 0;
  const bool streams_output = streams(f, f.output, f.batch * f.queries * f.heads * f.head_dim);
  const bool averages = fused_sources(f) > 0, whole = averages && task.heads == f.heads && chunks.count == 1;
  const auto shares_of = [&](int64_t image) { return head_share + image * f.heads * head_sums(f) * f.queries; };
  const OffsetReader offsets(f, task.first_head, shares_bias(f) ? task.heads : 0, at.offsets);
  for (int64_t image = task.first_image; image < task.first_image + task.images; ++image) {
    const bool padded = is_padded(f, image);
    const int64_t sources = fused_sources(f) + (padded && f.sources > 0);
    const bool pairs_at_once = PAIRS && sources <= 1 && !(f.dropout_p > 0);
    const float* labels = sources > 0 ? f.share + image * f.keys * sources : nullptr;
    if (f.windows.count > 0 && sources > 0) {
      gather_labels(f, image, padded, at.labels);
      labels = at.labels;
    }
    float* shares = whole ? at.head_share : shares_of(image);
    for (int64_t head = task.first_head; head < task.first_head + task.heads; ++head) {
      const Next next(task, image, head);
      Prefetcher prefetcher((queries / LANES + (few == 0 && queries % LANES > 0)) * f.keys *
                                (words_of<PAIRS>(f.head_dim) + SOFTMAX_WORK) +
                            queries * words_of<PAIRS>(f.keys) * plan.width_vectors);
      if (next.image >= 0 && plan.keys.count == 1) {
        prefetch_rows<T>(prefetcher, f, f.key, next, 0, f.keys);
        prefetch_rows<T>(prefetcher, f, f.value, next, 0, f.keys);
        prefetch_rows<T>(prefetcher, f, f.query, next, chunk_query, queries);
        if (!streams_output) prefetch_rows<T>(prefetcher, f, f.output, next, chunk_query, queries);
      }
      const QueryKeyValue<T> rows(f, image, head, padded);
      const TokenRows<T> output_rows = rows_of<T>(f, f.output, image, head);
      for (int64_t i = 0; i < chunk_lanes; ++i) at.maximum[i] = -INFINITE;
      for (int64_t i = 0; i < chunk_lanes; ++i) at.sum[i] = 0.0f;
      for (int64_t i = 0; i < chunk_lanes * sources; ++i) at.share[i] = 0.0f;
      for (int64_t block = 0; block < plan.keys.count; ++block) {
        const int64_t key = plan.keys.begin(block), keys = plan.keys.size(block);
        const bool last = block == plan.keys.count - 1;
        const Factor key_rows = left_factor(f, rows.key.from(key), keys, panels.count, at.key, plan.row);
        const Factor value_rows = right_factor(f, true, rows.value.from(key), keys, panels.count, at.value, plan.row);
        const float* share = labels + key * sources;
        for (int64_t panel = 0; panel < panels.count; ++panel)
          with_vectors(panels.size(panel), [&](auto width) {
            constexpr int V = decltype(width)::count;
            constexpr int64_t SCORE_ROW = row_length(V * LANES);
            const int64_t lane = panels.begin(panel) * LANES;
            const int64_t query = chunk_query + lane;
            const int64_t panel_queries = smaller(f.queries - query, V * LANES);
            const RunningSoftmax running{at.maximum + lane, at.sum + lane, at.share + lane, chunk_lanes};
            for (int64_t i = 0; i < V * LANES; i += LANES) store(at.keep + i, load(running.maximum + i));
            const OffsetColumns panel_offsets = offsets.panel(image, head, query, V, key, keys);
            const auto weigh = [&](auto vectors) {
              constexpr int WHOLE = decltype(vectors)::count;
              multiply_scores<WHOLE, PAIRS>(f, rows.query, query, key_rows, keys, panel_offsets, at.query, at.scores,
                                            SCORE_ROW, running.maximum, &prefetcher);
              const auto softmax = [&](auto shares, auto pairs) {
                softmax_panel<WHOLE, decltype(shares)::count != 0, decltype(pairs)::count != 0>(
                    at.scores, SCORE_ROW, keys, share, running, at.keep, prefetcher);
              };
              if (pairs_at_once)
                sources == 1 ? softmax(Vectors<1>{}, Vectors<PAIRS>{}) : softmax(Vectors<0>{}, Vectors<PAIRS>{});
              else
                sources == 1 ? softmax(Vectors<1>{}, Vectors<0>{}) : softmax(Vectors<0>{}, Vectors<0>{});
              if (sources > 1) mix_shares<WHOLE>(at.scores, SCORE_ROW, keys, share, sources, running, at.keep);
            };
            constexpr int64_t LAST = (V - 1) * LANES;
            if (few > 0 && panel_queries - LAST == few) {
              if constexpr (V > 1) weigh(Vectors<V - 1>{});
              weigh_few(f, key_rows, keys, rows.query.from(query + LAST), few, panel_offsets.from(LAST), share, sources,
                        running.from(LAST), at.keep + LAST, at.few, at.scores + LAST, SCORE_ROW);
            } else {
              weigh(Vectors<V>{});
            }
            if (last) finish_softmax(f, image, head, query, V, sources, running, shares, at.inverse);
            if (f.dropout_p > 0) drop_weights<V>(at.scores, SCORE_ROW, keys, Dropout(f, image, head), query, key);
            if (PAIRS && !pairs_at_once) pair_weights<V>(at.scores, SCORE_ROW, keys);

            float* sums = at.output + lane * plan.row;
            const TokenRows<T> result = output_rows.from(query);
            const bool direct = last && writes_in_place<T>(f, padded);
            Product product{{at.scores, SCORE_ROW},
                            direct ? reinterpret_cast<float*>(result.data) : sums,
                            direct ? f.output.row : plan.row,
                            value_rows,
                            words_of<PAIRS>(keys)};
            if (block > 0) {
              product.init = sums;
              product.init_row = plan.row;
              product.init_scale = at.keep;
            }
            if (last) product.scale = at.inverse;
            if (direct) product.c_tokens = result.tokens;
            product.streams = direct && streams_output;
            product.rounds = direct && PAIRS;
            product.prefetcher = &prefetcher;
            multiply<true, PAIRS>(product, panel_queries, plan.width_vectors);
            if (last && !direct) unpack_rows(sums, plan.row, panel_queries, f.head_dim, result, streams_output);
          });
      }
    }
    if (whole) average_heads(f, labels, shares, image);
  }
  // Whoever ends the last head and chunk of an image averages its shares: not before the end of the task, since an
  // atomic operation waits for what is streamed.
  for (int64_t image = task.first_image; averages && !whole && image < task.first_image + task.images; ++image)
    if (__atomic_sub_fetch(heads_left + image, task.heads, __ATOMIC_ACQ_REL) == 0)
      average_heads(f, nullptr, shares_of(image), image);
}

// Backward

// exp(score - log_sum_exp) * inverse, the probabilities of a panel; the log-sum-exp is in units of ln 2.
template <int V>
struct Probabilities {
  Vector log_sum_exp[V], inverse[V];

  Probabilities(const float* log_sum_exp_of_queries, const float* inverse_of_queries) {
    TLALIGN_UNROLL
    for (int v = 0; v < V; ++v) log_sum_exp[v] = load(log_sum_exp_of_queries + v * LANES);
    TLALIGN_UNROLL
    for (int v = 0; v < V; ++v) inverse[v] = load(inverse_of_queries + v * LANES);
  }
  TLALIGN_INLINE Vector of(const Probabilities& p, Vector score, int v) {
    return power_of_two(score - p.log_sum_exp[v]) * p.inverse[v];
  }
};

// Scores, gradients and, with PAIRS, pairs of a panel of a block of queries: rows of keys, and the first lane.
struct ScorePanel {
  float *scores, *gradients, *pairs;
  int64_t lane;
  static constexpr int64_t ROW = row_length(QUERY_BLOCK);
};

// Products of queries and keys become (dropped) probabilities, the gradients of probabilities those of scores; these
// are added to `grad_bias` (keys, bias_row) unless it is null. With PAIRS both become rows of bfloat16 where they are,
// and the gradients those of scores once more, as pairs of keys.
template <int V, bool PAIRS, bool DROPS>
void gradient_panel(const Probabilities<V> probabilities, const ScorePanel panel, int64_t keys, const float* row_terms,
                    const Dropout& dropout, int64_t query, int64_t key, float* grad_bias, int64_t bias_row,
                    Prefetcher& prefetcher) {
  constexpr int64_t ROW = ScorePanel::ROW;
  Vector row_term[V], before[V] = {};
  TLALIGN_UNROLL
  for (int v = 0; v < V; ++v) row_term[v] = load(row_terms + v * LANES);
  for (int64_t j = 0; j < keys; ++j) {
    if (j % ROWS_BETWEEN_FETCHES == 0) prefetcher.advance(ROWS_BETWEEN_FETCHES * V * GRADIENT_WORK);
    TLALIGN_UNROLL
    for (int v = 0; v < V; ++v) {
      const int64_t first = panel.lane + v * LANES;
      float *score_row = panel.scores + j * ROW, *gradient_row = panel.gradients + j * ROW;
      const Vector probability = Probabilities<V>::of(probabilities, load(score_row + first), v);
      Vector kept = probability, gradient = load(gradient_row + first);
      if constexpr (DROPS) {
        const Vector factor = dropout.factor(query + v * LANES, key + j);
        kept *= factor;
        gradient *= factor;
      }
      gradient = probability * (gradient - row_term[v]);
      if constexpr (PAIRS) {
        store(reinterpret_cast<BFloat16*>(score_row) + first, kept);
        store(reinterpret_cast<BFloat16*>(gradient_row) + first, gradient);
        if (j % 2 != 0) store(panel.pairs + j / 2 * ROW + first, bits<Vector>(pair(before[v], gradient)));
        before[v] = gradient;
      } else {
        store(score_row + first, kept);
        store(gradient_row + first, gradient);
      }
      if (grad_bias != nullptr) {
        float* sum_at = grad_bias + j * bias_row + v * LANES;
        store(sum_at, load(sum_at) + gradient);
      }
    }
  }
  if (PAIRS && keys % 2 != 0) TLALIGN_UNROLL
  for (int v = 0; v < V; ++v)
    store(panel.pairs + keys / 2 * ROW + panel.lane + v * LANES, bits<Vector>(pair(before[v], Vector{})));
}

struct BackwardScratch {
  static constexpr int64_t SCALES = KEY_BLOCK > QUERY_BLOCK ? KEY_BLOCK : QUERY_BLOCK;
  float *key, *key_pairs, *value, *grad_key, *grad_value, *query, *grad_output, *columns, *scores, *gradients, *pairs,
      *log_sum_exp, *inverse, *row_terms, *scale, *grad_query, *offsets;
  int64_t size;

  BackwardScratch(const Problem& p, const Plan& plan, float* scratch) {
    Arena arena(scratch);
    const int64_t keys = plan.key_block(), padded = padded_queries(p, LANES) + PANEL;
    const bool pairs_rows = ONLY_BFLOAT16 && p.dtype == DType::bfloat16;
    const int64_t key_pairs_rows = pairs_rows ? (keys + 1) / 2 : 0;
    const int64_t query_rows = pairs_rows ? QUERY_BLOCK / 2 : QUERY_BLOCK;
    key = arena.take(keys * plan.row);
    key_pairs = arena.take(key_pairs_rows * plan.row);
    value = arena.take(keys * plan.row);
    grad_key = arena.take(keys * plan.row);
    grad_value = arena.take(keys * plan.row);
    query = arena.take(query_rows * plan.row);
    grad_output = arena.take(query_rows * plan.row);
    columns = arena.take(p.head_dim * PANEL);
    scores = arena.take(keys * ScorePanel::ROW);
    gradients = arena.take(keys * ScorePanel::ROW);
    pairs = arena.take(key_pairs_rows * ScorePanel::ROW);
    log_sum_exp = arena.take(padded);
    inverse = arena.take(padded);
    row_terms = arena.take(padded);
    scale = arena.take(SCALES);
    grad_query = arena.take(sums_in_place(p) ? 0 : (plan.keys.count > 1 ? padded : QUERY_BLOCK) * plan.row);
    offsets = arena.take(OffsetReader::scratch(p, shares_bias(p) ? heads_together(p, LANES) : 0, keys, PANEL));
    size = arena.used();
  }
};

// The log-sum-exp of queries as `Probabilities` wants it, in units of ln 2: infinite, so that all of them vanish, for
// queries that see no key and for the lanes beyond the last query. `inverse` makes up for the rounding of the units.
void load_log_sum_exp(const Problem& p, const float* log_sum_exp, int64_t image, int64_t head, int64_t query,
                      int64_t lanes, float* target, float* inverse) {
  const float* source = log_sum_exp + (image * p.heads + head) * p.queries + query;
  const int64_t present = p.queries - query;
  for (int64_t i = 0; i < lanes; i += LANES) {
    const Vector known = load_first(source + i, present - i);
    const DoubleVector exact = __builtin_convertvector(known, DoubleVector) * 1.4426950408889634;
    const Vector rounded = __builtin_convertvector(exact, Vector);
    const DoubleVector rest = exact - __builtin_convertvector(rounded, DoubleVector);
    const auto is_infinite = rounded == -INFINITE;
    store(target + i, is_infinite ? broadcast(INFINITE) : rounded);
    store(inverse + i, is_infinite ? broadcast(1.0f) : 1.0f - LN_2 * __builtin_convertvector(rest, Vector));
  }
  for (int64_t i = present; i < lanes; ++i) target[i] = INFINITE;
}

// Where a log-sum-exp is so large that its rounding matters, puts the greatest score in its place and the reciprocal of
// the sum over all keys of exp(score - greatest) in that of `inverse`. Needs the product of queries and keys once more,
// in the very arithmetic of those that follow: `key_rows(key, keys)` is its left factor.
template <bool PAIRS, class T, class KeyRows>
void normalise(const Problem& p, const Plan& plan, const TokenRows<T>& queries, const OffsetReader& offsets,
               int64_t image, int64_t head, int64_t query, int64_t vectors, float* log_sum_exp, float* inverse,
               float* columns, float* scores, KeyRows key_rows) {
  constexpr float LIMIT = PRECISE_LOG_SUM_EXP * LOG2_E;
  bool precise = true;
  for (int64_t i = 0; i < vectors * LANES; ++i)
    precise = precise && !(log_sum_exp[i] > LIMIT && log_sum_exp[i] < INFINITE) && !(log_sum_exp[i] < -LIMIT);
  if (precise) return;
  const Split panels(vectors, MAX_VECTORS);
  for (int64_t panel = 0; panel < panels.count; ++panel)
    with_vectors(panels.size(panel), [&](auto width) {
      constexpr int V = decltype(width)::count;
      constexpr int64_t ROW = V * LANES;
      const int64_t lane = panels.begin(panel) * LANES;
      float greatest[ROW];
      for (float& score : greatest) score = -__FLT_MAX__;  // not infinite: of queries that see no key yet, too
      Vector sum[V] = {};
      for (int64_t block = 0; block < plan.keys.count; ++block) {
        const int64_t key = plan.keys.begin(block), keys = plan.keys.size(block);
        Vector shift[V];
        TLALIGN_UNROLL
        for (int v = 0; v < V; ++v) shift[v] = load(greatest + v * LANES);
        multiply_scores<V, PAIRS>(p, queries, query + lane, key_rows(key, keys), keys,
                                  offsets.panel(image, head, query + lane, V, key, keys), columns, scores, ROW,
                                  greatest);
        TLALIGN_UNROLL
        for (int v = 0; v < V; ++v) {
          const Vector before = shift[v];
          shift[v] = load(greatest + v * LANES);
          sum[v] *= power_of_two(before - shift[v]);
        }
        for (int64_t j = 0; j < keys; ++j) TLALIGN_UNROLL
        for (int v = 0; v < V; ++v) sum[v] += power_of_two(load(scores + j * ROW + v * LANES) - shift[v]);
      }
      TLALIGN_UNROLL
      for (int v = 0; v < V; ++v) {
        float *known = log_sum_exp + lane + v * LANES, *factor = inverse + lane + v * LANES;
        const Vector size = load(known);
        const auto rounds = ((size > LIMIT) & (size < INFINITE)) | (size < -LIMIT);
        store(known, rounds ? load(greatest + v * LANES) : size);
        store(factor, rounds ? 1.0f / sum[v] : load(factor));
      }
    });
}

// sum_j P_ij dP_ij = dO_i . O_i, with dropout too (FlashAttention, arXiv 2205.14135).
template <class T>
void sum_row_terms(const Backward& b, const TokenRows<T>& grad_output, const TokenRows<T>& output, float* row_terms) {
  constexpr int64_t STEP = PAIRED<T> ? 2 * LANES : LANES;
  const auto product_of = [&](const T* left, const T* right, auto whole) __attribute__((always_inline)) {
    Vector sum = {};
    for (int64_t d = 0; d < b.head_dim; d += STEP) {
      const int64_t present = decltype(whole)::count ? STEP : b.head_dim - d;
      const Vector words = load_words_of<PAIRED<T>>(right + d, present);
      sum = add_product<PAIRED<T>>(sum, load_words_of<PAIRED<T>>(left + d, present), words);
    }
    return sum;
  };
  for (int64_t first = 0; first < b.queries; first += LANES) {
    const int64_t count = smaller(b.queries - first, LANES);
    Vector rows[LANES] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T *left = grad_output[first + i], *right = output[first + i];
      rows[i] = b.head_dim % STEP == 0 ? product_of(left, right, Vectors<1>{}) : product_of(left, right, Vectors<0>{});
    }
    store(row_terms + first, sum_rows(rows));
  }
}

template <class T>
void backward_of(const Backward& b, const Task& task, float* grad_bias, float* grad_padding, float* scratch) {
  constexpr bool PAIRS = PAIRED<T>;
  constexpr int64_t SCORE_ROW = ScorePanel::ROW;
  const Plan plan(b);
  const BackwardScratch at(b, plan, scratch);
  const int64_t padded = padded_queries(b, LANES);
  const Split query_blocks = chunks_of(b, QUERY_BLOCK);
  const int64_t gradients = b.batch * (b.queries + 2 * b.keys) * b.heads * b.head_dim;
  const bool streams_gradients =
      streams(b, b.grad_query, gradients) && streams(b, b.grad_key, gradients) && streams(b, b.grad_value, gradients);
  for (int64_t i = 0; i < BackwardScratch::SCALES; ++i) at.scale[i] = b.scale;
  const OffsetReader offsets(b, task.first_head, task.images > 1 ? task.heads : 0, at.offsets);
  for (int64_t head = task.first_head; head < task.first_head + task.heads; ++head) {
    for (int64_t i = 0; grad_bias != nullptr && i < b.keys * padded; ++i) grad_bias[head * b.keys * padded + i] = 0.0f;
    for (int64_t i = 0; grad_padding != nullptr && i < 3 * b.head_dim; ++i)
      grad_padding[head * 3 * b.head_dim + i] = 0.0f;
  }
  for (int64_t image = task.first_image; image < task.first_image + task.images; ++image)
    for (int64_t head = task.first_head; head < task.first_head + task.heads; ++head) {
      float* grad_bias_sum = grad_bias == nullptr ? nullptr : grad_bias + head * b.keys * padded;
      float* padding_sums = grad_padding == nullptr ? nullptr : grad_padding + head * 3 * b.head_dim;
      const Next next(task, image, head);
      Prefetcher prefetcher(padded / LANES * b.keys * (2 * words_of<PAIRS>(b.head_dim) + GRADIENT_WORK) +
                            3 * padded * words_of<PAIRS>(b.keys) * plan.width_vectors);
      if (next.image >= 0 && plan.keys.count == 1) {
        prefetch_rows<T>(prefetcher, b, b.key, next, 0, b.keys);
        prefetch_rows<T>(prefetcher, b, b.value, next, 0, b.keys);
        prefetch_rows<T>(prefetcher, b, b.query, next, 0, b.queries);
        prefetch_rows<T>(prefetcher, b, b.grad_output, next, 0, b.queries);
        prefetch_rows<T>(prefetcher, b, b.output, next, 0, b.queries);
        // Of many queries they would push out what is to be read.
        if (!streams_gradients && b.queries <= QUERY_CHUNK) {
          prefetch_rows<T>(prefetcher, b, b.grad_query, next, 0, b.queries);
          prefetch_rows<T>(prefetcher, b, b.grad_key, next, 0, b.keys);
          prefetch_rows<T>(prefetcher, b, b.grad_value, next, 0, b.keys);
        }
      }
      const bool padded_window = is_padded(b, image);
      const QueryKeyValue<T> rows(b, image, head, padded_window);
      const TokenRows<T> grad_output_rows = rows_of<T>(b, b.grad_output, image, head, ZEROS);
      load_log_sum_exp(b, b.log_sum_exp, image, head, 0, padded, at.log_sum_exp, at.inverse);
      sum_row_terms(b, grad_output_rows, rows_of<T>(b, b.output, image, head, ZEROS), at.row_terms);
      const int64_t reuse = padded / LANES / MAX_VECTORS;
      const auto left_keys = [&](int64_t key, int64_t keys) {
        return left_factor(b, rows.key.from(key), keys, reuse, at.key, plan.row);
      };
      normalise<PAIRS>(b, plan, rows.query, offsets, image, head, 0, padded / LANES, at.log_sum_exp, at.inverse,
                       at.columns, at.scores, left_keys);
      const Dropout dropout(b, image, head);
      for (int64_t key_block = 0; key_block < plan.keys.count; ++key_block) {
        const int64_t key = plan.keys.begin(key_block), keys = plan.keys.size(key_block);
        const bool last_keys = key_block == plan.keys.count - 1;
        const Factor key_rows = left_keys(key, keys);
        const Factor value_rows = left_factor(b, rows.value.from(key), keys, reuse, at.value, plan.row);
        const Factor key_factor =
            PAIRS ? right_factor(b, true, rows.key.from(key), keys, reuse, at.key_pairs, plan.row) : key_rows;
        for (int64_t query_block = 0; query_block < query_blocks.count; ++query_block) {
          const int64_t query = query_blocks.begin(query_block) * LANES;
          const int64_t queries = smaller(b.queries - query, query_blocks.size(query_block) * LANES);
          const bool last_queries = query_block == query_blocks.count - 1;
          const Factor query_factor =
              right_factor(b, false, rows.query.from(query), queries, reuse, at.query, plan.row);
          const Factor grad_output_factor =
              right_factor(b, false, grad_output_rows.from(query), queries, reuse, at.grad_output, plan.row);
          const Split panels(query_blocks.size(query_block), MAX_VECTORS);
          for (int64_t panel = 0; panel < panels.count; ++panel)
            with_vectors(panels.size(panel), [&](auto width) {
              constexpr int V = decltype(width)::count;
              const int64_t lane = panels.begin(panel) * LANES;
              multiply_scores<V, PAIRS>(b, rows.query, query + lane, key_rows, keys,
                                        offsets.panel(image, head, query + lane, V, key, keys), at.columns,
                                        at.scores + lane, SCORE_ROW, nullptr, &prefetcher);
              Product product{value_rows, at.gradients + lane, SCORE_ROW};
              product.prefetcher = &prefetcher;
              multiply_queries<V, PAIRS>(product, b, grad_output_rows, query + lane, keys, at.columns);
              const Probabilities<V> probabilities(at.log_sum_exp + query + lane, at.inverse + query + lane);
              const auto gradients_of_scores = [&](auto drops) {
                gradient_panel<V, PAIRS, decltype(drops)::count != 0>(
                    probabilities, {at.scores, at.gradients, at.pairs, lane}, keys, at.row_terms + query + lane,
                    dropout, query + lane, key,
                    grad_bias_sum == nullptr ? nullptr : grad_bias_sum + key * padded + query + lane, padded,
                    prefetcher);
              };
              b.dropout_p > 0 ? gradients_of_scores(Vectors<1>{}) : gradients_of_scores(Vectors<0>{});
            });

          // Sums over blocks stay in scratch; the last one goes to the tensor at once, if that has floats in whole
          // vectors.
          const auto accumulate = [&](auto across, int64_t rows, int64_t depth, const float* left, Factor right,
                                      float* sums, int64_t sums_row, const Rows& target, int64_t row, bool first,
                                      bool last, const float* scale, int64_t which) {
            const TokenRows<T> result = rows_of<T>(b, target, image, head).from(row);
            const bool direct = last && writes_in_place<T>(b, padded_window);
            Product product{{left, SCORE_ROW},
                            direct ? reinterpret_cast<float*>(result.data) : sums,
                            direct ? target.row : sums_row,
                            right,
                            words_of<PAIRS>(depth)};
            if (!first) {
              product.init = sums;
              product.init_row = sums_row;
            }
            if (last) product.scale = scale;
            if (direct) product.c_tokens = result.tokens;
            product.streams = direct && streams_gradients;
            product.rounds = direct && PAIRS;
            product.prefetcher = &prefetcher;
            multiply<decltype(across)::count != 0, PAIRS>(product, rows, plan.width_vectors);
            if (last && !direct)
              unpack_rows(sums, sums_row, rows, b.head_dim, result, streams_gradients,
                          padding_sums == nullptr ? nullptr : padding_sums + which * b.head_dim);
          };
          float* grad_query = plan.keys.count > 1 ? at.grad_query + query * plan.row : at.grad_query;
          if (sums_in_place(b)) grad_query = reinterpret_cast<float*>(rows_of<T>(b, b.grad_query, image, head)[query]);
          accumulate(Vectors<1>{}, queries, keys, PAIRS ? at.pairs : at.gradients, key_factor, grad_query,
                     sums_in_place(b) ? b.grad_query.row : plan.row, b.grad_query, query, key_block == 0, last_keys,
                     at.scale, 0);
          accumulate(Vectors<0>{}, keys, queries, at.scores, grad_output_factor, at.grad_value, plan.row, b.grad_value,
                     key, query_block == 0, last_queries, nullptr, 2);
          accumulate(Vectors<0>{}, keys, queries, at.gradients, query_factor, at.grad_key, plan.row, b.grad_key, key,
                     query_block == 0, last_queries, at.scale, 1);
        }
      }
    }
}

// Shares of many sources: the mean of the probabilities over heads, in blocks, then one product with the labels.

struct DenseShareScratch {
  static constexpr int64_t MEAN_ROW = row_length(QUERY_BLOCK), LABEL_ROW = row_length(LABEL_BLOCK);
  float *key, *columns, *scores, *mean, *log_sum_exp, *inverse, *weight, *labels, *sums, *offsets;
  int64_t size;

  DenseShareScratch(const Problem& p, const Plan& plan, float* scratch) {
    Arena arena(scratch);
    const int64_t keys = plan.key_block();
    key = arena.take(keys * plan.row);
    columns = arena.take(p.head_dim * PANEL);
    scores = arena.take(keys * PANEL);
    mean = arena.take(keys * MEAN_ROW);
    log_sum_exp = arena.take(p.heads * QUERY_BLOCK);
    inverse = arena.take(p.heads * QUERY_BLOCK);
    weight = arena.take(QUERY_BLOCK);
    labels = arena.take(keys * LABEL_ROW);
    sums = arena.take(QUERY_BLOCK * LABEL_ROW);
    offsets = arena.take(OffsetReader::scratch(p, 0, keys, PANEL));
    size = arena.used();
  }
};

template <class T>
void dense_share_of(const Forward& f, const float* head_share, int64_t image, int64_t chunk, float* scratch) {
  const Plan plan(f);
  const DenseShareScratch at(f, plan, scratch);
  const Split chunks = chunks_of(f, QUERY_BLOCK);
  const int64_t query = chunks.begin(chunk) * LANES, vectors = chunks.size(chunk), lanes = vectors * LANES;
  const int64_t queries = smaller(f.queries - query, lanes);
  const OffsetReader offsets(f, 0, 0, at.offsets);
  const bool padded = is_padded(f, image);
  for (int64_t i = 0; i < lanes; ++i) at.weight[i] = 0.0f;
  for (int64_t head = 0; head < f.heads; ++head) {
    float *log_sum_exp = at.log_sum_exp + head * QUERY_BLOCK, *inverse = at.inverse + head * QUERY_BLOCK;
    load_log_sum_exp(f, f.log_sum_exp, image, head, query, lanes, log_sum_exp, inverse);
    const QueryKeyValue<T> rows(f, image, head, padded);
    const auto packed_keys = [&](int64_t key, int64_t keys) {
      pack_rows(rows.key.from(key), keys, f.head_dim, at.key, plan.row);
      return Factor{at.key, plan.row};
    };
    normalise<false>(f, plan, rows.query, offsets, image, head, query, vectors, log_sum_exp, inverse, at.columns,
                     at.scores, packed_keys);
    const float* real = head_share + (image * f.heads + head) * f.queries + query;
    for (int64_t i = 0; i < lanes; ++i) at.weight[i] += padded && i < queries ? real[i] : log_sum_exp[i] != INFINITE;
  }
  // Heads in which a query sees no key, and keys in the padding, don't count in its mean; no residual, no halving.
  const float part = f.residual != nullptr ? 0.5f : 1.0f;
  for (int64_t i = 0; i < lanes; ++i) at.weight[i] = at.weight[i] > 0 ? part / at.weight[i] : 0.0f;

  for (int64_t block = 0; block < plan.keys.count; ++block) {
    const int64_t key = plan.keys.begin(block), keys = plan.keys.size(block);
    for (int64_t i = 0; i < keys * DenseShareScratch::MEAN_ROW; ++i) at.mean[i] = 0.0f;
    for (int64_t head = 0; head < f.heads; ++head) {
      const QueryKeyValue<T> rows(f, image, head, padded);
      pack_rows(rows.key.from(key), keys, f.head_dim, at.key, plan.row);
      const Split panels(vectors, MAX_VECTORS);
      for (int64_t panel = 0; panel < panels.count; ++panel)
        with_vectors(panels.size(panel), [&](auto width) {
          constexpr int V = decltype(width)::count;
          const int64_t lane = panels.begin(panel) * LANES;
          multiply_scores<V, false>(f, rows.query, query + lane, {at.key, plan.row}, keys,
                                    offsets.panel(image, head, query + lane, V, key, keys), at.columns, at.scores,
                                    V * LANES, nullptr);
          const Probabilities<V> probabilities(at.log_sum_exp + head * QUERY_BLOCK + lane,
                                               at.inverse + head * QUERY_BLOCK + lane);
          for (int64_t j = 0; j < keys; ++j) TLALIGN_UNROLL
          for (int v = 0; v < V; ++v) {
            float* mean = at.mean + j * DenseShareScratch::MEAN_ROW + lane + v * LANES;
            const Vector score = load(at.scores + j * V * LANES + v * LANES);
            store(mean,
                  load(mean) + Probabilities<V>::of(probabilities, score, v) * load(at.weight + lane + v * LANES));
          }
        });
    }
    for (int64_t label = 0; label < f.sources; label += LABEL_BLOCK) {
      const int64_t labels = smaller(f.sources - label, LABEL_BLOCK), row = DenseShareScratch::LABEL_ROW;
      const TokenRows<float> result = labels_of(f, f.share_out, image, f.queries, label).from(query);
      pack_rows(labels_of(f, f.share, image, f.keys, label).from(key), keys, labels, at.labels, row);
      Product product{{at.mean, DenseShareScratch::MEAN_ROW}, at.sums, row, {at.labels, row}, keys};
      if (block > 0 || f.residual != nullptr) {
        // What earlier blocks left in the result, or half the residual (all of it where no key is seen).
        const auto start = block > 0 ? result : labels_of(f, f.residual, image, f.queries, label).from(query);
        pack_rows(start, queries, labels, at.sums, row);
        for (int64_t i = 0; block == 0 && i < queries; ++i)
          for (int64_t c = 0; c < labels && at.weight[i] > 0; ++c) at.sums[i * row + c] *= 0.5f;
        product.init = at.sums;
        product.init_row = row;
      }
      multiply<true>(product, queries, (labels + LANES - 1) / LANES);
      unpack_rows(at.sums, row, queries, labels, TokenRows<float>{result.data, result.stride, result.tokens, nullptr});
    }
  }
}

// The functions of the table: by element type.

void forward_task(const Forward& f, const Task& task, int64_t* heads_left, float* head_share, float* scratch) {
  with_type_of_tokens(f.dtype,
                      [&](auto element) { forward_of<decltype(element)>(f, task, heads_left, head_share, scratch); });
  finish_streams();
}

void backward_task(const Backward& b, const Task& task, float* grad_bias, float* grad_padding, float* scratch) {
  with_type_of_tokens(b.dtype,
                      [&](auto element) { backward_of<decltype(element)>(b, task, grad_bias, grad_padding, scratch); });
  finish_streams();
}

void dense_share_task(const Forward& f, const float* head_share, int64_t image, int64_t chunk, float* scratch) {
  with_type_of_tokens(f.dtype,
                      [&](auto element) { dense_share_of<decltype(element)>(f, head_share, image, chunk, scratch); });
}

void sum_grad_bias(const Backward& b, const float* parts, int64_t image_parts, int64_t image, int64_t head,
                   int64_t first_query) {
  const int64_t padded = padded_queries(b, LANES), size = b.keys * padded;
  const bool all_images = b.bias_images == 1, all_heads = b.bias_heads == 1;
  const int64_t first_part = all_images ? 0 : image, end_part = all_images ? image_parts : image + 1;
  const int64_t first_head = all_heads ? 0 : head, end_head = all_heads ? b.heads : head + 1;
  const int64_t queries = smaller(b.queries - first_query, LANES);
  with_type(b.bias.dtype, [&](auto element) {
    using T = decltype(element);
    T* target = reinterpret_cast<T*>(b.grad_bias) + ((image * b.bias_heads + head) * b.queries + first_query) * b.keys;
    for (int64_t key = 0; key < b.keys; key += LANES) {
      const int64_t keys = smaller(b.keys - key, LANES);
      Vector square[LANES] = {};
      for (int64_t part = first_part; part < end_part; ++part)
        for (int64_t h = first_head; h < end_head; ++h) {
          const float* sum = parts + (part * b.heads + h) * size + key * padded + first_query;
          for (int64_t j = 0; j < keys; ++j) square[j] += load(sum + j * padded);
        }
      transpose(square);
      for (int64_t i = 0; i < queries; ++i) store_first(target + i * b.keys + key, square[i], keys);
    }
  });
}

void sum_grad_padding(const Backward& b, const float* parts, int64_t image_parts, int64_t head) {
  with_type_of_tokens(b.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t which = 0; which < 3; ++which)
      for (int64_t d = 0; d < b.head_dim; d += LANES) {
        const int64_t count = smaller(b.head_dim - d, LANES);
        Vector sum = {};
        for (int64_t part = 0; part < image_parts; ++part) {
          const float* at = parts + ((part * b.heads + head) * 3 + which) * b.head_dim + d;
          sum += load_first(at, count);
        }
        store_first(reinterpret_cast<T*>(b.grad_padding) + (which * b.heads + head) * b.head_dim + d, sum, count);
      }
  });
}

int64_t forward_chunks(const Problem& p, int64_t fewest) {
  const int64_t of_each = (padded_queries(p, LANES) + fewest - 1) / fewest;
  return chunks_of(p, smaller(larger(of_each, PANEL), QUERY_CHUNK)).count;
}
int64_t dense_share_chunks(const Problem& p) { return chunks_of(p, QUERY_BLOCK).count; }

template <class Scratch>
int64_t scratch_of(const Problem& p) {
  return Scratch(p, Plan(p), nullptr).size;
}

}  // namespace

extern const Kernels TLALIGN_KERNELS;
const Kernels TLALIGN_KERNELS = {
    LANES,
    ONLY_BFLOAT16,
    &forward_chunks,
    &dense_share_chunks,
    &scratch_of<ForwardScratch>,
    &scratch_of<BackwardScratch>,
    &scratch_of<DenseShareScratch>,
    &forward_task,
    &dense_share_task,
    &backward_task,
    &sum_grad_bias,
    &sum_grad_padding,
};

}  // namespace tlalign::cpu
