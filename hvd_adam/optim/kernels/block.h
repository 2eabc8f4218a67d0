// Blocks of 512 elements, as formats/blocks.py: 32 rows of 16 lanes, and the random bits of their elements. Comes after
// numbers.h.

namespace {

constexpr int BLOCK = 512, LANES = 16;
constexpr uint32_t GOLDEN = 0x9E3779B9u;  // 2^32 divided by the golden ratio: the words of a lane differ by it

// Sets the words of a block's first row. `seed` is that of its first element.
inline void first_words(uint32_t seed, uint32_t* words) {
#pragma omp simd
  for (int j = 0; j < LANES; ++j) words[j] = hashed(seed + static_cast<uint32_t>(j));
}

// The numbers of an update, as formats/expression.py has them.
struct Numbers {
  float grad_scale, weight_decay;
  float first_kept, second_kept, first_new, second_new, step_size, eps;
};

template <Decay DECAY>
inline float decayed(float theta, const Numbers& s) {
  return DECAY == DECOUPLED ? theta + s.weight_decay * theta : theta;
}

template <Decay DECAY>
inline float decayed_gradient(float g, float theta, const Numbers& s) {
  return DECAY == COUPLED ? g * s.grad_scale + s.weight_decay * theta : g;
}

// Rounds x up or down with 16 random bits. `place` is bfloat16.
template <typename Place>
inline void store_rounded(Place& place, float x, uint32_t noise) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7FFFFFFF;
  const uint32_t added = magnitude < 0x7F800000 ? noise : 0;
  const uint32_t rounded = magnitude > 0x7F800000 ? 0x7FC0 : (bits + added) >> 16;
  if constexpr (std::is_same_v<Place, BFloat16>) place.bits = static_cast<uint16_t>(rounded);
}

// A parameter, float32 that bfloat16 represents, with its correction, as formats/correction.py.
inline float corrected(float param, int32_t correction) {
  const uint32_t bits = to_bits(param), sign = bits & 0x80000000, magnitude = bits & 0x7FFFFFFF;
  const int32_t sum = static_cast<int32_t>(magnitude) + correction * 256;
  const int32_t positive = sum > 0 ? sum : 0;
  const int32_t kept = positive < 0x7F800000 ? positive : 0x7F800000;
  return from_bits(magnitude > 0x7F800000 ? bits : sign | static_cast<uint32_t>(kept));
}

// Returns the parameter that is stored for x, and sets its correction, with 8 random bits.
inline float split(float x, uint32_t noise, int16_t& correction) {
  const uint32_t bits = to_bits(x), sign = bits & 0x80000000, magnitude = bits & 0x7FFFFFFF;
  const bool finite = magnitude < 0x7F800000;
  const uint32_t kept = magnitude + (finite ? noise : 0);
  correction = static_cast<int16_t>(finite ? kept >> 8 : 0);
  return from_bits(finite ? sign | ((kept + 0x8000) & 0xFFFF0000) : bits);
}

}  // namespace
