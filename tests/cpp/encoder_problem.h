// One problem for the encoder: shape, options, seeded parameters and inputs, and a run of the
// kernel on them that leaves no room for a stray access: every input ends where its heap block
// ends, what lies between strided rows is NaN, and every byte of the output's block that belongs to
// no row has to survive.
//
// Letters as in encoder.h: B sequences, L events, T tokens, D = d_model, F = dim_feedforward.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "packed.h"
#include "seqkernels/encoder.h"

namespace seqkernels::test {

// To nearest, ties to even; finite values only.
inline uint16_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float rounded_to_bf16(float x) {
  return from_bf16(bf16_bits(x));
}

enum class Mask {
  kNone,
  kLengths,  // int64, 0 and L among them
  kPrefix,   // the same as bytes
  kLeft,     // padding before the events
  kHoles,    // anywhere, bytes other than 1
  kEmpty,    // the first sequence has no valid event, the others have holes
};
enum class Layout {
  kTight,       // contiguous
  kGaps,        // rows and sequences apart, first element unaligned
  kTransposed,  // sequences inside events: [L, B, E]
};
enum class Parameters { kAll, kNoBias, kBare };  // kBare: no biases, no norm weights

struct Case {
  int d_model = 96, nhead = 2, dim_feedforward = 32, layers = 1;
  int64_t batch = 1, length = 16;
  Fusion fusion = Fusion::kNone;
  int64_t candidate_dim = 0;  // with kConcat; kAppend takes D
  Padding padding = Padding::kZero;
  Mask mask = Mask::kNone;
  Layout layout = Layout::kTight;
  bool bf16 = false;
  int64_t latest_k = -1;
  bool latest_last = false;
  bool pool = false;
  bool norm_first = false;
  Activation activation = Activation::kRelu;
  bool final_norm = false;
  Parameters parameters = Parameters::kAll;
  float sharpen = 1;  // of the attention: multiplies W_q
  float scale = 1;    // of x; post-norm, the first layer's W_q and W_k shrink as much
  uint64_t seed = 0;

  int64_t tokens() const { return length + (fusion == Fusion::kAppend); }
  int64_t event_dim() const {
    return fusion == Fusion::kConcat ? d_model - candidate_dim : d_model;
  }
  int64_t candidate_width() const {
    if (fusion == Fusion::kNone) return 0;
    return fusion == Fusion::kAppend ? d_model : candidate_dim;
  }
  int64_t rows() const { return latest_k < 0 ? tokens() : 1; }  // of a sequence's output
  int64_t row_width() const {
    return latest_k < 0 ? d_model : (latest_k + (pool ? 1 : 0)) * d_model;
  }

  std::string text() const {
    const auto n = [](auto value) { return std::to_string(static_cast<long long>(value)); };
    return "d=" + n(d_model) + " heads=" + n(nhead) + " ff=" + n(dim_feedforward) +
           " layers=" + n(layers) + " B=" + n(batch) + " L=" + n(length) + " fusion=" + n(fusion) +
           " C=" + n(candidate_width()) + " padding=" + n(padding) + " mask=" + n(mask) +
           " layout=" + n(layout) + " bf16=" + n(bf16) + " k=" + n(latest_k) +
           " last=" + n(latest_last) + " pool=" + n(pool) + " norm_first=" + n(norm_first) +
           " act=" + n(activation) + " final=" + n(final_norm) + " params=" + n(parameters) +
           " sharpen=" + n(sharpen) + " scale=" + n(scale) + " seed=" + n(seed);
  }
};

// One layer's arrays, each in a heap block of its own size.
struct LayerArrays {
  std::vector<float> in_proj, in_bias, out_proj, out_bias, linear1, bias1, linear2, bias2;
  std::vector<float> norm1, norm1_bias, norm2, norm2_bias;
};

struct Problem {
  Case c;
  std::vector<LayerArrays> layers;
  std::vector<float> final_norm, final_norm_bias;
  std::vector<float> x;          // [B, L, E]
  std::vector<float> candidate;  // [B, C]
  std::vector<uint8_t> valid;    // [B, L]
  std::vector<int64_t> lengths;  // [B], with kLengths

