// The forward on Hopper for more keys than one step takes. Compiled for sm_90a.
#include <algorithm>

#include "cuda/hopper_forward.h"

namespace tlalign::cuda {
namespace {

// As ForwardKernel with STREAMS, for heads of 64. A block has a multiprocessor for itself and takes 128 queries of a
// head after the other: two warpgroups have 64 each, a third one copies K, V and labels of a step of 128 keys, several
// steps ahead. Labels are eight more columns of V. The two begin their products in turn, so that those of the one go on
// beside the exponentials of the other.
template <class T>
struct HopperStreamingKernel : HopperForwardKernel<T, ForwardKernel<T, 64, 16, 4, true, Kind::plain, 1>> {
  using Base = ForwardKernel<T, 64, 16, 4, true, Kind::plain, 1>;
  using Base::p, Base::shared, Base::lane, Base::warp, Base::first, Base::turn, Base::image, Base::head;
  using typename Base::Tile;
  static constexpr int D = 64, TILES = 8, KEYS = 16 * TILES;
  // Warpgroups that multiply, and all threads.
  static constexpr int GROUPS = 2, QUERIES = 64 * GROUPS, THREADS = 128 * (GROUPS + 1);
  static constexpr int COPYING_REGISTERS = 40, MULTIPLYING_REGISTERS = 232;
  // A stage has K, V and the labels: as the next 64 columns of V, of which 8 are used. Queries are there twice.
  static constexpr int STAGES = 4, PART_BYTES = Tile::bytes(KEYS), STAGE_BYTES = 3 * PART_BYTES;
  static constexpr int QUERIES_AT = STAGES * STAGE_BYTES, SHARED_BYTES = QUERIES_AT + 2 * Tile::bytes(QUERIES);
  static constexpr int SOURCES = 2, LABEL_COLUMNS = 4 * SOURCES, COLUMNS = D + LABEL_COLUMNS;
  // Steps whose copies go on while those before are said to be there.
  static constexpr int AHEAD = 2;
  using Queries = typename Tile::template Source<QUERIES, 128, false>;
  using Output = float[COLUMNS / 8][4];

  __device__ uint32_t queries_of(unsigned number) const {
    return shared + QUERIES_AT + number % 2 * Tile::bytes(QUERIES);
  }
  __device__ uint32_t keys_of(unsigned step) const { return shared + step % STAGES * STAGE_BYTES; }
  __device__ uint32_t values_of(unsigned step) const { return keys_of(step) + PART_BYTES; }
  __device__ uint32_t labels_of(unsigned step) const { return keys_of(step) + 2 * PART_BYTES; }

  // Barriers. A step, with the queries if it is the first of them, is there for a warpgroup: it waits, those who copy
  // arrive. Nobody needs a step, or queries, any more: all warpgroups arrive, those who copy wait. A warpgroup may
  // begin products: it waits, the other one arrives.
  static __device__ unsigned is_there(unsigned step, unsigned group) { return GROUPS * (step % STAGES) + group; }
  static __device__ unsigned is_done(unsigned step) { return GROUPS * STAGES + step % STAGES; }
  static __device__ unsigned queries_are_done(unsigned number) { return (GROUPS + 1) * STAGES + number % 2; }
  static __device__ unsigned may_begin(unsigned group) { return (GROUPS + 1) * STAGES + 2 + group; }
  static constexpr int OF_TWO_GROUPS = 128 + 128, OF_ALL = THREADS;

  __device__ unsigned tasks() const { return p.blocks.divisor * unsigned(p.batch) * unsigned(p.heads); }
  __device__ unsigned steps() const { return unsigned(p.keys + KEYS - 1) / KEYS; }
  __device__ void find(unsigned task) {
    turn = p.blocks.quotient(task);
    first = int(task - turn * p.blocks.divisor) * QUERIES;
    image = p.turns.quotient(turn);
    head = turn - image * p.turns.divisor;
  }

  __device__ void run() {
    if (warp < 4) {
      hopper::take_fewer_registers<COPYING_REGISTERS>();
      copy_all();
    } else {
      hopper::take_more_registers<MULTIPLYING_REGISTERS>();
      const unsigned group = unsigned(warp) / 4 - 1;
      if (group == 1) hopper::arrive_at(may_begin(0), OF_TWO_GROUPS);
      // Steps are counted on from one task to the next.
      unsigned step = 0;
#pragma unroll 1
      for (unsigned number = 0, task = blockIdx.x; task < tasks(); ++number, task += gridDim.x, step += steps()) {
        find(task);
        if (first + 64 * int(group) < p.queries) {
          take_queries(queries_of(number) + Tile::bytes(64) * group, group, step);
        } else {
          pass_by(group, step);
        }
        hopper::arrive_at(queries_are_done(number), OF_ALL);
      }
    }
  }

