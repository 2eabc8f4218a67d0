// One block of the 8-bit format of formats/eight_bit.py: moments are decoded, updated and encoded in registers and in the
// first-level cache. Comes after block.h. With AVX-512 and without it, the bits are the same.

#if defined(__AVX512BW__) && !defined(PORTABLE)
#include <immintrin.h>
#endif

namespace {

constexpr int KNEE = 64, LEVELS = 316, FIRST_ONE = 64;      // of the first moment; units of one code before rounding
constexpr int CODES = 255, SECOND_ONE = 4096;               // of the second one
constexpr uint32_t SMALLEST_SCALE = 23 << 7, NO_SCALE = 0x7FC0;  // bits of bfloat16: 2^-104, NaN
constexpr uint32_t LARGEST_FIRST = 0x7F7F, LARGEST_SECOND = 0x5F7F;

// A block whose moments are updated and not yet encoded.
struct Updated {
  alignas(64) float first[BLOCK], root[BLOCK], to_first[LANES], to_second[LANES];
  alignas(64) uint32_t words[LANES];
  int8_t* exp_avg;
  uint8_t* exp_avg_sq;
  uint16_t *exp_avg_scales, *exp_avg_sq_scales;
  bool finite;
};

// Sets the codes of groups to 0 whose scale is NaN: what conversion makes of a value that is not finite is not defined.
inline void clear_codes(const Updated& done) {
  for (int i = 0; i < BLOCK; ++i) {
    if (done.exp_avg_scales[i % LANES] == NO_SCALE) done.exp_avg[i] = 0;
    if (done.exp_avg_sq_scales[i % LANES] == NO_SCALE) done.exp_avg_sq[i] = 0;
  }
}

#if defined(__AVX512BW__) && !defined(PORTABLE)

inline __m512 wide(const uint16_t* scales) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// Stores the bits of scales that are no smaller than `largest`, bits of float32, and returns the scales.
inline __m512 store_scales(uint16_t* scales, __m512i largest, uint32_t limit, bool* finite) {
  __m512i bits = _mm512_srli_epi32(_mm512_add_epi32(largest, _mm512_set1_epi32(0xFFFF)), 16);
  bits = _mm512_max_epi32(bits, _mm512_set1_epi32(SMALLEST_SCALE));
  const __mmask16 beyond = _mm512_cmpgt_epi32_mask(bits, _mm512_set1_epi32(limit));
  *finite &= beyond == 0;
  const __m512i stored = _mm512_mask_mov_epi32(bits, beyond, _mm512_set1_epi32(NO_SCALE));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(scales), _mm512_cvtepi32_epi16(stored));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// Random bits of the next four rows: all 32 of a row, and the last 16 of two rows in the order that packing has.
struct Noise {
  __m512i word, halves;

  explicit Noise(const uint32_t* words) : word(_mm512_load_si512(words)) {
    const __m512i second = _mm512_add_epi32(word, _mm512_set1_epi32(GOLDEN));
    halves = _mm512_packus_epi32(_mm512_and_si512(word, _mm512_set1_epi32(0xFFFF)),
                                 _mm512_and_si512(second, _mm512_set1_epi32(0xFFFF)));
  }

  // The first 12 bits of the words of a row.
  __m512i of_row() {
    const __m512i noise = _mm512_srli_epi32(word, 20);
    word = _mm512_add_epi32(word, _mm512_set1_epi32(GOLDEN));
    return noise;
  }

  // The first 6 of the last 16 bits of the words of two rows.
  __m512i of_two_rows() {
    const __m512i noise = _mm512_srli_epi16(halves, 10);
    halves = _mm512_add_epi16(halves, _mm512_set1_epi16(static_cast<int16_t>(2 * (GOLDEN & 0xFFFF))));
    return noise;
  }
};

// The codes of the first moments of two rows, in 16 bits.
inline __m512i first_codes(const float* first, __m512 to_first, Noise& noise) {
  const __m512i level = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(first), to_first)),
                                           _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(first + LANES), to_first)));
  const __m512i quarter = _mm512_srai_epi16(level, 2);
  const __m512i limit = _mm512_set1_epi16(3 * KNEE * FIRST_ONE / 4);
  const __m512i rest = _mm512_max_epi16(_mm512_min_epi16(_mm512_sub_epi16(level, quarter), limit),
                                        _mm512_sub_epi16(_mm512_setzero_si512(), limit));
  return _mm512_srai_epi16(_mm512_add_epi16(_mm512_add_epi16(quarter, rest), noise.of_two_rows()), 6);
}

