// The forward on Hopper where its tensor cores, of which a warpgroup of four warps has all at once, beat those that
// older GPUs have too: they read K and V from shared memory themselves. Compiled for sm_90a.
#include <vector>

#include "cuda/hopper_forward.h"

namespace tlalign::cuda {
namespace {

// As ForwardKernel, for heads of 64 with 193 to 200 keys and 193 to 208 queries. A block has a multiprocessor for
// itself and takes whole heads in turn, of which shared memory holds two: one warpgroup copies the next one, while the
// others multiply 64 queries each. They wait for each other only through the copies.
template <class T>
struct HopperKernel : HopperForwardKernel<T, ForwardKernel<T, 64, 25, 4, false, Kind::plain, 1>> {
  using Base = ForwardKernel<T, 64, 25, 4, false, Kind::plain, 1>;
  using Base::p, Base::shared, Base::lane, Base::warp, Base::turn, Base::image, Base::head;
  using typename Base::Labels;
  using typename Base::Tile;
  static constexpr int D = 64, OCTETS = 25, TILES = 13, ROWS = 16 * TILES;
  // Warpgroups that multiply, and all threads.
  static constexpr int GROUPS = 3, THREADS = 128 * (GROUPS + 1);
  static constexpr int COPYING_REGISTERS = 32, MULTIPLYING_REGISTERS = 160;
  // A stage has Q, K, V and the labels.
  static constexpr int PART_BYTES = Tile::bytes(ROWS);
  static constexpr int STAGE_BYTES = (3 * PART_BYTES + Base::LABEL_BYTES + 1023) / 1024 * 1024;
  static constexpr int SHARED_BYTES = 2 * STAGE_BYTES;
  // Tiles of weights that are multiplied together, while the next exponentials are taken.
  static constexpr int AT_ONCE = 4;
  // Products take 16 rows of V: those that there are not are zero.
  using Padded = typename Tile::template Source<ROWS, 128, false, Base::CERTAIN_KEYS>;

  // What lies in a stage.
  __device__ uint32_t queries_of(unsigned stage) const { return shared + stage * STAGE_BYTES; }
  __device__ uint32_t keys_of(unsigned stage) const { return queries_of(stage) + PART_BYTES; }
  __device__ uint32_t values_of(unsigned stage) const { return queries_of(stage) + 2 * PART_BYTES; }
  __device__ uint32_t labels_of(unsigned stage) const { return queries_of(stage) + 3 * PART_BYTES; }

  // Barriers. Q and K, or V and the labels, of a stage are there for a warpgroup: it waits, those who copy arrive.
  // Nobody needs them any more: all warpgroups arrive, those who copy wait.
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
      copy_heads(heads);
    } else {
      hopper::take_more_registers<MULTIPLYING_REGISTERS>();
      const unsigned group = unsigned(warp) / 4 - 1;
#pragma unroll 1
      for (unsigned number = 0, now = blockIdx.x; now < heads; ++number, now += gridDim.x) {
        find(now);
        // Of 13 tiles of queries a warpgroup has 4. One is left, which they take in turn: one of its warps has it, in
        // turn, the others compute something: to spare them that takes longer.
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

  // Q and K of a head come while V of the last one does.
  __device__ void copy_heads(unsigned heads) {
    unsigned number = 0;
#pragma unroll 1
    for (unsigned now = blockIdx.x; now < heads; ++number, now += gridDim.x) {
      const unsigned stage = number % 2;
      find(now);
      if (number >= 2) hopper::wait_at(scores_are_done(stage), OF_ALL);
      this->template source<Padded>(p.query, 0, 0, p.queries).copy(queries_of(stage));
      this->keys(0).copy(keys_of(stage));
      commit_copies();
      if (number > 0) say_that_values_are_there<1>(number - 1);
      if (number >= 2) hopper::wait_at(values_are_done(stage), OF_ALL);
      this->template source<Padded>(p.value, 2, 0, p.keys).copy(values_of(stage));
      commit_copies();
#pragma unroll 1
      for (int source = 0; source < p.label_groups; ++source) {
        store_labels(labels_of(stage), source);
      }
      wait_for_copies<1>();
      hopper::show_to_products();
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) hopper::arrive_at(scores_can_begin(stage, group), OF_A_GROUP);
    }
    say_that_values_are_there<0>(number - 1);
  }
  // A thread has two keys. A source has four rows: ones and the parts.
  __device__ void store_labels(uint32_t to, int source) const {
    const unsigned pair = threadIdx.x;
    if (2 * pair >= 8 * Base::LABEL_CHUNKS) return;
    const LabelsOfPair labels = labels_of_pair<T, false>(p, image, source, pair);
    to += source * (4 * Base::LABEL_PITCH) + pair * 4;
    store_shared(to, labels.is_key);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) store_shared(to + (1 + i) * Base::LABEL_PITCH, labels.parts[i]);
  }
  template <int PENDING>
  __device__ void say_that_values_are_there(unsigned number) const {
    wait_for_copies<PENDING>();
    hopper::show_to_products();
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) hopper::arrive_at(values_are_there(number % 2, group), OF_A_GROUP);
  }

