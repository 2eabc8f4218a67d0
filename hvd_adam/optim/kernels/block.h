// Blocks of 512 elements, as formats/blocks.py: 32 rows of 16 lanes, and the random bits of their elements. Comes after
// numbers.h.

namespace {

constexpr int BLOCK = 512, LANES = 16;
#ifndef AHEAD
#define AHEAD 256  // elements: so far ahead memory is fetched; 13 % of the time of a step with 8-bit state
#endif
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

// A parameter with its correction, as formats/correction.py; without it where the sum is no magnitude.
inline float corrected(uint16_t param, int32_t correction) {
  const uint32_t bits = static_cast<uint32_t>(param) << 16, added = static_cast<uint32_t>(correction * 256);
  const bool valid = (bits & 0x7FFFFFFF) + added <= 0x7F800000u;  // a negative sum wraps around
  return from_bits(bits + (valid ? added : 0));
}

// Returns the bits of the parameter that is stored for x, and sets its correction, with 8 random bits.
inline uint16_t split(float x, uint32_t noise, int16_t& correction) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7FFFFFFF;
  const bool finite = magnitude < 0x7F800000;
  const uint32_t kept = bits + (finite ? noise : 0);
  correction = static_cast<int16_t>(finite ? kept >> 8 : 0);
  return static_cast<uint16_t>(magnitude > 0x7F800000 ? 0x7FC0 : (kept + (finite ? 0x8000 : 0)) >> 16);
}

}  // namespace