// The codes of the second moments of a row, in 32 bits.
inline __m512i second_codes(const float* root, __m512 to_second, Noise& noise) {
  const __m512i units = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(root), to_second));
  return _mm512_srli_epi32(_mm512_add_epi32(units, noise.of_row()), 12);
}

// Packing works in each quarter of a register: this brings the bytes of four rows into order.
inline void store_bytes(void* place, __m512i packed) {
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  _mm512_storeu_si512(place, _mm512_permutexvar_epi32(order, packed));
}

// Encodes four rows of a block that has been updated.
inline void encode_rows(const Updated& done, int i, __m512 to_first, __m512 to_second, Noise& noise) {
  const __m512i a = first_codes(done.first + i, to_first, noise);
  const __m512i b = first_codes(done.first + i + 2 * LANES, to_first, noise);
  store_bytes(done.exp_avg + i, _mm512_packs_epi16(a, b));
  __m512i rows[4];
  for (int row = 0; row < 4; ++row) rows[row] = second_codes(done.root + i + row * LANES, to_second, noise);
  const __m512i codes =
      _mm512_packus_epi16(_mm512_packs_epi32(rows[0], rows[1]), _mm512_packs_epi32(rows[2], rows[3]));
  store_bytes(done.exp_avg_sq + i, _mm512_max_epu8(codes, _mm512_set1_epi8(1)));
}

inline void encode(const Updated& done) {
  const __m512 to_first = _mm512_load_ps(done.to_first), to_second = _mm512_load_ps(done.to_second);
  Noise noise(done.words);
  for (int i = 0; i < BLOCK; i += PART) encode_rows(done, i, to_first, to_second, noise);
  if (!done.finite) clear_codes(done);
}

