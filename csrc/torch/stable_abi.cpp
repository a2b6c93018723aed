#include "torch/stable_abi.h"

#include <dlfcn.h>

#include <stdexcept>

namespace seqkernels::torch_abi {

Functions torch;

std::string load_functions() {
  // Python loads libtorch without making its symbols global; it is asked for by name, and not
  // loaded where the process has none.
  void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  if (!library) return "libtorch is not loaded; import torch, or link to it, before this library";
  Functions found;
  std::string missing;
  const auto find = [&](const char* name) {
    void* address = dlsym(library, name);
    if (!address) missing += (missing.empty() ? "" : ", ") + std::string(name);
    return address;
  };
#define SEQKERNELS_FIND(name, result, ...) \
  found.name = reinterpret_cast<result (*)(__VA_ARGS__)>(find(#name));
  SEQKERNELS_TORCH_FUNCTIONS(SEQKERNELS_FIND)
#undef SEQKERNELS_FIND
  if (!missing.empty()) return "libtorch is older than 2.10: it has no " + missing;
  torch = found;
  return "";
}

CudaStreamFunction cuda_stream_function() {
  static const CudaStreamFunction found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<CudaStreamFunction>(
        library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  if (!found) throw std::runtime_error("libtorch has no aoti_torch_get_current_cuda_stream");
  return found;
}

void check(Status status, const char* function) {
  if (status != 0) throw std::runtime_error(std::string(function) + " of torch failed");
}

}  // namespace seqkernels::torch_abi