  explicit Problem(const Case& options);
  EncoderShape shape() const;
  EncoderParameters parameters() const;
  bool is_valid(int64_t b, int64_t token) const;  // token in 0 .. T - 1
  // One sequence for each index: the events of user user_index[n] with a candidate of its own.
  Problem repeated(const std::vector<int64_t>& user_index);

 private:
  std::vector<float> normal(size_t count, double deviation, double mean = 0, bool round = false);
  void draw_parameters();
  void draw_mask();
  std::mt19937_64 random_;
};

inline std::vector<float> Problem::normal(size_t count, double deviation, double mean, bool round) {
  std::normal_distribution<double> distribution(mean, deviation);
  std::vector<float> values(count);
  for (float& v : values) {
    v = static_cast<float>(distribution(random_));
    if (round) v = rounded_to_bf16(v);
  }
  return values;
}

// Deviations keep every stage near 1 and the attention's logits near 1.5, so that softmax has
// something to decide. Vectors are representable in bf16: whether a kernel rounds them is its own
// affair.
inline void Problem::draw_parameters() {
  const size_t d = static_cast<size_t>(c.d_model), f = static_cast<size_t>(c.dim_feedforward);
  const double unit = 1 / std::sqrt(static_cast<double>(d));
  const auto vector = [&](size_t n, bool norm_weight) {
    std::vector<float> v = normal(n, 0.2, norm_weight ? 1 : 0, true);
    const bool absent =
        norm_weight ? c.parameters == Parameters::kBare : c.parameters != Parameters::kAll;
    return absent ? std::vector<float>() : v;
  };
  for (int i = 0; i < c.layers; ++i) {
    LayerArrays w;
    w.in_proj = normal(3 * d * d, unit);
    const float shrink = i == 0 && !c.norm_first ? 1 / c.scale : 1.0f;
    for (size_t j = 0; j < 2 * d * d; ++j) {
      w.in_proj[j] *= 1.22f * shrink * (j < d * d ? c.sharpen : 1.0f);
    }
    w.in_bias = vector(3 * d, false);
    for (size_t j = 0; j < std::min(2 * d, w.in_bias.size()); ++j) {
      w.in_bias[j] = rounded_to_bf16(w.in_bias[j] * (j < d ? c.sharpen : 1.0f));
    }
    w.out_proj = normal(d * d, unit);
    w.out_bias = vector(d, false);
    w.linear1 = normal(f * d, 1.4 * unit);
    w.bias1 = vector(f, false);
    w.linear2 = normal(d * f, 1 / std::sqrt(static_cast<double>(f)));
    w.bias2 = vector(d, false);
    w.norm1 = vector(d, true);
    w.norm1_bias = vector(d, false);
    w.norm2 = vector(d, true);
    w.norm2_bias = vector(d, false);
    layers.push_back(std::move(w));
  }
  final_norm = vector(d, true);
  final_norm_bias = vector(d, false);
}

inline void Problem::draw_mask() {
  const size_t batch = static_cast<size_t>(c.batch), length = static_cast<size_t>(c.length);
  valid.assign(batch * length, 1);
  for (size_t b = 0; b < batch; ++b) {
    uint8_t* row = valid.data() + b * length;
    // Lengths drawn over 0 .. L, both ends among the first three sequences of a batch.
    size_t count = random_() % (length + 1);
    if (b == 1) count = 0;
    if (b == 2) count = length;
    switch (c.mask) {
      case Mask::kNone:
        break;
      case Mask::kLengths:
        lengths.push_back(static_cast<int64_t>(count));
        [[fallthrough]];
      case Mask::kPrefix:
        for (size_t l = 0; l < length; ++l) row[l] = l < count;
        break;
      case Mask::kLeft:
        for (size_t l = 0; l < length; ++l) row[l] = l >= length - count;
        break;
      case Mask::kHoles:
      case Mask::kEmpty:
        for (size_t l = 0; l < length; ++l) row[l] = random_() % 5 < 3;
        if (c.mask == Mask::kEmpty && b == 0) std::memset(row, 0, length);
        break;
    }
  }
}

inline Problem::Problem(const Case& options) : c(options), random_(options.seed + 1) {
  draw_parameters();
  draw_mask();
  x = normal(static_cast<size_t>(c.batch * c.length * c.event_dim()), 1, 0, c.bf16);
  candidate = normal(static_cast<size_t>(c.batch * c.candidate_width()), 1, 0, c.bf16);
  for (std::vector<float>* values : {&x, &candidate}) {
    for (float& v : *values) v = c.bf16 ? rounded_to_bf16(v * c.scale) : v * c.scale;
  }
}

inline EncoderShape Problem::shape() const {
  EncoderShape s;
  s.d_model = c.d_model;
  s.nhead = c.nhead;
  s.dim_feedforward = c.dim_feedforward;
  s.num_layers = c.layers;
  s.activation = c.activation;
  s.negative_slope = 0.1f;
  s.norm_first = c.norm_first;
  s.layer_norm_eps = 1e-5f;
  s.has_final_norm = c.final_norm;
  s.final_norm_eps = 1e-3f;
  return s;
}

inline EncoderParameters Problem::parameters() const {
  const auto pointer = [](const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
  EncoderParameters p;
  for (const LayerArrays& w : layers) {
    p.layers.push_back({pointer(w.in_proj), pointer(w.in_bias), pointer(w.out_proj),
                        pointer(w.out_bias), pointer(w.linear1), pointer(w.bias1),
                        pointer(w.linear2), pointer(w.bias2), pointer(w.norm1),
                        pointer(w.norm1_bias), pointer(w.norm2), pointer(w.norm2_bias)});
  }
  p.final_norm_weight = pointer(final_norm);
  p.final_norm_bias = pointer(final_norm_bias);
  return p;
}

inline bool Problem::is_valid(int64_t b, int64_t token) const {
  int64_t l = token;
  if (c.fusion == Fusion::kAppend) {
    if (token == (c.latest_last ? c.length : 0)) return true;
    if (!c.latest_last) --l;
  }
  return valid[static_cast<size_t>(b * c.length + l)] != 0;
}

inline Problem Problem::repeated(const std::vector<int64_t>& user_index) {
  Problem made = *this;
  made.c.batch = static_cast<int64_t>(user_index.size());
  made.x.clear();
  made.valid.clear();
  made.lengths.clear();
  const int64_t values = c.length * c.event_dim();
  for (const int64_t user : user_index) {
    const auto first = x.begin() + user * values;
    made.x.insert(made.x.end(), first, first + values);
    const auto is_valid_first = valid.begin() + user * c.length;
    made.valid.insert(made.valid.end(), is_valid_first, is_valid_first + c.length);
    if (c.mask == Mask::kLengths) made.lengths.push_back(lengths[static_cast<size_t>(user)]);
  }
  const size_t width = static_cast<size_t>(c.candidate_width());
  made.candidate = normal(user_index.size() * width, c.scale, 0, c.bf16);
  return made;
}

// Scores of the first layer all on one side of zero: keys are the queries, times `side`, and events
// are like one another. Its values are multiplied by `value_scale`.
inline Problem one_sided(const Case& c, float side, float value_scale) {
  Problem p(c);
  const size_t d = static_cast<size_t>(c.d_model), e = static_cast<size_t>(c.event_dim());
  LayerArrays& w = p.layers[0];
  for (size_t i = 0; i < d * d; ++i) {
    w.in_proj[d * d + i] = side * w.in_proj[i];
    w.in_proj[2 * d * d + i] *= value_scale;
  }
  for (size_t i = p.x.size(); i-- > 0;) p.x[i] = rounded_to_bf16(p.x[i % e] + 0.25f * p.x[i]);
  return p;
}

// A heap block of exactly this size, filled with one byte.
class Block {
 public:
  Block(size_t bytes, unsigned char fill)
      : data_(static_cast<unsigned char*>(std::malloc(bytes)), &std::free), bytes_(bytes) {
    std::memset(data_.get(), fill, bytes);
  }
  unsigned char* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<unsigned char, void (*)(void*)> data_;
  size_t bytes_;
};

// Where row (b, l) of `width` elements lies in a block, in elements.
struct Strides {
  int64_t lead = 0, b = 0, l = 0, tail = 0, batch, rows, width;

  Strides(Layout layout, int64_t batch_size, int64_t row_count, int64_t row_width)
      : batch(batch_size), rows(row_count), width(row_width) {
    const bool gaps = layout == Layout::kGaps;
    l = width + (gaps ? 3 : 0);
    b = rows * l + (gaps ? 5 : 0);
    lead = gaps ? 1 : 0;
    if (layout == Layout::kTransposed) {
      b = width;
      l = batch * width;
    }
  }
  int64_t at(int64_t i, int64_t row) const { return lead + i * b + row * l; }
  int64_t elements() const { return at(batch - 1, rows - 1) + width + tail; }
};

enum class Poison { kNone, kNan, kInf };  // what padded slots of x hold

struct Run {
  int threads = 1;
  int64_t first = 0, count = -1;  // sequences of the batch; -1: all
  Poison poison = Poison::kNone;
  bool flagged = false;  // a byte says what padding is, and `padding` the contrary; not kExclude
};

constexpr unsigned char kCanary = 0xa5;
constexpr unsigned char kNanByte = 0xff;  // 0xffff and 0xffffffff are NaN

// A call and the memory that it points to.
struct PreparedCall {
  EncoderCall call;
  std::vector<Block> inputs;
  Block out;
  Strides out_strides;
  size_t element;  // bytes

  // [count, rows, row width] as fp32; throws if the call wrote anywhere else.
  std::vector<float> output() const {
    Block expected(out.bytes(), kCanary);
    std::vector<float> values;
    for (int64_t b = 0; b < out_strides.batch; ++b) {
      for (int64_t row = 0; row < out_strides.rows; ++row) {
        const size_t at = static_cast<size_t>(out_strides.at(b, row)) * element;
        const size_t bytes = static_cast<size_t>(out_strides.width) * element;
        std::memcpy(expected.data() + at, out.data() + at, bytes);
        for (size_t i = at; i < at + bytes; i += element) {
          uint16_t half;
          float value;
          if (element == 2) {
            std::memcpy(&half, out.data() + i, 2);
            value = from_bf16(half);
          } else {
            std::memcpy(&value, out.data() + i, 4);
          }
          values.push_back(value);
        }
      }
    }
    if (std::memcmp(expected.data(), out.data(), out.bytes()) != 0) {
      throw std::runtime_error("the call wrote outside the rows of its output");
    }
    return values;
  }
};

inline void put(unsigned char* block, int64_t index, bool is_bf16, float value) {
  const uint16_t half = value != value ? 0x7fc0 : bf16_bits(value);
  if (is_bf16) {
    std::memcpy(block + 2 * index, &half, 2);
  } else {
    std::memcpy(block + 4 * index, &value, 4);
  }
}

inline PreparedCall prepare(const Problem& p, const Run& run = {}) {
  const Case& c = p.c;
  const int64_t count = run.count < 0 ? c.batch - run.first : run.count;
  const size_t element = c.bf16 ? 2 : 4;
  const auto bytes = [&](const Strides& s, size_t size) {
    return static_cast<size_t>(s.elements()) * size;
  };

  Strides out(c.layout, count, c.rows(), c.row_width());
  out.tail = c.layout == Layout::kGaps ? 9 : 0;  // else the sanitizer guards both ends
  PreparedCall made{{}, {}, Block(bytes(out, element), kCanary), out, element};
  EncoderCall& call = made.call;

  const int64_t width = c.event_dim();
  const Strides xs(c.layout, count, c.length, width);
  made.inputs.emplace_back(bytes(xs, element), kNanByte);
  unsigned char* x = made.inputs.back().data();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t l = 0; l < c.length; ++l) {
      const size_t row = static_cast<size_t>((run.first + b) * c.length + l);
      for (int64_t i = 0; i < width; ++i) {
        float value = p.x[row * static_cast<size_t>(width) + static_cast<size_t>(i)];
        if (!p.valid[row] && run.poison == Poison::kNan)
          value = std::numeric_limits<float>::quiet_NaN();
        if (!p.valid[row] && run.poison == Poison::kInf) value = i % 2 ? kInfinity : -kInfinity;
        put(x, xs.at(b, l) + i, c.bf16, value);
      }
    }
  }
  call.x = x + static_cast<size_t>(xs.lead) * element;
  call.is_bf16 = c.bf16;
  call.batch = count;
  call.length = c.length;
  call.stride_b = xs.b;
  call.stride_l = xs.l;

