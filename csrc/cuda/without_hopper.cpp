// What the hopper*.cu say where they are left out: there is no Hopper.
#include "cuda/launch.h"

namespace tlalign::cuda {

bool launch_on_hopper(const Forward&, cudaStream_t) { return false; }
bool stream_on_hopper(const Forward&, cudaStream_t) { return false; }
bool launch_on_hopper(const Backward&, cudaStream_t) { return false; }

}  // namespace tlalign::cuda
