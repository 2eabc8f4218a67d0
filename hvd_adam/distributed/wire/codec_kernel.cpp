// The functions of codec.py for CPUs, to the bit, each in one pass over memory. Compiled by cpu_codec.py with
//   BITS, BLOCK, LEVELS, ROTATED   as the attributes of Codec
//   GROUP, SCALE_BYTES, SMALLEST   as in codec.py
//   WITHHELD                       1 - SENT of codec.py
// Every operation is rounded by itself (-ffp-contract=off). Some blocks are computed in arrays of fixed length, which
// stay in registers and the first cache; compilers turn their loops into vector instructions, unless they are short.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace {

constexpr int CODE_BYTES = BLOCK * BITS / 8;
constexpr int TOGETHER = std::max(1, 256 / BLOCK);  // blocks that are computed together
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// An integer is added to ROUNDER exactly, a fraction is rounded to the nearest integer, ties to even, and the last
// bits of the sum are the two's complement of that integer. For magnitudes below 2²².
constexpr float ROUNDER = 0x1.8p23f;

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

int32_t magnitude_bits(float x) { return static_cast<int32_t>(to_bits(x) & 0x7FFFFFFF); }

// One stage of `rotate`: transforms the lowest bit of the indices, and moves it to the highest place.
void rotate_once(const float* __restrict__ values, float* __restrict__ result) {
#pragma omp simd
  for (int i = 0; i < GROUP / 2; ++i) {
    const float first = values[2 * i], second = values[2 * i + 1];
    result[i] = first + second;
    result[GROUP / 2 + i] = first - second;
  }
}

// The unnormalized Walsh-Hadamard transform of each group. After five stages each bit of the indices is
// transformed, strides 1, 2, 4, 8, 16, and in its place again.
void rotate(float* values, int elements) {
  static_assert(GROUP == 1 << 5);
  for (int start = 0; start < elements; start += GROUP) {
    float* group = values + start;
    float other[GROUP], another[GROUP];
    rotate_once(group, other);
    rotate_once(other, another);
    rotate_once(another, other);
    rotate_once(other, another);
    rotate_once(another, group);
  }
}

// Codes and scales of some blocks. A scale is the upper half of a float32.
struct Payload {
  uint8_t* codes;
  uint8_t* scales;

  Payload(const uint8_t* payloads, int64_t part, int64_t blocks, int64_t first)
      : codes(const_cast<uint8_t*>(payloads) + part * blocks * (CODE_BYTES + SCALE_BYTES)),
        scales(codes + blocks * CODE_BYTES + first * SCALE_BYTES) {
    codes += first * CODE_BYTES;
  }

  float scale(int block) const {
    uint16_t stored;
    std::memcpy(&stored, scales + block * SCALE_BYTES, SCALE_BYTES);
    return from_bits(static_cast<uint32_t>(stored) << 16);
  }
  void set_scale(int block, float scale) const {
    const uint16_t stored = static_cast<uint16_t>(to_bits(scale) >> 16);
    std::memcpy(scales + block * SCALE_BYTES, &stored, SCALE_BYTES);
  }
};

// The next number that is not smaller, of those that are 0 but for their upper half.
float rounded_up(float scale) { return from_bits((to_bits(scale) + 0xFFFF) & 0xFFFF0000); }

// Writes codes and scales of blocks, and makes t what they decode to. See `_quantize` in codec.py.
template <int BLOCKS>
void quantize(float* __restrict__ t, const bool* keep, const Payload& payload) {
  float scales[BLOCKS];
  for (int block = 0; block < BLOCKS; ++block) {
    float* of_block = t + block * BLOCK;
    int32_t largest_bits = 0;  // as bits, NaN is larger than infinity
    for (int i = 0; i < BLOCK; ++i) largest_bits = std::max(largest_bits, magnitude_bits(of_block[i]));
    const float largest = from_bits(static_cast<uint32_t>(largest_bits));

    float scale = 0, inverse = 0;
    if (!(largest * (ROTATED ? GROUP : 1) < INFINITE)) {  // else rotating back might overflow
      scale = std::numeric_limits<float>::quiet_NaN();
      std::fill_n(of_block, BLOCK, 0.0f);
    } else if (!keep[block] && largest >= SMALLEST) {
      scale = rounded_up(largest / (LEVELS + 0.5f));
      inverse = 1 / scale;
    }
    scales[block] = scale;
    payload.set_scale(block, scale);
    for (int i = 0; i < BLOCK; ++i) of_block[i] *= inverse;
  }

  uint8_t bytes[BLOCKS * BLOCK];
  for (int i = 0; i < BLOCKS * BLOCK; ++i) {
    const float sum = std::min(std::max(t[i], -1.0f * LEVELS), 1.0f * LEVELS) + ROUNDER;
    bytes[i] = static_cast<uint8_t>(to_bits(sum));
    t[i] = sum - ROUNDER;
  }
  for (int block = 0; block < BLOCKS; ++block) {
    for (int i = 0; i < BLOCK; ++i) t[block * BLOCK + i] *= scales[block];
  }
  if constexpr (BITS == 8) {
    std::memcpy(payload.codes, bytes, BLOCKS * BLOCK);
  } else {
    uint8_t* __restrict__ codes = payload.codes;
    for (int i = 0; i < BLOCKS * BLOCK / 2; ++i) {
      codes[i] = static_cast<uint8_t>((bytes[2 * i] & 15) | (bytes[2 * i + 1] << 4));
    }
  }
}

