// Numbers of parameters and state as the kernels for CPUs load and store them. Compiled with PARAM and MOMENT, the types
// of parameters and moments, and ROUNDING, as KernelSpec.rounding: NEAREST, MASTER, STOCHASTIC or CORRECTION.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace {

enum Rounding { NEAREST, MASTER, STOCHASTIC, CORRECTION };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float load(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float load(float x) { return x; }
inline double load(double x) { return x; }

inline void store(BFloat16& place, float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // ties to even
  place.bits = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : nearest);  // NaN stays NaN
}
inline void store(float& place, float x) { place = x; }
inline void store(double& place, double x) { place = x; }

// float16 by integer arithmetic and selections only, which compilers turn into vector instructions everywhere;
// the identities are those of Giesen, https://gist.github.com/rygorous/2156668 ("rtne": ties to even).
inline float load(Float16 x) {
  constexpr uint32_t exponent = 0x7C00 << 13, rebias = (127 - 15) << 23;
  const uint32_t magnitude = (x.bits & 0x7FFFu) << 13;
  const uint32_t normal = magnitude + rebias;
  const uint32_t not_finite = normal + ((128 - 16) << 23);
  const uint32_t subnormal = to_bits(from_bits(normal + (1 << 23)) - from_bits(113 << 23));
  const uint32_t field = magnitude & exponent;
  const uint32_t bits = field == exponent ? not_finite : field == 0 ? subnormal : normal;
  return from_bits(bits | (x.bits & 0x8000u) << 16);
}

inline void store(Float16& place, float x) {
  constexpr uint32_t infinity = 255u << 23, overflow = (127u + 16) << 23, magic = (127u - 15 + 23 - 10 + 1) << 23;
  const uint32_t bits = to_bits(x) & 0x7FFFFFFF;
  const uint32_t not_finite = bits > infinity ? 0x7E00 : 0x7C00;
  const uint32_t subnormal = to_bits(from_bits(bits) + from_bits(magic)) - magic;
  const uint32_t normal = (bits - (112u << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13;
  const uint32_t half = bits >= overflow ? not_finite : bits < (113u << 23) ? subnormal : normal;
  place.bits = static_cast<uint16_t>(half | (to_bits(x) & 0x80000000) >> 16);
}

using Param = PARAM;
using Moment = MOMENT;
using Compute = std::conditional_t<std::is_same_v<Param, double>, double, float>;

// As expression.current_master.
inline float current_master(float wide, float master) {
  constexpr bool bfloat16 = std::is_same_v<Param, BFloat16>;
  constexpr float half_eps = bfloat16 ? 0x1p-8f : 0x1p-11f;
  constexpr float tiny = bfloat16 ? 0x1p-133f : 0x1p-24f;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const bool rounded = std::fabs(wide - master) <= half_eps * std::fabs(master) + tiny;
  const bool kept = (rounded & (std::fabs(master) < infinity)) | (std::fabs(wide) == infinity);
  return kept ? master : wide;
}

// As formats/random_bits.hashed.
inline uint32_t hashed(uint32_t seed) {
  uint32_t h = seed & 0x7FFFFFFF;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

// Rounds to bfloat16, up or down, with 16 random bits; infinities and NaN are kept.
inline float rounded_by(float x, uint32_t noise) {
  const float rounded = from_bits((to_bits(x) + noise) & 0xFFFF0000u);
  return std::fabs(x) < std::numeric_limits<float>::infinity() ? rounded : x;
}

// As formats/random_bits.round_stochastically, to the bit.
inline float round_stochastically(float x, uint32_t seed) { return rounded_by(x, hashed(seed) & 0xFFFF); }

}  // namespace
