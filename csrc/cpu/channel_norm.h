// Batch norm on vectors of channels. Included by the kernel sources inside their own namespace.
//
// The constants of a channel are made once, in double (pack_channel_norm); a kernel adds `offset`
// first, so that a large mean is taken off before anything is rounded or multiplied.

struct BroadcastChannel {};

template <class Isa, bool kBounded>
struct ChannelNormVectors {
  using V = typename Isa::V;
  V offset, inverse, scale, shift;

  ChannelNormVectors(const PackedChannelNorm& n, int64_t channel)
      : offset(Isa::load(n.offset + channel)),
        inverse(kBounded ? Isa::load(n.inverse + channel) : Isa::zero()),
        scale(Isa::load(n.scale + channel)),
        shift(Isa::load(n.shift + channel)) {}

  // One channel in all lanes.
  ChannelNormVectors(const PackedChannelNorm& n, int64_t channel, BroadcastChannel)
      : offset(Isa::set1(n.offset[channel])),
        inverse(kBounded ? Isa::set1(n.inverse[channel]) : Isa::zero()),
        scale(Isa::set1(n.scale[channel])),
        shift(Isa::set1(n.shift[channel])) {}

  V operator()(V x, V max_abs) const {
    V z = Isa::add(x, offset);
    if constexpr (kBounded) {
      z = Isa::mul(z, inverse);
      z = Isa::select(Isa::ordered(z), z, Isa::zero());
      z = Isa::max(Isa::sub(Isa::zero(), max_abs), Isa::min(max_abs, z));
    }
    // Not fused: each step rounds monotonically, so that |y| is at most the same expression of
    // max_abs, |weight| and |bias|, bit for bit.
    return Isa::add(Isa::mul(z, scale), shift);
  }
};
