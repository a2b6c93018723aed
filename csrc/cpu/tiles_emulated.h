// Tile registers in memory, with the arithmetic of AMX. Included by the sources that use them,
// inside their own namespace.

struct EmulatedTiles {
  struct Tile {
    uint32_t words[16][16];
  };
  static Tile* tiles() {
    thread_local Tile registers[8];
    return registers;
  }
  static void configure() { __builtin_memset(tiles(), 0, 8 * sizeof(Tile)); }
  // As on the processor, released registers hold nothing: a use without a configuration gives NaN.
  static void release() { __builtin_memset(tiles(), 0xff, 8 * sizeof(Tile)); }
  static void before_loads() {}

  template <int kTile>
  static void zero() {
    __builtin_memset(&tiles()[kTile], 0, sizeof(Tile));
  }
  template <int kTile>
  static void load(const uint32_t* p) {
    __builtin_memcpy(&tiles()[kTile], p, sizeof(Tile));
  }
  template <int kTile>
  static void store(float* p) {
    __builtin_memcpy(p, &tiles()[kTile], sizeof(Tile));
  }
  // tdpbf16ps: for each pair of k in order, two multiply-adds in fp32.
  template <int kC, int kA, int kB>
  static void dot() {
    Tile& c = tiles()[kC];
    const Tile& a = tiles()[kA];
    const Tile& b = tiles()[kB];
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        const float a0 = widen_bf16(static_cast<uint16_t>(a.words[m][k] & 0xffff));
        const float a1 = widen_bf16(static_cast<uint16_t>(a.words[m][k] >> 16));
        for (int n = 0; n < 16; ++n) {
          float sum;
          __builtin_memcpy(&sum, &c.words[m][n], 4);
          sum += a0 * widen_bf16(static_cast<uint16_t>(b.words[k][n] & 0xffff));
          sum += a1 * widen_bf16(static_cast<uint16_t>(b.words[k][n] >> 16));
          __builtin_memcpy(&c.words[m][n], &sum, 4);
        }
      }
    }
  }
};