// Makes t the codes of blocks.
template <int BLOCKS>
void read_codes(const uint8_t* __restrict__ codes, float* __restrict__ t) {
  if constexpr (BITS == 8) {
    for (int i = 0; i < BLOCKS * BLOCK; ++i) t[i] = static_cast<int8_t>(codes[i]);
  } else {
    for (int i = 0; i < BLOCKS * BLOCK / 2; ++i) {
      const uint32_t byte = codes[i];
      t[2 * i] = static_cast<int32_t>(byte << 28) >> 28;  // arithmetic shifts extend the sign
      t[2 * i + 1] = static_cast<int32_t>(byte << 24) >> 28;
    }
  }
}

// Adds what blocks decode to, still rotated.
template <int BLOCKS>
void add_decoded(const Payload& payload, float* __restrict__ sum) {
  float codes[BLOCKS * BLOCK];
  read_codes<BLOCKS>(payload.codes, codes);
  for (int block = 0; block < BLOCKS; ++block) {
    const float scale = payload.scale(block);
    for (int i = block * BLOCK; i < (block + 1) * BLOCK; ++i) sum[i] += codes[i] * scale;
  }
}

// Fetches memory before it is needed: the blocks before are computed meanwhile, without other accesses. From 16 MB,
// 0.75 to 0.95 of the time.
template <int ELEMENTS, bool WRITES = false>
void fetch(const float* place) {
  constexpr int AHEAD = 2 * ELEMENTS, LINE = 16;
  for (int i = 0; i < ELEMENTS; i += LINE) __builtin_prefetch(place + AHEAD + i, WRITES);
}

// Returns where elements from `start` on are: in `values`, or, if some are behind its end, in `padded`, with zeros.
template <int ELEMENTS>
const float* inside(const float* values, int64_t start, int64_t count, float* padded) {
  if (start + ELEMENTS <= count) return values + start;
  std::fill_n(padded, ELEMENTS, -0.0f);  // which changes no residual that is added to it
  if (start < count) std::copy(values + start, values + count, padded);
  return padded;
}

// Adds gradients times a factor, rotated if codes are.
template <int BLOCKS>
void add_own(const float* gradients, float factor, float* __restrict__ sum) {
  constexpr int ELEMENTS = BLOCKS * BLOCK;
  float t[ELEMENTS];
  fetch<ELEMENTS>(gradients);
  for (int i = 0; i < ELEMENTS; ++i) t[i] = gradients[i] * factor;
  if (ROTATED) rotate(t, ELEMENTS);
  for (int i = 0; i < ELEMENTS; ++i) sum[i] += t[i];
}

// Divides by the unit, which is a power of two as a rule. A product with its inverse, which is exact then, is the same
// number, and much faster.
template <int ELEMENTS>
void divide(const float* __restrict__ values, float unit, float* __restrict__ result) {
  const uint32_t exponent = to_bits(unit) >> 23;
  if ((to_bits(unit) & 0x7FFFFF) == 0 && exponent > 0 && exponent < 254) {
    const float inverse = 1 / unit;
    for (int i = 0; i < ELEMENTS; ++i) result[i] = values[i] * inverse;
  } else {
    for (int i = 0; i < ELEMENTS; ++i) result[i] = values[i] / unit;
  }
}

template <int BLOCKS>
void encode_blocks(const float* gradients, const float* residual, float* new_residual, float factor, float unit,
                   const Payload& payload) {
  constexpr int ELEMENTS = BLOCKS * BLOCK;
  float h[ELEMENTS], t[ELEMENTS];
  bool keep[BLOCKS];
  fetch<ELEMENTS>(gradients);
  fetch<ELEMENTS>(residual);
  fetch<ELEMENTS, true>(new_residual);
  for (int block = 0; block < BLOCKS; ++block) {
    int32_t any = 0;
    for (int i = block * BLOCK; i < (block + 1) * BLOCK; ++i) any |= magnitude_bits(gradients[i]);
    keep[block] = any == 0;
  }
  for (int i = 0; i < ELEMENTS; ++i) {
    const float e = residual[i] * unit;
    h[i] = gradients[i] * factor + e;
    t[i] = h[i] - e * WITHHELD;
  }
  if (ROTATED) rotate(t, ELEMENTS);
  quantize<BLOCKS>(t, keep, payload);
  if (ROTATED) rotate(t, ELEMENTS);
  for (int i = 0; i < ELEMENTS; ++i) {
    const float decoded = ROTATED ? t[i] * (1.0f / GROUP) : t[i];
    h[i] -= decoded;
  }
  divide<ELEMENTS>(h, unit, new_residual);
}