// Updates a block, and encodes another one meanwhile: divisions and roots occupy one unit, and codes the others.
template <Decay DECAY, bool ENCODES>
inline void update_rows(float* theta, const float* grad, Updated& now, const Updated& done, const Numbers& s) {
  const __m512 first_kept = _mm512_mul_ps(wide(now.exp_avg_scales), _mm512_set1_ps(s.first_kept));
  const __m512 second_kept = _mm512_mul_ps(wide(now.exp_avg_sq_scales), _mm512_set1_ps(s.second_kept));
  const __m512 first_new = _mm512_set1_ps(s.first_new), second_new = _mm512_set1_ps(s.second_new);
  const __m512 step_size = _mm512_set1_ps(s.step_size), eps = _mm512_set1_ps(s.eps);
  const __m512 grad_scale = _mm512_set1_ps(s.grad_scale), weight_decay = _mm512_set1_ps(s.weight_decay);
  const __m512i positive = _mm512_set1_epi32(0x7FFFFFFF);
  __m512 to_first = eps, to_second = eps;
  __m512i largest_first = _mm512_setzero_si512(), largest_root = largest_first;
  Noise noise(done.words);
  if constexpr (ENCODES) {
    to_first = _mm512_load_ps(done.to_first);
    to_second = _mm512_load_ps(done.to_second);
  }
  const auto update_two_rows = [&](int i) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(now.exp_avg + i));
    const __m512i code = _mm512_cvtepi8_epi16(codes);
    const __m512i inner =
        _mm512_max_epi16(_mm512_min_epi16(code, _mm512_set1_epi16(KNEE)), _mm512_set1_epi16(-KNEE));
    const __m512i outer = _mm512_sub_epi16(code, inner);
    const __m512i level = _mm512_add_epi16(_mm512_add_epi16(code, outer), _mm512_add_epi16(outer, outer));
    for (int row = 0; row < 2; ++row) {
      const int at = i + row * LANES;
      const __m256i half = row ? _mm512_extracti64x4_epi64(level, 1) : _mm512_castsi512_si256(level);
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(now.exp_avg_sq + at));
      __m512 g = _mm512_loadu_ps(grad + at), x = _mm512_loadu_ps(theta + at);
      if constexpr (DECAY == COUPLED) g = _mm512_add_ps(_mm512_mul_ps(g, grad_scale), _mm512_mul_ps(weight_decay, x));
      if constexpr (DECAY == DECOUPLED) x = _mm512_add_ps(x, _mm512_mul_ps(weight_decay, x));
      __m512 m = _mm512_mul_ps(first_kept, _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(half)));
      m = _mm512_add_ps(m, _mm512_mul_ps(first_new, g));
      const __m512 kept = _mm512_mul_ps(second_kept, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
      const __m512 added = _mm512_mul_ps(second_new, g);
      const __m512 r = _mm512_sqrt_ps(_mm512_add_ps(_mm512_mul_ps(kept, kept), _mm512_mul_ps(added, added)));
      const __m512 move = _mm512_mul_ps(step_size, _mm512_div_ps(m, _mm512_add_ps(r, eps)));
      _mm512_storeu_ps(theta + at, _mm512_sub_ps(x, move));
      _mm512_store_ps(now.first + at, m);
      _mm512_store_ps(now.root + at, r);
      largest_first = _mm512_max_epi32(largest_first, _mm512_and_epi32(_mm512_castps_si512(m), positive));
      largest_root = _mm512_max_epu32(largest_root, _mm512_castps_si512(r));  // not negative, except NaN
    }
  };
  for (int i = 0; i < BLOCK; i += PART) {
    fetch<true>(theta + i);
    fetch<false>(grad + i);
    fetch<true>(now.exp_avg + i);
    fetch<true>(now.exp_avg_sq + i);
    update_two_rows(i);
    update_two_rows(i + 2 * LANES);
    if constexpr (ENCODES) encode_rows(done, i, to_first, to_second, noise);
  }
  now.finite = true;
  const __m512 first_scale = store_scales(now.exp_avg_scales, largest_first, LARGEST_FIRST, &now.finite);
  largest_root = _mm512_and_epi32(largest_root, positive);
  const __m512 second_scale = store_scales(now.exp_avg_sq_scales, largest_root, LARGEST_SECOND, &now.finite);
  _mm512_store_ps(now.to_first, _mm512_div_ps(_mm512_set1_ps(LEVELS * FIRST_ONE), first_scale));
  _mm512_store_ps(now.to_second, _mm512_div_ps(_mm512_set1_ps(CODES * SECOND_ONE), second_scale));
  if constexpr (ENCODES) {
    if (!done.finite) clear_codes(done);
  }
}

template <Decay DECAY>
inline void update_eight_bit(float* theta, const float* grad, Updated& now, const Updated* done, const Numbers& s) {
  if (done) {
    update_rows<DECAY, true>(theta, grad, now, *done, s);
  } else {
    update_rows<DECAY, false>(theta, grad, now, now, s);
  }
}

#else

inline int32_t nearest(float x) {  // to even, of |x| < 2^22; only the low bits of others
  return static_cast<int32_t>(to_bits(x + 0x1.8p23f) - to_bits(0x1.8p23f));
}

inline uint32_t scale_bits(uint32_t largest) { return std::max((largest + 0xFFFF) >> 16, SMALLEST_SCALE); }

