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

// A parameter, float32 that bfloat16 represents, with its correction, as formats/correction.py.
inline float corrected(float param, int8_t correction) {
  const uint32_t bits = to_bits(param);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7FFFFFFF) + correction * 256;
  const float kept = from_bits((bits & 0x80000000) | static_cast<uint32_t>(std::clamp(magnitude, 0, 0x7F800000)));
  return param == param ? kept : param;
}

// Returns the parameter that is stored for x, and sets its correction, with 8 random bits.
inline float split(float x, uint32_t noise, int8_t& correction) {
  const uint32_t magnitude = to_bits(x) & 0x7FFFFFFF;
  const bool finite = magnitude < 0x7F800000;
  const uint32_t kept = finite ? magnitude + noise : magnitude;
  correction = static_cast<int8_t>(finite ? static_cast<uint8_t>(kept >> 8) : 0);
  return finite ? from_bits((to_bits(x) & 0x80000000) | ((kept + 0x8000) & 0xFFFF0000)) : x;
}

}  // namespace