  // Shares come one step later than the rows: they pass through registers.
  __device__ void copy_all() {
    unsigned step = 0;
    Shares shares;
#pragma unroll 1
    for (unsigned number = 0, task = blockIdx.x; task < tasks(); ++number, task += gridDim.x) {
      find(task);
#pragma unroll 1
      for (unsigned of_task = 0; of_task < steps(); ++of_task, ++step) {
        if (step >= STAGES) hopper::wait_at(is_done(step), OF_ALL);
        if (of_task == 0) {
          if (number >= 2) hopper::wait_at(queries_are_done(number), OF_ALL);
          this->template source<Queries>(p.query, 0, first, p.queries).copy(queries_of(number));
        }
        this->keys(of_task).copy(keys_of(step));
        this->values(of_task).copy(values_of(step));
        commit_copies();
        if (step > 0) shares.write(labels_of(step - 1));
        shares = Shares(p, image, of_task * KEYS + threadIdx.x);
        if (step >= AHEAD) say_that_it_is_there<AHEAD>(step - AHEAD);
      }
    }
    shares.write(labels_of(step - 1));
    // Every task has two steps at least.
    say_that_it_is_there<1>(step - 2);
    say_that_it_is_there<0>(step - 1);
  }
  template <int PENDING>
  __device__ void say_that_it_is_there(unsigned step) const {
    wait_for_copies<PENDING>();
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) hopper::arrive_at(is_there(step, group), OF_TWO_GROUPS);
  }
  // The fence is for what others copied. In their threads it would wait for what they are copying now, too.
  static __device__ void wait_for(unsigned step, unsigned group) {
    hopper::wait_at(is_there(step, group), OF_TWO_GROUPS);
    hopper::show_to_products();
  }

  // Those of a key. Its row of labels is 1 and the parts of each.
  struct Shares {
    float share[SOURCES];
    bool is_key;

    Shares() = default;
    __device__ Shares(const Forward& p, unsigned image, unsigned key) : share{}, is_key(key < p.keys) {
      const float* from = p.share + (uint64_t(image) * unsigned(p.keys) + key) * unsigned(p.sources);
#pragma unroll
      for (int source = 0; source < SOURCES; ++source) {
        if (is_key && source < p.sources) share[source] = from[source];
      }
    }
    __device__ void write(uint32_t labels) const {
      alignas(16) T row[LABEL_COLUMNS] = {from_float<T>(is_key ? 1.0f : 0.0f)};
      uint32_t parts[PARTS];
      split<T>(make_float2(share[0], share[1]), parts);
#pragma unroll
      for (int i = 0; i < PARTS; ++i) {
#pragma unroll
        for (int source = 0; source < SOURCES; ++source) {
          row[4 * source + 1 + i] = reinterpret_cast<const T(&)[SOURCES]>(parts[i])[source];
        }
      }
      store_shared(labels + Tile::at(threadIdx.x, 0), reinterpret_cast<const uint4&>(row));
    }
  };

  // A warpgroup without queries.
  __device__ void pass_by(unsigned group, unsigned step) const {
#pragma unroll 1
    for (unsigned end = step + steps(); step < end; ++step) {
      hopper::wait_at(is_there(step, group), OF_TWO_GROUPS);
      hopper::wait_at(may_begin(group), OF_TWO_GROUPS);
      hopper::arrive_at(may_begin(1 - group), OF_TWO_GROUPS);
      hopper::arrive_at(is_done(step), OF_ALL);
    }
  }

  // A step of keys, of which the last one may have fewer tiles than the others: its scores, which become weights.
  template <int COUNT>
  struct Step {
    float scores[2 * COUNT][4];
    Fragment weights[COUNT];

    __device__ void multiply_keys(uint64_t queries, uint64_t keys) {
      hopper::multiply_rows<T, false>(scores, queries, keys);
#pragma unroll
      for (int i = 1; i < D / 16; ++i) hopper::multiply_rows<T, true>(scores, queries + 2 * i, keys + 2 * i);
      hopper::commit_products();
    }
    // `kept`: what sums of older weights are to be multiplied by.
    __device__ void exponentiate(float unit, float (&highest)[2], float (&kept)[2]) {
      float now[2] = {scores[0][0], scores[0][2]};
#pragma unroll
      for (int i = 0; i < 8 * COUNT; ++i) now[i / 2 % 2] = fmaxf(now[i / 2 % 2], scores[i / 4][i % 4]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        now[i] = fmaxf(now[i], __shfl_xor_sync(0xffffffffu, now[i], 1));
        now[i] = fmaxf(highest[i], fmaxf(now[i], __shfl_xor_sync(0xffffffffu, now[i], 2)) * unit);
        kept[i] = exp2_of(highest[i] - now[i]);
        highest[i] = now[i];
      }
#pragma unroll
      for (int i = 0; i < 8 * COUNT; ++i) {
        scores[i / 4][i % 4] = exp2_of(fmaf(scores[i / 4][i % 4], unit, -now[i / 2 % 2]));
      }
    }
    __device__ void pack() {
#pragma unroll
      for (int tile = 0; tile < COUNT; ++tile) {
        weights[tile] = pack_scores<T>(reinterpret_cast<const float (&)[2][4]>(scores[2 * tile]));
      }
    }
    __device__ void multiply_values(Output& output, uint64_t values) const {
#pragma unroll
      for (int tile = 0; tile < COUNT; ++tile) {
        hopper::multiply_columns<T, true>(output, weights[tile], values + tile * (16 * Tile::PITCH / 16));
      }
      hopper::commit_products();
    }
  };