  call.fusion = c.fusion;
  if (c.fusion != Fusion::kNone) {
    const int64_t wide = c.candidate_width();
    const Strides cs(c.layout, count, 1, wide);
    made.inputs.emplace_back(bytes(cs, element), kNanByte);
    unsigned char* candidate = made.inputs.back().data();
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t i = 0; i < wide; ++i) {
        put(candidate, cs.at(b, 0) + i, c.bf16,
            p.candidate[static_cast<size_t>((run.first + b) * wide + i)]);
      }
    }
    call.candidate = candidate + static_cast<size_t>(cs.lead) * element;
    call.candidate_dim = wide;
    call.candidate_stride = cs.b;
  }

  if (c.mask == Mask::kLengths) {
    made.inputs.emplace_back(static_cast<size_t>(count) * sizeof(int64_t), kNanByte);
    std::memcpy(made.inputs.back().data(), p.lengths.data() + run.first,
                static_cast<size_t>(count) * sizeof(int64_t));
    call.lengths = reinterpret_cast<const int64_t*>(made.inputs.back().data());
  } else if (c.mask != Mask::kNone) {
    const Strides ms(c.layout, count, c.length, 1);
    // What lies between is the contrary of most of the mask: a wrong stride shows.
    made.inputs.emplace_back(bytes(ms, 1), c.mask == Mask::kHoles ? 7 : 0);
    unsigned char* mask = made.inputs.back().data();
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t l = 0; l < c.length; ++l) {
        const bool keep = p.valid[static_cast<size_t>((run.first + b) * c.length + l)] != 0;
        const bool odd_bytes = c.mask == Mask::kHoles || c.mask == Mask::kEmpty;
        constexpr unsigned char kIgnore[] = {1, 2, 128, 255};
        mask[ms.at(b, l)] = keep ? 0 : kIgnore[odd_bytes ? l % 4 : 0];
      }
    }
    call.mask = mask + ms.lead;
    call.mask_stride_b = ms.b;
    call.mask_stride_l = ms.l;
  }

  call.padding = c.padding;
  if (run.flagged) {
    const bool computes = c.padding == Padding::kCompute;
    made.inputs.emplace_back(1, computes ? 1 : 0);
    call.computes_padding = made.inputs.back().data();
    call.padding = computes ? Padding::kZero : Padding::kCompute;
  }
  call.order = c.latest_last ? Order::kLatestLast : Order::kLatestFirst;
  call.latest_k = c.latest_k;
  call.pool = c.pool ? Pool::kMax : Pool::kNone;
  call.out = made.out.data() + static_cast<size_t>(out.lead) * element;
  call.out_stride_b = out.b;
  call.out_stride_l = out.l;
  call.num_threads = run.threads;
  return made;
}

