// The C functions of torch's stable ABI that the ops use, declared here so that building needs no
// torch, and looked up in the libtorch that the process has loaded. Every torch from 2.10 on has
// them with these signatures; tests/torch/test_stable_abi.py compares them with torch's headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct AtenTensorOpaque;
struct DeviceGuardOpaque;
struct StableListOpaque;
struct StringOpaque;
struct TorchLibraryOpaque;

namespace seqkernels::torch_abi {

using Status = int32_t;  // 0: no error
using TensorHandle = AtenTensorOpaque*;
using DeviceGuardHandle = DeviceGuardOpaque*;
using ListHandle = StableListOpaque*;
using StringHandle = StringOpaque*;
using LibraryHandle = TorchLibraryOpaque*;
using Value = uint64_t;  // an argument or a result: torch's StableIValue
using Kernel = void (*)(Value* stack, uint64_t num_inputs, uint64_t num_outputs);

// The version whose calling convention is used, as TORCH_ABI_VERSION counts it.
constexpr uint64_t kVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);

// X(function, result, parameters...)
#define SEQKERNELS_TORCH_FUNCTIONS(X)                                                             \
  X(aoti_torch_device_type_cpu, int32_t)                                                          \
  X(aoti_torch_device_type_cuda, int32_t)                                                         \
  X(aoti_torch_dtype_bfloat16, int32_t)                                                           \
  X(aoti_torch_dtype_bool, int32_t)                                                               \
  X(aoti_torch_dtype_float32, int32_t)                                                            \
  X(aoti_torch_dtype_int32, int32_t)                                                              \
  X(aoti_torch_dtype_int64, int32_t)                                                              \
  X(aoti_torch_dtype_uint8, int32_t)                                                              \
  X(aoti_torch_get_dim, Status, TensorHandle, int64_t*)                                           \
  X(aoti_torch_get_sizes, Status, TensorHandle, int64_t**)                                        \
  X(aoti_torch_get_strides, Status, TensorHandle, int64_t**)                                      \
  X(aoti_torch_get_dtype, Status, TensorHandle, int32_t*)                                         \
  X(aoti_torch_get_device_type, Status, TensorHandle, int32_t*)                                   \
  X(aoti_torch_get_device_index, Status, TensorHandle, int32_t*)                                  \
  X(aoti_torch_is_contiguous, Status, TensorHandle, bool*)                                        \
  X(aoti_torch_empty_strided, Status, int64_t, const int64_t*, const int64_t*, int32_t, int32_t,  \
    int32_t, TensorHandle*)                                                                       \
  X(aoti_torch_copy_, Status, TensorHandle, TensorHandle, int32_t)                                \
  X(aoti_torch_zero_, Status, TensorHandle)                                                       \
  X(aoti_torch_new_tensor_handle, Status, TensorHandle, TensorHandle*)                            \
  X(aoti_torch_delete_tensor_object, Status, TensorHandle)                                        \
  X(aoti_torch_delete_library_object, Status, LibraryHandle)                                      \
  X(aoti_torch_create_device_guard, Status, int32_t, DeviceGuardHandle*)                          \
  X(aoti_torch_delete_device_guard, Status, DeviceGuardHandle)                                    \
  X(aoti_torch_library_init_fragment, Status, const char*, const char*, uint32_t, LibraryHandle*) \
  X(aoti_torch_library_init_impl, Status, const char*, const char*, const char*, uint32_t,        \
    LibraryHandle*)                                                                               \
  X(aoti_torch_library_def, Status, LibraryHandle, const char*)                                   \
  X(torch_library_impl, Status, LibraryHandle, const char*, Kernel, uint64_t)                     \
  X(torch_get_num_threads, Status, uint32_t*)                                                     \
  X(torch_get_mutable_data_ptr, Status, TensorHandle, void**)                                     \
  X(torch_get_const_data_ptr, Status, TensorHandle, const void**)                                 \
  X(torch_list_size, Status, ListHandle, size_t*)                                                 \
  X(torch_list_get_item, Status, ListHandle, size_t, Value*)                                      \
  X(torch_delete_list, Status, ListHandle)                                                        \
  X(torch_string_length, Status, StringHandle, size_t*)                                           \
  X(torch_string_c_str, Status, StringHandle, const char**)                                       \
  X(torch_delete_string, Status, StringHandle)

struct Functions {
#define SEQKERNELS_MEMBER(name, result, ...) result (*name)(__VA_ARGS__) = nullptr;
  SEQKERNELS_TORCH_FUNCTIONS(SEQKERNELS_MEMBER)
#undef SEQKERNELS_MEMBER
};

// Looks the functions up; what is missing, empty if nothing is. Once it is empty, `torch` is
// filled.
std::string load_functions();

extern Functions torch;

// aoti_torch_get_current_cuda_stream, which a libtorch without CUDA does not have. Throws
// std::runtime_error where it is missing.
using CudaStreamFunction = Status (*)(int32_t device_index, void** stream);
CudaStreamFunction cuda_stream_function();

// Throws std::runtime_error in the name of `function` unless the status is that of success.
void check(Status status, const char* function);

}  // namespace seqkernels::torch_abi

// Calls a function of torch that returns a status.
#define SEQKERNELS_TORCH(name, ...) \
  ::seqkernels::torch_abi::check(::seqkernels::torch_abi::torch.name(__VA_ARGS__), #name)