  __device__ void take_queries(unsigned stage, unsigned group, unsigned row, bool works, bool is_first, bool is_last) {
    Fragment weights[TILES];
    Labels labels;
    float scores[OCTETS][4], output[D / 8][4], label[1][4], highest[2], shift[2];
    multiply_keys(scores, hopper::descriptor(queries_of(stage) + row * Tile::PITCH),
                  hopper::descriptor(keys_of(stage)));
    if (is_last) hopper::arrive_at(scores_are_done(stage), OF_ALL);
    this->find_highest(scores, highest, shift, 0);
    if (is_first) hopper::wait_at(values_are_there(stage, group), OF_A_GROUP);
    const uint64_t values = hopper::descriptor(values_of(stage));
    // Columns that nobody asks for have what other ones have.
    const uint32_t label_rows =
        labels_of(stage) + (lane & (4 * p.label_groups - 1)) * Base::LABEL_PITCH + lane / 8 * 16;
#pragma unroll
    for (int first = 0; first < TILES; first += AT_ONCE) {
#pragma unroll
      for (int tile = first; tile < min(first + AT_ONCE, TILES); ++tile) {
        weights[tile] = this->weights_of(scores, tile, shift);
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
    if (works) this->write(output, label, highest, row + warp % 4 * 16);
  }

  static __device__ void multiply_keys(float (&scores)[OCTETS][4], uint64_t queries, uint64_t keys) {
    hopper::begin_products();
    hopper::multiply_rows<T, false>(scores, queries, keys);
#pragma unroll
    for (int i = 1; i < D / 16; ++i) hopper::multiply_rows<T, true>(scores, queries + 2 * i, keys + 2 * i);
    hopper::commit_products();
    hopper::wait_for_products(scores);
  }
};

template <class T>
__global__ void __launch_bounds__(HopperKernel<T>::THREADS, 1)
    attention_forward_hopper(const __grid_constant__ Forward p) {
  extern __shared__ __align__(1024) unsigned char stages[];
  HopperKernel<T>{{{p, uint32_t(__cvta_generic_to_shared(stages))}}}.run();
}

}  // namespace

int multiprocessors_of_hopper() {
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
  return cudaGetDevice(&device) == cudaSuccess && device < int(of_devices.size()) ? of_devices[device] : 0;
}

bool launch_on_hopper(const Forward& p, cudaStream_t stream) {
  const bool fits = p.queries > 192 && p.queries <= 208 && p.keys > 192 && p.keys <= 200;
  if (p.head_dim != 64 || !fits) return false;
  // So few heads are done sooner by more blocks than one a multiprocessor.
  const int blocks = multiprocessors_of_hopper();
  if (blocks == 0 || int64_t(p.batch) * p.heads < 2 * blocks) return false;
  with_dtype(p, [&](auto type) {
    using T = decltype(type);
    launch<HopperKernel<T>>(attention_forward_hopper<T>, "attention_forward_hopper", blocks, p, stream);
  });
  return true;
}

}  // namespace tlalign::cuda