// The candidates of `repeated`, made from `users` by user_index: events, mask and lengths are those
// of the users, read in place.
struct PreparedRequest {
  PreparedCall candidates, of_users;
  std::vector<int64_t> index;  // ends where its block ends
};

inline PreparedRequest prepare_request(const Problem& users, const Problem& repeated,
                                       const std::vector<int64_t>& user_index,
                                       const Run& run = {}) {
  Run whole;
  whole.poison = run.poison;
  PreparedRequest made{prepare(repeated, run), prepare(users, whole), {}};
  const PreparedCall& of_users = made.of_users;
  EncoderCall& call = made.candidates.call;
  call.x = of_users.call.x;
  call.stride_b = of_users.call.stride_b;
  call.stride_l = of_users.call.stride_l;
  call.mask = of_users.call.mask;
  call.mask_stride_b = of_users.call.mask_stride_b;
  call.mask_stride_l = of_users.call.mask_stride_l;
  call.lengths = of_users.call.lengths;
  const auto first = user_index.begin() + run.first;
  made.index.assign(first, first + call.batch);
  call.user_index = made.index.data();
  call.users = users.c.batch;
  return made;
}

inline std::vector<float> forward(const Encoder& encoder, const Problem& p, const Run& run = {}) {
  const PreparedCall made = prepare(p, run);
  encoder.forward(made.call);
  return made.output();
}

inline std::vector<float> score_request(const Encoder& encoder, const Problem& users,
                                        const Problem& repeated,
                                        const std::vector<int64_t>& user_index,
                                        const Run& run = {}) {
  const PreparedRequest made = prepare_request(users, repeated, user_index, run);
  encoder.forward(made.candidates.call);
  return made.candidates.output();
}

}  // namespace seqkernels::test