inline void encode(const Updated& done) {
  alignas(64) int16_t level[BLOCK], code[BLOCK];
  for (int row = 0; row < BLOCK; row += LANES) {
#pragma omp simd
    for (int j = 0; j < LANES; ++j) {
      const uint32_t word = done.words[j] + static_cast<uint32_t>(row / LANES) * GOLDEN;
      level[row + j] = static_cast<int16_t>(nearest(done.first[row + j] * done.to_first[j]));
      const int32_t units = nearest(done.root[row + j] * done.to_second[j]) + static_cast<int32_t>(word >> 20);
      code[row + j] = static_cast<int16_t>(std::max(units >> 12, 1));
    }
#pragma omp simd
    for (int j = 0; j < LANES; ++j) {
      const uint32_t word = done.words[j] + static_cast<uint32_t>(row / LANES) * GOLDEN;
      const int16_t quarter = static_cast<int16_t>(level[row + j] >> 2), limit = 3 * KNEE * FIRST_ONE / 4;
      const int16_t rest = std::clamp<int16_t>(static_cast<int16_t>(level[row + j] - quarter), -limit, limit);
      level[row + j] = static_cast<int16_t>((quarter + rest + static_cast<int>((word & 0xFFFF) >> 10)) >> 6);
    }
  }
#pragma omp simd
  for (int i = 0; i < BLOCK; ++i) {
    done.exp_avg[i] = static_cast<int8_t>(level[i]);
    done.exp_avg_sq[i] = static_cast<uint8_t>(code[i]);
  }
  if (!done.finite) clear_codes(done);
}

template <Decay DECAY>
inline void update_eight_bit(float* theta, const float* grad, Updated& now, const Updated* done, const Numbers& s) {
  if (done) encode(*done);
  alignas(64) float first_kept[LANES], second_kept[LANES];
  alignas(64) int16_t level[BLOCK], code[BLOCK];  // of 16 bits between those of 8 and 32: vectors widen in steps
  alignas(64) uint32_t largest_first[LANES] = {}, largest_root[LANES] = {};
#pragma omp simd
  for (int i = 0; i < BLOCK; ++i) {
    const int16_t c = now.exp_avg[i];
    const int16_t outer = static_cast<int16_t>(c - std::clamp<int16_t>(c, -KNEE, KNEE));
    level[i] = static_cast<int16_t>(c + 3 * outer);
    code[i] = now.exp_avg_sq[i];
  }
  for (int j = 0; j < LANES; ++j) {
    first_kept[j] = from_bits(static_cast<uint32_t>(now.exp_avg_scales[j]) << 16) * s.first_kept;
    second_kept[j] = from_bits(static_cast<uint32_t>(now.exp_avg_sq_scales[j]) << 16) * s.second_kept;
  }
  for (int row = 0; row < BLOCK; row += LANES) {
#pragma omp simd
    for (int j = 0; j < LANES; ++j) {
      const int i = row + j;
      const float g = decayed_gradient<DECAY>(grad[i], theta[i], s);
      const float m = first_kept[j] * static_cast<float>(level[i]) + s.first_new * g;
      const float kept = second_kept[j] * static_cast<float>(code[i]), added = s.second_new * g;
      const float r = std::sqrt(kept * kept + added * added);
      theta[i] = decayed<DECAY>(theta[i], s) - s.step_size * (m / (r + s.eps));
      now.first[i] = m;
      now.root[i] = r;
      largest_first[j] = std::max(largest_first[j], to_bits(m) & 0x7FFFFFFF);
      largest_root[j] = std::max(largest_root[j], to_bits(r) & 0x7FFFFFFF);
    }
  }
  now.finite = true;
  for (int j = 0; j < LANES; ++j) {
    const uint32_t first_scale = scale_bits(largest_first[j]), second_scale = scale_bits(largest_root[j]);
    now.to_first[j] = LEVELS * FIRST_ONE / from_bits(first_scale << 16);
    now.to_second[j] = CODES * SECOND_ONE / from_bits(second_scale << 16);
    now.finite &= first_scale <= LARGEST_FIRST && second_scale <= LARGEST_SECOND;
    now.exp_avg_scales[j] = static_cast<uint16_t>(first_scale > LARGEST_FIRST ? NO_SCALE : first_scale);
    now.exp_avg_sq_scales[j] = static_cast<uint16_t>(second_scale > LARGEST_SECOND ? NO_SCALE : second_scale);
  }
}

#endif

}  // namespace
