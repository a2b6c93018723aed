// Products on vector registers: a block of kRows x (kStrips vectors) accumulators, one broadcast
// word against one row of words.

// C [rows, kStrips x lanes] = A [rows, K] B [K, kStrips x lanes] for `rows` in [row_begin,
// row_end), multiples of kRows. `bias`, if any, is added by row. epilogue(row, strip, V
// (&c)[kRows]) receives each block; the order over k is fixed, so a value does not depend on how
// rows and strips were grouped.
template <class Operand, int kRowBlock, int kStripLimit>
struct LaneProduct {
  using Isa = Operand;
  using V = typename Isa::V;
  static constexpr int kRows = kRowBlock;  // rows an epilogue receives
  static constexpr int kMaxStrips =
      kStripLimit;  // kRows * kMaxStrips accumulators fit the register file
  static constexpr int kRowAlign = kRowBlock;
  static constexpr int kStepAlign = 1;
  static constexpr bool kTiles = false;
  static constexpr int kWeightWidth = kRowBlock;   // width of packed left operands
  static constexpr int kTokenWidth = Isa::kLanes;  // width of keys and values as left operands
  static_assert(Isa::kLanes % kRows == 0 && kRows % 2 == 0, "row blocks must not straddle strips");

  static void enter() {}
  static void leave() {}

  template <int kStrips, class Epilogue>
  static inline __attribute__((always_inline)) void run(LeftOperand a, int row_begin, int row_end,
                                                        const float* bias, const uint32_t* b,
                                                        ptrdiff_t b_stride, int steps,
                                                        Epilogue&& epilogue) {
    for (int row = row_begin; row < row_end; row += kRows) {
      V c[kStrips][kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V initial = bias ? Isa::set1(bias[row + r]) : Isa::zero();
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) c[s][r] = initial;
      }
      const uint32_t* pa = a.at(row);
      const uint32_t* pb = b;
      for (int k = 0; k < steps; ++k) {
        decltype(Isa::load_operand(pb)) w[kStrips];
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) w[s] = Isa::load_operand(pb + s * b_stride);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const auto x = Isa::broadcast_operand(pa + r);
#pragma GCC unroll 4
          for (int s = 0; s < kStrips; ++s) c[s][r] = Isa::dot(c[s][r], x, w[s]);
        }
        pa += a.width;
        pb += Isa::kLanes;
      }
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) epilogue(row, s, c[s]);
    }
  }
};
