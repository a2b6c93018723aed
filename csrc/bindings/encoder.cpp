// The op `encoder` in the Python module.
#include "seqkernels/encoder.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace seqkernels {
namespace {

template <class T>
T enumerator(const char* name, int value, int count) {
  if (value < 0 || value >= count) {
    throw std::invalid_argument(std::string("encoder: ") + name + ": expected 0 .. " +
                                std::to_string(count - 1) + ", got " + std::to_string(value));
  }
  return static_cast<T>(value);
}

EncoderLayerParameters layer_of(const std::vector<uintptr_t>& p) {
  if (p.size() != 12) {
    throw std::invalid_argument("encoder: layers: expected 12 pointers a layer, got " +
                                std::to_string(p.size()));
  }
  const auto at = [&](size_t i) { return pointer<float>(p[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11)};
}

// An encoder's weights, packed for one instruction set.
class EncoderWeights {
 public:
  EncoderWeights(std::string isa, int d_model, int nhead, int dim_feedforward,
                 const std::string& activation, float negative_slope, bool norm_first,
                 float layer_norm_eps, float final_norm_eps,
                 const std::vector<std::vector<uintptr_t>>& layers,
                 const std::vector<uintptr_t>& final_norm)
      : isa_(std::move(isa)) {
    if (!final_norm.empty() && final_norm.size() != 2) {
      throw std::invalid_argument("encoder: final_norm: expected no or 2 pointers, got " +
                                  std::to_string(final_norm.size()));
    }
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
    EncoderParameters parameters;
    for (const auto& layer : layers) parameters.layers.push_back(layer_of(layer));
    if (shape.has_final_norm) {
      parameters.final_norm_weight = pointer<float>(final_norm[0]);
      parameters.final_norm_bias = pointer<float>(final_norm[1]);
    }
    const py::gil_scoped_release release;
    encoder_ = make_encoder(isa_, shape, parameters);
  }

  const std::string& isa() const { return isa_; }
  size_t packed_bytes() const { return encoder_->packed_bytes(); }
  size_t workspace_bytes(int64_t length, int fusion) const {
    const bool append = enumerator<Fusion>("fusion", fusion, 3) == Fusion::kAppend;
    return encoder_->workspace_bytes(length + (append ? 1 : 0));
  }

  void forward(uintptr_t x, bool is_bf16, int64_t batch, int64_t length, int64_t stride_b,
               int64_t stride_l, uintptr_t candidate, int64_t candidate_dim,
               int64_t candidate_stride, uintptr_t mask, int64_t mask_stride_b,
               int64_t mask_stride_l, uintptr_t lengths, int fusion, int padding, bool latest_last,
               int64_t latest_k, bool pool_max, uintptr_t out, int64_t out_stride_b,
               int64_t out_stride_l, int num_threads, uintptr_t user_index, int64_t users) const {
    EncoderCall call;
    call.x = pointer<void>(x);
    call.is_bf16 = is_bf16;
    call.batch = batch;
    call.length = length;
    call.stride_b = stride_b;
    call.stride_l = stride_l;
    call.candidate = pointer<void>(candidate);
    call.candidate_dim = candidate_dim;
    call.candidate_stride = candidate_stride;
    call.mask = pointer<uint8_t>(mask);
    call.mask_stride_b = mask_stride_b;
    call.mask_stride_l = mask_stride_l;
    call.lengths = pointer<int64_t>(lengths);
    call.fusion = enumerator<Fusion>("fusion", fusion, 3);
    call.padding = enumerator<Padding>("padding", padding, 3);
    call.latest_last = latest_last;
    call.latest_k = latest_k;
    call.pool_max = pool_max;
    call.out = reinterpret_cast<void*>(out);
    call.out_stride_b = out_stride_b;
    call.out_stride_l = out_stride_l;
    call.num_threads = num_threads;
    call.user_index = pointer<int64_t>(user_index);
    call.users = users;
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
      .def("forward", &EncoderWeights::forward, py::arg("x"), py::arg("x_is_bf16"),
           py::arg("batch"), py::arg("length"), py::arg("stride_b"), py::arg("stride_l"),
           py::arg("candidate"), py::arg("candidate_dim"), py::arg("candidate_stride"),
           py::arg("mask"), py::arg("mask_stride_b"), py::arg("mask_stride_l"), py::arg("lengths"),
           py::arg("fusion"), py::arg("padding"), py::arg("latest_last"), py::arg("latest_k"),
           py::arg("pool_max"), py::arg("out"), py::arg("out_stride_b"), py::arg("out_stride_l"),
           py::arg("num_threads"), py::arg("user_index") = 0, py::arg("users") = 0);
}

}  // namespace seqkernels
