// The left operand of a product, see encoder_model.h.

// A left operand: row r starts at word at(r), the next step `width` words further (tiles: 16 rows
// by 16 steps a KB).
struct LeftOperand {
  const uint32_t* base;
  ptrdiff_t strip_stride;  // words between strips of `width` rows
  int width;
  const uint32_t* at(int row) const { return base + (row / width) * strip_stride + row % width; }
};
