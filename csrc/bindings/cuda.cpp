// The CUDA kernels in the Python module. Pointers are device memory, but those of `pack`.
#include <stdexcept>

#include "bindings/bindings.h"
#include "seqkernels/cuda_encoder.h"
#include "seqkernels/cuda_request_scoring.h"
#include "seqkernels/cuda_resilient_batch_norm.h"

namespace py = pybind11;

namespace seqkernels {
namespace {

using Allocate = py::function;  // int (bytes): an address in device memory, kept by the caller

void raise(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

void* workspace_of(int64_t bytes, const Allocate& allocate) {
  return bytes > 0 ? reinterpret_cast<void*>(allocate(bytes).cast<uintptr_t>()) : nullptr;
}

// An encoder's sizes and options; its packed parameters are the caller's.
class EncoderModel {
 public:
  EncoderModel(int d_model, int nhead, int dim_feedforward, int num_layers,
               const std::string& activation, float negative_slope, bool norm_first,
               float layer_norm_eps, bool has_final_norm, float final_norm_eps) {
    shape_.d_model = d_model;
    shape_.nhead = nhead;
    shape_.dim_feedforward = dim_feedforward;
    shape_.num_layers = num_layers;
    shape_.activation = activation_of("encoder", activation);
    shape_.negative_slope = negative_slope;
    shape_.norm_first = norm_first;
    shape_.layer_norm_eps = layer_norm_eps;
    shape_.has_final_norm = has_final_norm;
    shape_.final_norm_eps = final_norm_eps;
  }

  size_t packed_bytes() const { return cuda::encoder_packed_bytes(shape_); }

  void pack(const std::vector<std::vector<uintptr_t>>& layers,
            const std::vector<uintptr_t>& final_norm, uintptr_t packed) const {
    const EncoderParameters parameters = encoder_parameters(layers, final_norm);
    const py::gil_scoped_release release;
    cuda::pack_encoder(shape_, parameters, reinterpret_cast<void*>(packed));
  }

  void run(uintptr_t packed, const Allocate& allocate, int device, uintptr_t stream,
           const EncoderCall& call) const {
    std::string error;
    const cuda::EncoderDevice of_device = cuda::encoder_device(device, &error);
    raise(error);
    if (call.user_index) {
      const cuda::RequestPlan plan = cuda::plan_request_scoring(shape_, call, of_device);
      if (plan.reasons.empty()) {
        raise(cuda::launch_request_scoring(shape_, plan, call, pointer<void>(packed),
                                           workspace_of(plan.workspace_bytes, allocate),
                                           reinterpret_cast<void*>(stream)));
        return;
      }
    }
    const cuda::EncoderPlan plan = cuda::plan_encoder(shape_, call, of_device);
    if (!plan.reasons.empty()) throw std::invalid_argument("encoder: " + plan.reasons[0]);
    raise(cuda::launch_encoder(shape_, plan, call, pointer<void>(packed),
                               workspace_of(plan.workspace_bytes, allocate),
                               reinterpret_cast<void*>(stream)));
  }

 private:
  EncoderShape shape_;
};

template <class... Args>
auto forward_of(EncoderCall (*call_of)(Args...)) {
  return [call_of](const EncoderModel& model, uintptr_t packed, const Allocate& allocate,
                   int device, uintptr_t stream,
                   Args... args) { model.run(packed, allocate, device, stream, call_of(args...)); };
}

template <class... Args>
auto batch_norm_of(ResilientBatchNormCall (*call_of)(Args...)) {
  return [call_of](int, uintptr_t stream, Args... args) {
    raise(cuda::launch_resilient_batch_norm(call_of(args...), reinterpret_cast<void*>(stream)));
  };
}

std::vector<std::string> unsupported_reasons(int d_model, int nhead, int dim_feedforward,
                                             int num_layers) {
  EncoderShape shape;
  shape.d_model = d_model;
  shape.nhead = nhead;
  shape.dim_feedforward = dim_feedforward;
  shape.num_layers = num_layers;
  return cuda::encoder_unsupported_reasons(shape);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("encoder_unsupported_reasons", &unsupported_reasons, py::arg("d_model"), py::arg("nhead"),
        py::arg("dim_feedforward"), py::arg("num_layers"),
        "Why no kernel takes an encoder of these sizes; empty when one does.");
  py::class_<EncoderModel>(m, "EncoderModel", "An encoder's sizes and options.")
      .def(py::init<int, int, int, int, const std::string&, float, bool, float, bool, float>(),
           py::arg("d_model"), py::arg("nhead"), py::arg("dim_feedforward"), py::arg("num_layers"),
           py::arg("activation"), py::arg("negative_slope"), py::arg("norm_first"),
           py::arg("layer_norm_eps"), py::arg("has_final_norm"), py::arg("final_norm_eps"))
      .def_property_readonly("packed_bytes", &EncoderModel::packed_bytes)
      .def("pack", &EncoderModel::pack, py::arg("layers"), py::arg("final_norm"), py::arg("packed"),
           "Pack parameters in host memory into `packed`, host memory too.")
      .def("forward", forward_of(&encoder_call),
           "packed, allocate, device, stream, then the arguments of encoder_call.");
  m.def("resilient_batch_norm", batch_norm_of(&batch_norm_call),
        "device, stream, then the arguments of batch_norm_call.");
}

}  // namespace seqkernels