// Calls function(part, first block, number of blocks) until there was each block of each part, in parallel if that is
// worth it. The number is a constant for the compiler: TOGETHER, or 1 at the end of a part.
template <class Function>
void for_each_block(int64_t parts, int64_t blocks, int threads, Function function) {
  constexpr int64_t MIN_ELEMENTS_PER_THREAD = 1 << 15;
  threads = static_cast<int>(std::clamp<int64_t>(parts * blocks * BLOCK / MIN_ELEMENTS_PER_THREAD, 1, threads));
  const int64_t calls = (blocks + TOGETHER - 1) / TOGETHER;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t call = 0; call < parts * calls; ++call) {
    const int64_t part = call / calls, first = call % calls * TOGETHER;
    if (first + TOGETHER <= blocks) {
      function(part, first, std::integral_constant<int, TOGETHER>());
    } else {
      for (int64_t block = first; block < blocks; ++block) function(part, block, std::integral_constant<int, 1>());
    }
  }
}

}  // namespace

// As `encode` in codec.py, with
//   count    elements of gradients
//   parts    of the payload
//   blocks   of one part
//   threads  the most threads to use
extern "C" void hvd_adam_encode(const float* gradients, int64_t count, const float* residual, float* new_residual,
                                uint8_t* payload, int64_t parts, int64_t blocks, float factor, float unit,
                                int threads) {
  for_each_block(parts, blocks, threads, [=](int64_t part, int64_t first, auto number) {
    constexpr int ELEMENTS = number * BLOCK;
    const int64_t start = (part * blocks + first) * BLOCK;
    float padded[ELEMENTS];
    const float* source = inside<ELEMENTS>(gradients, start, count, padded);
    const Payload to(payload, part, blocks, first);
    encode_blocks<number>(source, residual + start, new_residual + start, factor, unit, to);
  });
}

// As `add_and_encode` in codec.py, with
//   blocks   of each payload
//   own      gradients of this rank
//   count    of them
//   rank     of this rank; -1 to add what it has encoded
//   factor   of its gradients
//   threads  the most threads to use
extern "C" void hvd_adam_add_and_encode(const uint8_t* payloads, int64_t ranks, int64_t blocks, const float* own,
                                        int64_t count, int64_t rank, float factor, const float* residual,
                                        float* new_residual, uint8_t* payload, float unit, int threads) {
  for_each_block(1, blocks, threads, [=](int64_t, int64_t first, auto number) {
    constexpr int ELEMENTS = number * BLOCK;
    float sum[ELEMENTS] = {}, t[ELEMENTS], padded[ELEMENTS];
    const float* old = residual + first * BLOCK;
    fetch<ELEMENTS>(old);
    fetch<ELEMENTS, true>(new_residual + first * BLOCK);
    for (int64_t sender = 0; sender < ranks; ++sender) {
      if (sender == rank) {
        add_own<number>(inside<ELEMENTS>(own, first * BLOCK, count, padded), factor, sum);
      } else {
        add_decoded<number>(Payload(payloads, sender, blocks, first), sum);
      }
    }
    for (int i = 0; i < ELEMENTS; ++i) {
      const float e = old[i] * unit;
      sum[i] += e;
      t[i] = sum[i] - e * WITHHELD;
    }
    const bool keep[number] = {};
    quantize<number>(t, keep, Payload(payload, 0, blocks, first));
    for (int i = 0; i < ELEMENTS; ++i) sum[i] -= t[i];
    divide<ELEMENTS>(sum, unit, new_residual + first * BLOCK);
  });
}

// As `decode` in codec.py, with
//   parts    of the payload
//   blocks   of one part
//   count    elements of out
//   threads  the most threads to use
extern "C" void hvd_adam_decode(const uint8_t* payloads, int64_t parts, int64_t blocks, float* out, int64_t count,
                                int threads) {
  for_each_block(parts, blocks, threads, [=](int64_t part, int64_t first, auto number) {
    constexpr int ELEMENTS = number * BLOCK;
    const int64_t start = (part * blocks + first) * BLOCK;
    const Payload from(payloads, part, blocks, first);
    fetch<ELEMENTS, true>(out + start);
    float t[ELEMENTS];
    read_codes<number>(from.codes, t);
    for (int block = 0; block < number; ++block) {
      const float scale = from.scale(block);
      for (int i = block * BLOCK; i < (block + 1) * BLOCK; ++i) t[i] *= scale;
    }
    if (ROTATED) rotate(t, ELEMENTS);
    const int64_t elements = std::min<int64_t>(ELEMENTS, count - start);
    for (int64_t i = 0; i < elements; ++i) out[start + i] = ROTATED ? t[i] * (1.0f / GROUP) : t[i];
  });
}
