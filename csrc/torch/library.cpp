// Registers the ops with torch when the library is loaded into a process that has it.
#include "seqkernels/library.h"

#include <iterator>
#include <stdexcept>
#include <vector>

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

constexpr Schema kNativeSchemas[] = {
#include "native_schemas.inc"
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
    {"resilient_batch_norm_cuda", SEQKERNELS_CUDA_KEY, resilient_batch_norm_cuda},
#endif
};

#if !defined(SEQKERNELS_HOST_EMULATION)
constexpr Schema kSchemas[] = {
#include "schemas.inc"
};
constexpr Implementation kOnWeights[] = {
    {"encoder", "CPU", encoder},
    {"request_scoring", "CPU", request_scoring},
    {"linear", "CPU", linear},
    {"resilient_batch_norm", "CPU", resilient_batch_norm},
};
#endif

// Owns registrations: they go with it.
class Registrations {
 public:
  void define(const Schema* first, const Schema* end) {
    LibraryHandle library = nullptr;
    SEQKERNELS_TORCH(aoti_torch_library_init_fragment, SEQKERNELS_OPS_NAMESPACE, __FILE__, __LINE__,
                     &library);
    libraries_.push_back(library);
    for (; first != end; ++first) SEQKERNELS_TORCH(aoti_torch_library_def, library, first->schema);
  }
  void implement(const Implementation* first, const Implementation* end) {
    for (; first != end; ++first) {
      LibraryHandle library = nullptr;
      SEQKERNELS_TORCH(aoti_torch_library_init_impl, SEQKERNELS_OPS_NAMESPACE, first->key, __FILE__,
                       __LINE__, &library);
      libraries_.push_back(library);
      SEQKERNELS_TORCH(torch_library_impl, library, first->op, first->kernel, kVersion);
    }
  }
  void withdraw() {
    while (!libraries_.empty()) {  // implementations before what they implement
      torch.aoti_torch_delete_library_object(libraries_.back());
      libraries_.pop_back();
    }
  }

 private:
  std::vector<LibraryHandle> libraries_;
};

// They live as long as the process; so do all schemas, for torch keeps handles to what it called.
Registrations& native_ops() {
  static Registrations* const made = new Registrations;
  return *made;
}
Registrations& ops_on_weights() {
  static Registrations* const made = new Registrations;
  return *made;
}

std::string register_ops() {
  const std::string error = load_functions();
  if (!error.empty()) return error;
  try {
    native_ops().define(std::begin(kNativeSchemas), std::end(kNativeSchemas));
    native_ops().implement(std::begin(kImplementations), std::end(kImplementations));
#if !defined(SEQKERNELS_HOST_EMULATION)
    native_ops().define(std::begin(kSchemas), std::end(kSchemas));
    ops_on_weights().implement(std::begin(kOnWeights), std::end(kOnWeights));
#endif
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

void withdraw_ops_on_weights() {
  ops_on_weights().withdraw();
}

}  // namespace seqkernels
