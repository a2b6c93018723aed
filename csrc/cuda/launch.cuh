// Launches by the CUDA runtime; errors come back as text.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace seqkernels::cuda {

inline std::string error_of(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // it is reported here, and not again to whoever asks next
  return std::string(op) + ": CUDA: " + cudaGetErrorString(status);
}

template <class Params>
std::string launch_kernel(const char* op, void (*kernel)(Params), int grid, int threads,
                          int64_t shared_bytes, void* stream, Params params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  // More than 48 KB have to be asked for.
  const cudaError_t status = cudaFuncSetAttribute(
      function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status != cudaSuccess) return error_of(op, status);
  void* arguments[] = {&params};
  return error_of(
      op, cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid)),
                           dim3(static_cast<unsigned>(threads)), arguments,
                           static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)));
}

}  // namespace seqkernels::cuda
