#include "seqkernels/library.h"
#include "torch/stable_abi.h"

namespace seqkernels {

TensorFacts facts_of(void* handle) {
  using namespace torch_abi;
  const auto tensor = static_cast<TensorHandle>(handle);
  TensorFacts facts;
  int64_t *sizes = nullptr, *strides = nullptr;
  SEQKERNELS_TORCH(torch_get_const_data_ptr, tensor, &facts.data);
  SEQKERNELS_TORCH(aoti_torch_get_dim, tensor, &facts.dim);
  SEQKERNELS_TORCH(aoti_torch_get_sizes, tensor, &sizes);
  SEQKERNELS_TORCH(aoti_torch_get_strides, tensor, &strides);
  SEQKERNELS_TORCH(aoti_torch_get_dtype, tensor, &facts.dtype);
  facts.sizes = sizes;
  facts.strides = strides;
  return facts;
}

}  // namespace seqkernels
