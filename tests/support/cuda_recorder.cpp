// Stands in for CUDA's runtime where there is no GPU: records launches instead of doing them. Built by cuda_offline.py,
// with the kernels' launchers and bindings, as a Python module.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "cuda/attention.h"
#include "cuda/bindings.h"

namespace py = pybind11;

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

// Kernels register themselves before this file's variables would be there.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> of_functions;
  return of_functions;
}
std::map<const void*, int> shared_limits;
Configuration configuration;
py::list* launches;

// What a kernel is launched with. The gaps that alignment leaves in it hold what the stack held: beside a small number
// that may look like an address in the memory of a tensor, and be replaced with it (`execute` of cuda_offline.py).
template <class T>
py::bytes bytes_of(const void* argument) {
  T parameters = *static_cast<const T*>(argument);
  __builtin_clear_padding(&parameters);
  return py::bytes(reinterpret_cast<const char*>(&parameters), sizeof(T));
}

// Device 0 is an A100, device 1 a Hopper, of which a test wants few multiprocessors.
int device = 0;

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = device;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  if (shared > 48 * 1024 && shared_limits[kernel] < static_cast<int>(shared)) return cudaErrorInvalidValue;
  const std::string& name = names().at(kernel);
  const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  const py::bytes parameters = has("pack_places") || has("pack_starts") ? bytes_of<tlalign::cuda::Problem>(arguments[0])
                               : has("attention_backward") ? bytes_of<tlalign::cuda::Backward>(arguments[0])
                                                           : bytes_of<tlalign::cuda::Forward>(arguments[0]);
  launches->append(py::make_tuple(name, py::make_tuple(grid.x, grid.y, grid.z),
                                  py::make_tuple(block.x, block.y, block.z), shared, parameters,
                                  reinterpret_cast<uintptr_t>(stream)));
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  shared_limits[function] = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int of_device) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 + of_device
           : attribute == cudaDevAttrMultiProcessorCount  ? 3
                                                          : 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "refused by the recorder"; }

}  // extern "C"

PYBIND11_MODULE(cuda_recorder, module) {
  launches = new py::list;
  module.attr("launches") = *launches;
  module.def("set_device", [](int number) { device = number; });
  tlalign::cuda::bind(module);
}
