// What all stages of the encoder share: sizes in strips and steps, the memory that they work in,
// and the walk over groups of strips. Included by encoder_kernel.h.

// Each stage is a function of its own, so that a profile shows where the time goes.
#define SEQKERNELS_STAGE __attribute__((noinline))

// Hands out consecutive pieces of a block of memory, 64-byte aligned; with a null block it only
// counts.
struct Arena {
  uint32_t* base;
  int64_t words = 0;
  uint32_t* take(int64_t count) {
    uint32_t* at = base ? base + words : nullptr;
    words += round_up(count, 16);
    return at;
  }
  float* take_floats(int64_t count) { return reinterpret_cast<float*>(take(count)); }
};

// The stages and the kernel derive from it for its names; no object of it is made.
template <class Product>
struct EncoderWorkspace {
  using Engine = Product;
  using Isa = typename Product::Isa;
  using V = typename Isa::V;
  using Element = typename Isa::Element;
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kPair = Isa::kPair;
  static constexpr int kRows = Product::kRows;
  static constexpr int kMaxStrips = Product::kMaxStrips;

  static constexpr int strips_of(int64_t tokens) {
    return static_cast<int>((tokens + kLanes - 1) / kLanes);
  }
  // Steps that hold `tokens` keys: whole strips, and with tiles whole tiles.
  static constexpr int64_t key_steps_of(int64_t tokens) {
    return round_up(strips_of(tokens) * kLanes / kPair, Product::kStepAlign);
  }
  // Steps that a product has to run through: tiles only know whole ones.
  static constexpr int steps_to_run(int elements) {
    return static_cast<int>(round_up((elements + kPair - 1) / kPair, Product::kStepAlign));
  }

  // Memory that a team shares.
  struct Shared {
    uint32_t* x;       // [strip][model step][lane]: the residual stream at rest
    uint32_t* normed;  // the same after norm1, with norm_first; else x itself
    uint32_t* keys;    // [head][strip][head step][lane = key]; with tiles [head][strip][head step /
                       // 16] tiles
    uint32_t* values;  // [feature strip][key step][lane = feature]; with tiles [feature / 16][key
                       // step / 16] tiles
    int64_t x_strip, key_strip, key_head, value_strip;
    int64_t words;

    Shared(const PackedModel& m, int64_t tokens, void* memory) {
      Arena arena{static_cast<uint32_t*>(memory)};
      const int64_t strips = strips_of(tokens);
      x_strip = static_cast<int64_t>(m.model_steps) * kLanes;
      key_strip = static_cast<int64_t>(m.head_steps) * kLanes;
      key_head = strips * key_strip;
      value_strip = key_steps_of(tokens) * kLanes;
      x = arena.take(strips * x_strip);
      normed = m.shape.norm_first ? arena.take(strips * x_strip) : x;
      keys = arena.take(m.shape.nhead * key_head);
      values = arena.take(strips_of(m.concat_rows) * value_strip);
      words = arena.words;
    }
  };

  // Memory of one thread, for one group of strips.
  struct Own {
    uint32_t* rows;   // [lane][model step]: tokens on their way in; [lane][D] fp32 on their way out
    uint32_t* query;  // [strip][head step][lane] of one head
    uint32_t* p;      // [strip][key step][lane]
    uint32_t* concat;   // [strip][concat step][lane]: the heads' outputs
    uint32_t* operand;  // [strip][model step][lane]: input of the feed-forward part
    uint32_t* hidden;   // [strip][hidden step][lane]
    float* residual;    // [model row][strip][lane]
    float* pool;        // [model row][lane]: running maximum
    int64_t rows_stride, query_strip, p_strip, concat_strip, operand_strip, hidden_strip;
    int64_t words;

    Own(const PackedModel& m, int64_t tokens, void* memory) {
      Arena arena{static_cast<uint32_t*>(memory)};
      const int64_t group = strips_of(tokens) < kMaxStrips ? strips_of(tokens) : kMaxStrips;
      const int64_t rows_rounded = round_up(m.model_rows, kLanes);
      rows_stride = round_up(m.model_rows > m.model_steps ? m.model_rows : m.model_steps, kLanes);
      query_strip = static_cast<int64_t>(m.head_steps) * kLanes;
      p_strip = key_steps_of(tokens) * kLanes;
      concat_strip = static_cast<int64_t>(m.concat_steps) * kLanes;
      operand_strip = static_cast<int64_t>(m.model_steps) * kLanes;
      hidden_strip = static_cast<int64_t>(m.hidden_steps) * kLanes;
      rows = arena.take(kLanes * rows_stride);
      query = arena.take(group * query_strip);
      p = arena.take(group * p_strip);
      concat = arena.take(group * concat_strip);
      operand = arena.take(group * operand_strip);
      hidden = arena.take(group * hidden_strip);
      residual = arena.take_floats(rows_rounded * group * kLanes);
      pool = arena.take_floats(rows_rounded * kLanes);
      words = arena.words;
    }
  };

  // Everything the stages of one sequence need.
  struct Context {
    const PackedModel& m;
    const SequenceTask& task;
    Shared shared;
    Own own;
  };

  // ---- operands ----

  static inline void store_rows(uint32_t* at, const V (&y)[kRows]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r += 2) Isa::store_pair(at + r / kPair * kLanes, y[r], y[r + 1]);
  }

  static LeftOperand weights(const uint32_t* base, int steps) {
    return {base, static_cast<ptrdiff_t>(steps) * Product::kWeightWidth, Product::kWeightWidth};
  }

  // ---- groups of strips ----

  template <int kValue>
  struct Constant {
    static constexpr int value = kValue;
  };

  // Calls body(Constant<n>, first strip) for groups of n <= kMaxStrips strips of about the same
  // size.
  template <class Body>
  static void for_groups(int strip_begin, int strip_end, Body&& body) {
    const int strips = strip_end - strip_begin;
    const int groups = (strips + kMaxStrips - 1) / kMaxStrips;
    for (int g = 0; g < groups; ++g) {
      const int begin = strip_begin + strips * g / groups;
      switch (strip_begin + strips * (g + 1) / groups - begin) {
        case 1:
          body(Constant<1>{}, begin);
          break;
        case 2:
          body(Constant<2>{}, begin);
          break;
        default:
          body(Constant<kMaxStrips>{}, begin);
          break;
      }
    }
  }
};
