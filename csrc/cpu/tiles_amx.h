// The eight tile registers of AMX. Included by the sources compiled for it, inside their own
// namespace.

// The intrinsics want literal tile numbers.
struct AmxTiles {
  static void configure() {
    struct alignas(64) Config {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t bytes_per_row[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(Config) == 64, "the layout that ldtilecfg reads");
    for (int i = 0; i < 8; ++i) {
      config.bytes_per_row[i] = 64;
      config.rows[i] = 16;
    }
    // The intrinsic declares that it reads 8 of the 64 bytes: without this the other stores may go.
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  static void release() { _tile_release(); }

  // The compiler does not know that a tile load reads memory: without this it may move stores
  // behind it.
  static void before_loads() { __asm__ volatile("" ::: "memory"); }

  template <int kTile>
  static inline void zero() {
    if constexpr (kTile == 0) _tile_zero(0);
    if constexpr (kTile == 1) _tile_zero(1);
    if constexpr (kTile == 2) _tile_zero(2);
    if constexpr (kTile == 3) _tile_zero(3);
  }
  template <int kTile>
  static inline void load(const uint32_t* p) {
    if constexpr (kTile == 4) _tile_loadd(4, p, 64);
    if constexpr (kTile == 5) _tile_loadd(5, p, 64);
    if constexpr (kTile == 6) _tile_loadd(6, p, 64);
    if constexpr (kTile == 7) _tile_loadd(7, p, 64);
  }
  template <int kTile>
  static inline void store(float* p) {
    if constexpr (kTile == 0) _tile_stored(0, p, 64);
    if constexpr (kTile == 1) _tile_stored(1, p, 64);
    if constexpr (kTile == 2) _tile_stored(2, p, 64);
    if constexpr (kTile == 3) _tile_stored(3, p, 64);
  }
  template <int kC, int kA, int kB>
  static inline void dot() {
    static_assert(kA == 4 + kC / 2 && kB == 6 + kC % 2,
                  "accumulator c belongs to row tile c / 2 and strip c % 2");
    if constexpr (kC == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kC == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kC == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kC == 3) _tile_dpbf16ps(3, 5, 7);
  }
};
