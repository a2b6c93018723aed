// Products on tile registers: 2 x 2 accumulator tiles of 16 rows x 16 lanes, so that each loaded
// tile is used twice.

// As LaneProduct; steps are multiples of 16, rows of 16, and left operands are tiles [16 rows][16
// steps].
template <class Operand, class Tiles>
struct TileProduct {
  using Isa = Operand;
  using V = typename Isa::V;
  static constexpr int kRows = 8;
  static constexpr int kMaxStrips = 2;
  static constexpr int kRowAlign = 16;
  static constexpr int kStepAlign = 16;
  static constexpr bool kTiles = true;
  static constexpr int kWeightWidth = 16;
  static constexpr int kTokenWidth = 16;
  static_assert(Isa::kLanes == 16 && Isa::kPair == 2, "a tile is 16 rows of 16 pairs");

  static void enter() { Tiles::configure(); }
  static void leave() { Tiles::release(); }

  template <int kStrips, class Epilogue>
  static inline __attribute__((always_inline)) void run(LeftOperand a, int row_begin, int row_end,
                                                        const float* bias, const uint32_t* b,
                                                        ptrdiff_t b_stride, int steps,
                                                        Epilogue&& epilogue) {
    int row = row_begin;
    for (; row + 32 <= row_end; row += 32)
      block<2, kStrips>(a, row, bias, b, b_stride, steps, epilogue);
    if (row < row_end) block<1, kStrips>(a, row, bias, b, b_stride, steps, epilogue);
  }

 private:
  template <int kTileRows, int kStrips, class Epilogue>
  static inline __attribute__((always_inline)) void block(const LeftOperand& a, int row,
                                                          const float* bias, const uint32_t* b,
                                                          ptrdiff_t b_stride, int steps,
                                                          Epilogue& epilogue) {
    constexpr int kWords = 256;  // of a tile
    const uint32_t* a0 = a.base + row / 16 * a.strip_stride;
    const uint32_t* a1 = a0 + a.strip_stride;
    const uint32_t* b1 = b + b_stride;
    Tiles::before_loads();
    Tiles::template zero<0>();
    if constexpr (kStrips > 1) Tiles::template zero<1>();
    if constexpr (kTileRows > 1) Tiles::template zero<2>();
    if constexpr (kTileRows > 1 && kStrips > 1) Tiles::template zero<3>();
    for (int tile = 0; tile < steps / 16; ++tile) {
      Tiles::template load<6>(b + tile * kWords);
      Tiles::template load<4>(a0 + tile * kWords);
      Tiles::template dot<0, 4, 6>();
      if constexpr (kStrips > 1) {
        Tiles::template load<7>(b1 + tile * kWords);
        Tiles::template dot<1, 4, 7>();
      }
      if constexpr (kTileRows > 1) {
        Tiles::template load<5>(a1 + tile * kWords);
        Tiles::template dot<2, 5, 6>();
        if constexpr (kStrips > 1) Tiles::template dot<3, 5, 7>();
      }
    }
    alignas(64) float c[2][2][16][16];  // [row tile][strip][row][lane]
    Tiles::template store<0>(&c[0][0][0][0]);
    if constexpr (kStrips > 1) Tiles::template store<1>(&c[0][1][0][0]);
    if constexpr (kTileRows > 1) Tiles::template store<2>(&c[1][0][0][0]);
    if constexpr (kTileRows > 1 && kStrips > 1) Tiles::template store<3>(&c[1][1][0][0]);
    for (int i = 0; i < kTileRows; ++i) {
      for (int s = 0; s < kStrips; ++s) {
        for (int half = 0; half < 16; half += kRows) {
          const int first = row + 16 * i + half;
          V y[kRows];
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            y[r] = Isa::load(&c[i][s][half + r][0]);
            if (bias) y[r] = Isa::add(y[r], Isa::set1(bias[first + r]));
          }
          epilogue(first, s, y);
        }
      }
    }
  }
};
