// Blocks of 512 elements, as in formats/random_bits.py: 32 rows of 16 lanes, and the random bits of their elements.
// Comes after numbers.h.

namespace {

constexpr int BLOCK = 512, LANES = 16;
constexpr uint32_t GOLDEN = 0x9E3779B9u;  // 2^32 divided by the golden ratio: the words of a lane differ by it

// Memory is fetched for PART elements at a time, AHEAD elements before they are needed. With 8-bit state and one thread a
// step takes 3.4 ms in place of 4.2 with 256 elements, and 3.6 with 2048; on two threads the distance hardly matters.
// The kernel that moves 28 bytes a parameter is no faster for it.
constexpr int PART = 64;
#ifndef AHEAD
#define AHEAD 1024
#endif

template <bool WRITES, typename T>
inline void fetch(const T* place) {
  for (int i = 0; i < PART; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(place + AHEAD + i, WRITES);
}

// Sets the words of a block's first row. `seed` is that of its first element.
inline void first_words(uint32_t seed, uint32_t* words) {
#pragma omp simd
  for (int j = 0; j < LANES; ++j) words[j] = hashed(seed + static_cast<uint32_t>(j));
}

// Elements that are updated together: 32 of 16 bits fill the widest vector registers. 16 would halve the width of all.
constexpr int PAIR = 2 * LANES;

// The words of a block's first two rows, from those of the first. Those of a later pair of rows differ by `pair_word`.
struct PairWords {
  alignas(64) uint32_t words[PAIR];

  explicit PairWords(const uint32_t* first) {
#pragma omp simd
    for (int j = 0; j < LANES; ++j) {
      words[j] = first[j];
      words[LANES + j] = first[j] + GOLDEN;
    }
  }
};

inline uint32_t pair_word(int row) { return static_cast<uint32_t>(row / LANES) * GOLDEN; }

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
