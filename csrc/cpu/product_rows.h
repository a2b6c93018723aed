// Products on vector registers with features in the lanes: a block of rows x (kStrips vectors)
// accumulators, one broadcast word of a panel against one row of words of the weights.

// C [rows, kStrips x lanes] = A [rows, K] B [K, kStrips x lanes], A a panel of tiles
// (linear_model.h). epilogue(row, strip, V (&c)[n]) receives n consecutive rows of each block; the
// order over k is fixed, so a value does not depend on how rows and strips were grouped.
template <class Operand, int kRowBlock, int kStripLimit>
struct RowProduct {
  using Isa = Operand;
  using V = typename Isa::V;
  static constexpr int kMaxStrips = kStripLimit;
  static constexpr bool kWholeTiles = false;  // whether steps come in whole tiles
  // Of a single row, so that as many sums are under way as the latency of a multiply-add wants.
  static constexpr int kOneRowStrips = 8;
  static_assert(16 % kRowBlock == 0, "a block of rows must not straddle tiles");

  static void enter() {}
  static void leave() {}

  template <int kStrips, class Epilogue>
  static inline __attribute__((always_inline)) void run(LeftOperand a, int row_begin, int row_end,
                                                        const uint32_t* b, ptrdiff_t b_stride,
                                                        int steps, Epilogue&& epilogue) {
    int row = row_begin;
    for (; row + kRowBlock <= row_end; row += kRowBlock)
      block<kRowBlock, kStrips>(a, row, b, b_stride, steps, epilogue);
    // What is left in powers of two, so that few rows cost little.
    if constexpr (kRowBlock > 4) {
      if (row + 4 <= row_end) {
        block<4, kStrips>(a, row, b, b_stride, steps, epilogue);
        row += 4;
      }
    }
    if (row + 2 <= row_end) {
      block<2, kStrips>(a, row, b, b_stride, steps, epilogue);
      row += 2;
    }
    if (row < row_end) block<1, kStrips>(a, row, b, b_stride, steps, epilogue);
  }

  template <int kStrips, class Epilogue>
  static inline __attribute__((always_inline)) void run_one_row(LeftOperand a, const uint32_t* b,
                                                                ptrdiff_t b_stride, int steps,
                                                                Epilogue&& epilogue) {
    block<1, kStrips>(a, 0, b, b_stride, steps, epilogue);
  }

 private:
  template <int kRows, int kStrips, class Epilogue>
  static inline __attribute__((always_inline)) void block(const LeftOperand& a, int row,
                                                          const uint32_t* b, ptrdiff_t b_stride,
                                                          int steps, Epilogue& epilogue) {
    V c[kStrips][kRows];
#pragma GCC unroll 8
    for (int s = 0; s < kStrips; ++s) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) c[s][r] = Isa::zero();
    }
    const uint32_t* pa = a.base + row / 16 * a.strip_stride + row % 16 * 16;
    const uint32_t* pb = b;
    for (int left = steps; left > 0; left -= 16) {
      const int inside = left < 16 ? left : 16;
#pragma GCC unroll 4
      for (int k = 0; k < inside; ++k) {
        decltype(Isa::load_operand(pb)) w[kStrips];
#pragma GCC unroll 8
        for (int s = 0; s < kStrips; ++s) w[s] = Isa::load_operand(pb + s * b_stride);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const auto x = Isa::broadcast_operand(pa + r * 16 + k);
#pragma GCC unroll 8
          for (int s = 0; s < kStrips; ++s) c[s][r] = Isa::dot(c[s][r], x, w[s]);
        }
        pb += Isa::kLanes;
      }
      pa += 256;
    }
#pragma GCC unroll 8
    for (int s = 0; s < kStrips; ++s) epilogue(row, s, c[s]);
  }
};

// The same on tile registers, which read the panel as it lies.
template <class TileProduct>
struct RowTileProduct {
  using Isa = typename TileProduct::Isa;
  static constexpr int kMaxStrips = TileProduct::kMaxStrips;
  static constexpr bool kWholeTiles = true;
  static constexpr int kOneRowStrips = 0;  // a tile has 16 rows

  static void enter() { TileProduct::enter(); }
  static void leave() { TileProduct::leave(); }

  template <int kStrips, class Epilogue>
  static inline __attribute__((always_inline)) void run(LeftOperand a, int row_begin, int row_end,
                                                        const uint32_t* b, ptrdiff_t b_stride,
                                                        int steps, Epilogue&& epilogue) {
    TileProduct::template run<kStrips>(a, row_begin, static_cast<int>(round_up(row_end, 16)),
                                       nullptr, b, b_stride, steps, epilogue);
  }
};