  // Tiles of the last step, if they are fewer than those of the others: many ViTs have 1 or 17 keys more than a
  // multiple of 128, those of 384 pixels in patches of 16 have 65.
  static constexpr int FEW = 2, SOME = 5;

  __device__ void take_queries(uint32_t queries, unsigned group, unsigned step) const {
    Step<TILES> now;
    Output output = {};
    float highest[2] = {-INFINITY, -INFINITY}, kept[2];
    const unsigned last = step + steps() - 1;
    wait_for(step, group);
    hopper::wait_at(may_begin(group), OF_TWO_GROUPS);
    hopper::begin_products();
    now.multiply_keys(hopper::descriptor(queries), hopper::descriptor(keys_of(step)));
    hopper::arrive_at(may_begin(1 - group), OF_TWO_GROUPS);
    hopper::wait_for_products(now.scores);
    now.exponentiate(p.unit, highest, kept);
    now.pack();
#pragma unroll 1
    while (++step < last) {
      take_step(now, now, queries, group, step, output, highest);
    }
    const int rest = (p.keys - 1) % KEYS + 1;
    if (rest <= 16 * FEW) {
      take_last<FEW>(now, queries, group, last, output, highest);
    } else if (rest <= 16 * SOME) {
      take_last<SOME>(now, queries, group, last, output, highest);
    } else {
      take_last<TILES>(now, queries, group, last, output, highest);
    }
    this->write(reinterpret_cast<const float (&)[D / 8][4]>(output),
                reinterpret_cast<const float (&)[1][4]>(output[D / 8]), highest, first + 64 * group + warp % 4 * 16);
  }
  template <int COUNT>
  __device__ void take_last(const Step<TILES>& before, uint32_t queries, unsigned group, unsigned step, Output& output,
                            float (&highest)[2]) const {
    Step<COUNT> now;
    take_step(before, now, queries, group, step, output, highest);
    hopper::begin_products();
    now.multiply_values(output, hopper::descriptor(values_of(step), PART_BYTES));
    hopper::wait_for_products(output);
    hopper::arrive_at(is_done(step), OF_ALL);
  }

  // Scores and weights of a step, and the product of the weights before with V.
  template <int COUNT>
  __device__ void take_step(const Step<TILES>& before, Step<COUNT>& now, uint32_t queries, unsigned group,
                            unsigned step, Output& output, float (&highest)[2]) const {
    float kept[2];
    wait_for(step, group);
    hopper::wait_at(may_begin(group), OF_TWO_GROUPS);
    hopper::begin_products();
    now.multiply_keys(hopper::descriptor(queries), hopper::descriptor(keys_of(step)));
    before.multiply_values(output, hopper::descriptor(values_of(step - 1), PART_BYTES));
    hopper::arrive_at(may_begin(1 - group), OF_TWO_GROUPS);
    hopper::wait_for_products<1>(now.scores);
    now.exponentiate(p.unit, highest, kept);
    hopper::wait_for_products(output);
    hopper::arrive_at(is_done(step - 1), OF_ALL);
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) output[i / 4][i % 4] *= kept[i / 2 % 2];
    now.pack();
  }
};

template <class T>
__global__ void __launch_bounds__(HopperStreamingKernel<T>::THREADS, 1)
    attention_forward_hopper_streaming(const __grid_constant__ Forward p) {
  extern __shared__ __align__(1024) unsigned char stages[];
  HopperStreamingKernel<T>{{{p, uint32_t(__cvta_generic_to_shared(stages))}}}.run();
}

}  // namespace

bool stream_on_hopper(const Forward& arguments, cudaStream_t stream) {
  Forward p = arguments;
  using Kernel = HopperStreamingKernel<__half>;
  const int multiprocessors = multiprocessors_of_hopper();
  if (multiprocessors == 0 || p.head_dim != 64 || p.keys <= Kernel::KEYS) return false;
  p.blocks = Divisor(unsigned(p.queries + Kernel::QUERIES - 1) / Kernel::QUERIES);
  const unsigned blocks = unsigned(std::min<int64_t>(multiprocessors, p.batch * p.heads * p.blocks.divisor));
  with_dtype(p, [&](auto type) {
    using T = decltype(type);
    launch<HopperStreamingKernel<T>>(attention_forward_hopper_streaming<T>, "attention_forward_hopper_streaming",
                                     blocks, p, stream);
  });
  return true;
}

}  // namespace tlalign::cuda
