// Stands in for CUDA's runtime where there is no GPU: records launches instead of doing them. Built by cuda_offline.py,
// with the kernels' launchers and bindings, as a Python module.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <type_traits>

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

// What a kernel is launched with, and where in that it has addresses: a number may look like one.
template <class T>
py::tuple parameters_of(const void* argument) {
  const T& values = *static_cast<const T*>(argument);
  const char* begin = static_cast<const char*>(argument);
  py::list places;
  const auto note = [&](auto*... addresses) { (places.append(reinterpret_cast<const char*>(addresses) - begin), ...); };
  note(&values.query.data, &values.key.data, &values.value.data, &values.bias.data, &values.mask.data);
  note(&values.bias_starts.data, &values.mask_starts.data, &values.windows.places, &values.windows.padding);
  if constexpr (std::is_same_v<T, tlalign::cuda::Forward>) {
    note(&values.share, &values.residual, &values.labels, &values.head_share);
    note(&values.output, &values.share_out, &values.log_sum_exp);
  }
  if constexpr (std::is_same_v<T, tlalign::cuda::Backward>) {
    note(&values.grad_output.data, &values.output, &values.log_sum_exp, &values.row_terms, &values.grad_query.data);
    note(&values.grad_key.data, &values.grad_value.data, &values.bias_sums, &values.grad_padding);
  }
  return py::make_tuple(py::bytes(begin, sizeof(T)), places);
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
  const py::tuple parameters = has("pack_places") || has("pack_starts")
                                   ? parameters_of<tlalign::cuda::Problem>(arguments[0])
                               : has("attention_backward") ? parameters_of<tlalign::cuda::Backward>(arguments[0])
                                                           : parameters_of<tlalign::cuda::Forward>(arguments[0]);
  launches->append(py::make_tuple(name, py::make_tuple(grid.x, grid.y, grid.z),
                                  py::make_tuple(block.x, block.y, block.z), shared, parameters[0], parameters[1],
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
