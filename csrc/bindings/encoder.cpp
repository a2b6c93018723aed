// The op `encoder` in the Python module.
#include "seqkernels/encoder.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace seqkernels {
namespace {

// An encoder's weights, packed for one instruction set.
class EncoderWeights {
 public:
  EncoderWeights(std::string isa, int d_model, int nhead, int dim_feedforward,
                 const std::string& activation, float negative_slope, bool norm_first,
                 float layer_norm_eps, float final_norm_eps,
                 const std::vector<std::vector<uintptr_t>>& layers,
                 const std::vector<uintptr_t>& final_norm)
      : isa_(std::move(isa)) {
    EncoderShape shape;
    shape.d_model = d_model;
    shape.nhead = nhead;
    shape.dim_feedforward = dim_feedforward;
    shape.num_layers = static_cast<int>(layers.size());
    shape.activation = activation_of("encoder", activation);
    shape.negative_slope = negative_slope;
    shape.norm_first = norm_first;
    shape.layer_norm_eps = layer_norm_eps;
    shape.has_final_norm = !final_norm.empty();
    shape.final_norm_eps = final_norm_eps;
    const EncoderParameters parameters = encoder_parameters(layers, final_norm);
    const py::gil_scoped_release release;
    encoder_ = make_encoder(isa_, shape, parameters);
  }

  const std::string& isa() const { return isa_; }
  size_t packed_bytes() const { return encoder_->packed_bytes(); }
  size_t workspace_bytes(int64_t length, int fusion) const {
    const bool append = enumerator<Fusion>("fusion", fusion, 3) == Fusion::kAppend;
    return encoder_->workspace_bytes(length + (append ? 1 : 0));
  }

  void run(EncoderCall call, int num_threads) const {
    call.num_threads = num_threads;
    const py::gil_scoped_release release;
    if (call.user_index) {
      encoder_->score_request(call);
    } else {
      encoder_->forward(call);
    }
  }

 private:
  std::string isa_;
  std::unique_ptr<Encoder> encoder_;
};

// The method that takes the arguments of `call_of`, then num_threads.
template <class... Args>
auto forward_of(EncoderCall (*call_of)(Args...)) {
  return [call_of](const EncoderWeights& weights, Args... args, int num_threads) {
    weights.run(call_of(args...), num_threads);
  };
}

}  // namespace

void bind_encoder(py::module_& m) {
  py::class_<EncoderWeights>(m, "EncoderWeights",
                             "An encoder's parameters, packed for one instruction set.")
      .def(py::init<std::string, int, int, int, const std::string&, float, bool, float, float,
                    const std::vector<std::vector<uintptr_t>>&, const std::vector<uintptr_t>&>(),
           py::arg("isa"), py::arg("d_model"), py::arg("nhead"), py::arg("dim_feedforward"),
           py::arg("activation"), py::arg("negative_slope"), py::arg("norm_first"),
           py::arg("layer_norm_eps"), py::arg("final_norm_eps"), py::arg("layers"),
           py::arg("final_norm"))
      .def_property_readonly("isa", &EncoderWeights::isa)
      .def_property_readonly("nbytes", &EncoderWeights::packed_bytes)
      .def("workspace_bytes", &EncoderWeights::workspace_bytes, py::arg("length"),
           py::arg("fusion") = 0)
      .def("forward", forward_of(&encoder_call),
           "The arguments of encoder_call, then num_threads.");
}

}  // namespace seqkernels
