// What the two kernels of the forward on Hopper share.
#pragma once

#include "cuda/forward.h"
#include "cuda/hopper.h"
#include "cuda/launch.h"

namespace tlalign::cuda {

// A ForwardKernel for heads of 64, `Base`, whose warps write their queries from registers.
template <class T, class Base>
struct HopperForwardKernel : Base {
  using Base::p, Base::image, Base::head, Base::turn, Base::lane;
  static constexpr int D = 64;

  // 16 queries from `row` on.
  __device__ void write(const float (&output)[D / 8][4], const float (&label)[1][4], const float (&highest)[2],
                        unsigned row) const {
    const typename Base::Numbers numbers(p, turn, row, lane);
    typename Base::Shares shares;
    const float2 factor = this->write_log_sum(label, highest, shares, numbers);
    this->write_shares(shares, numbers);
    char* to = static_cast<char*>(p.output);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned query = row + lane / 4 + 8 * i;
      char* to_row =
          to + ((uint64_t(image) * unsigned(p.queries) + query) * unsigned(p.heads) + head) * (D * sizeof(T));
      hopper::store_row<T>(to_row, output, i, i == 0 ? factor.x : factor.y, query < p.queries, lane);
    }
  }
};

}  // namespace tlalign::cuda
