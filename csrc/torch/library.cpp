// Registers the ops with torch when the library is loaded into a process that has it.
#include "seqkernels/library.h"

#include <stdexcept>

#include "torch/ops.h"

// The emulation of the CUDA kernels registers them in a namespace of its own, for tensors in host
// memory.
#if !defined(SEQKERNELS_OPS_NAMESPACE)
#define SEQKERNELS_OPS_NAMESPACE "seqkernels"
#endif

namespace seqkernels {
namespace {

using namespace torch_abi;

struct Schema {
  const char* op;
  const char* schema;
};

struct Implementation {
  const char* op;
  const char* key;  // of torch's dispatcher
  Kernel kernel;
};

constexpr Schema kSchemas[] = {
#include "schemas.inc"
};

// Packing takes weights on any device.
constexpr const char* kAny = "CompositeExplicitAutograd";
constexpr Implementation kImplementations[] = {
#if !defined(SEQKERNELS_HOST_EMULATION)
    {"pack_encoder", kAny, pack_encoder},
    {"encoder_packed", "CPU", encoder_packed},
    {"encoder_packed.out", "CPU", encoder_packed_out},
    {"encoder_workspace_bytes", "CPU", encoder_workspace_bytes},
    {"pack_linear", kAny, pack_linear},
    {"linear_packed", "CPU", linear_packed},
    {"pack_resilient_batch_norm", kAny, pack_resilient_batch_norm},
    {"resilient_batch_norm_packed", "CPU", resilient_batch_norm_packed},
#endif
#if defined(SEQKERNELS_CUDA_KEY)
    {"pack_encoder_cuda", kAny, pack_encoder_cuda},
    {"encoder_packed", SEQKERNELS_CUDA_KEY, encoder_packed_cuda},
    {"pack_resilient_batch_norm_cuda", kAny, pack_resilient_batch_norm_cuda},
    {"resilient_batch_norm_packed", SEQKERNELS_CUDA_KEY, resilient_batch_norm_packed_cuda},
#endif
};

std::string register_ops() {
  const std::string error = load_functions();
  if (!error.empty()) return error;
  try {
    // What registers owns the registration; it lives as long as the process, like the ops.
    const char* const name = SEQKERNELS_OPS_NAMESPACE;
    LibraryHandle schemas = nullptr;
    SEQKERNELS_TORCH(aoti_torch_library_init_fragment, name, __FILE__, __LINE__, &schemas);
    for (const Schema& s : kSchemas) SEQKERNELS_TORCH(aoti_torch_library_def, schemas, s.schema);
    for (const Implementation& i : kImplementations) {
      LibraryHandle kernels = nullptr;
      SEQKERNELS_TORCH(aoti_torch_library_init_impl, name, i.key, __FILE__, __LINE__, &kernels);
      SEQKERNELS_TORCH(torch_library_impl, kernels, i.op, i.kernel, kVersion);
    }
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}

const std::string kError = register_ops();

}  // namespace

const std::string& ops_error() {
  return kError;
}

}  // namespace seqkernels
