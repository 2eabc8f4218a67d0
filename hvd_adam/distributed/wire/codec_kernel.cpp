// The functions of codec.py for CPUs, to the bit, each in one pass over memory. Compiled by cpu_codec.py with
//   BITS, BLOCK, LEVELS, ROTATED   as the attributes of Codec
//   GROUP, SMALLEST                as in codec.py
// Every operation is rounded by itself (-ffp-contract=off). A block is computed in arrays of fixed length, which
// stay in registers and the first cache; compilers turn their loops into vector instructions.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int CODE_BYTES = BLOCK * BITS / 8;
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
void rotate(float* values) {
  static_assert(GROUP == 1 << 5);
  for (int start = 0; start < BLOCK; start += GROUP) {
    float* group = values + start;
    float other[GROUP], another[GROUP];
    rotate_once(group, other);
    rotate_once(other, another);
    rotate_once(another, other);
    rotate_once(other, another);
    rotate_once(another, group);
  }
}

// Writes the codes of t, makes t what they decode to, and returns the scale. See `_quantize` in codec.py; codes need
// no clamp: two roundings make at most LEVELS + 1/2 of t * (LEVELS / largest).
float quantize(float* __restrict__ t, bool keep, uint8_t* __restrict__ codes) {
  int32_t largest_bits = 0;  // as bits, NaN is larger than infinity
  for (int i = 0; i < BLOCK; ++i) largest_bits = std::max(largest_bits, magnitude_bits(t[i]));
  const float largest = from_bits(static_cast<uint32_t>(largest_bits));

  float scale = 0, inverse = 0;
  if (!(largest < INFINITE)) {
    scale = std::numeric_limits<float>::quiet_NaN();
    std::fill_n(t, BLOCK, 0.0f);
  } else if (!keep && largest >= SMALLEST) {
    scale = largest / LEVELS;
    inverse = LEVELS / largest;
  }

  uint8_t bytes[BLOCK];
  for (int i = 0; i < BLOCK; ++i) {
    const float sum = t[i] * inverse + ROUNDER;
    bytes[i] = static_cast<uint8_t>(to_bits(sum));
    t[i] = (sum - ROUNDER) * scale;
  }
  if constexpr (BITS == 8) {
    std::memcpy(codes, bytes, BLOCK);
  } else {
    for (int i = 0; i < BLOCK / 2; ++i) {
      codes[i] = static_cast<uint8_t>((bytes[2 * i] & 15) | (bytes[2 * i + 1] << 4));
    }
  }
  return scale;
}

// Decodes a block, still rotated.
void dequantize(const uint8_t* __restrict__ codes, float scale, float* __restrict__ t) {
  if constexpr (BITS == 8) {
    for (int i = 0; i < BLOCK; ++i) t[i] = static_cast<int8_t>(codes[i]) * scale;
  } else {
    for (int i = 0; i < BLOCK / 2; ++i) {
      const uint32_t byte = codes[i];
      t[2 * i] = (static_cast<int32_t>(byte << 28) >> 28) * scale;  // arithmetic shifts extend the sign
      t[2 * i + 1] = (static_cast<int32_t>(byte << 24) >> 28) * scale;
    }
  }
}

// Codes and scales of the blocks of one part.
struct Payload {
  uint8_t* codes;
  uint8_t* scales;

  Payload(const uint8_t* payloads, int64_t part, int64_t blocks)
      : codes(const_cast<uint8_t*>(payloads) + part * blocks * (CODE_BYTES + 4)), scales(codes + blocks * CODE_BYTES) {}

  uint8_t* block(int64_t i) const { return codes + i * CODE_BYTES; }
  float scale(int64_t i) const {
    float scale;
    std::memcpy(&scale, scales + i * 4, 4);
    return scale;
  }
  void set_scale(int64_t i, float scale) const { std::memcpy(scales + i * 4, &scale, 4); }
};

void encode_block(const float* gradients, const float* residual, float* new_residual, float factor, float unit,
                  const Payload& payload, int64_t block) {
  float h[BLOCK], t[BLOCK];
  int32_t any = 0;
  for (int i = 0; i < BLOCK; ++i) {
    any |= magnitude_bits(gradients[i]);
    h[i] = t[i] = gradients[i] * factor + residual[i] * unit;
  }
  if (ROTATED) rotate(t);
  payload.set_scale(block, quantize(t, any == 0, payload.block(block)));
  if (ROTATED) rotate(t);
  for (int i = 0; i < BLOCK; ++i) {
    const float decoded = ROTATED ? t[i] * (1.0f / GROUP) : t[i];
    new_residual[i] = (h[i] - decoded) / unit;
  }
}

// Calls a function for each block, in parallel if that is worth it.
template <class Function>
void for_each_block(int64_t blocks, int threads, Function function) {
  constexpr int64_t MIN_ELEMENTS_PER_THREAD = 1 << 15;
  threads = static_cast<int>(std::clamp<int64_t>(blocks * BLOCK / MIN_ELEMENTS_PER_THREAD, 1, threads));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) function(block);
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
  for_each_block(parts * blocks, threads, [=](int64_t block) {
    const int64_t start = block * BLOCK;
    const Payload to(payload, block / blocks, blocks);
    const float* source = gradients + start;
    float padded[BLOCK];
    if (start + BLOCK > count) {
      std::fill_n(padded, BLOCK, -0.0f);  // which changes no residual that is added to it
      std::copy(source, gradients + std::max(start, count), padded);
      source = padded;
    }
    encode_block(source, residual + start, new_residual + start, factor, unit, to, block % blocks);
  });
}

// As `add_and_encode` in codec.py, with
//   blocks   of each payload
//   threads  the most threads to use
extern "C" void hvd_adam_add_and_encode(const uint8_t* payloads, int64_t ranks, int64_t blocks,
                                        const float* residual, float* new_residual, uint8_t* payload, float unit,
                                        int threads) {
  const Payload to(payload, 0, blocks);
  for_each_block(blocks, threads, [=](int64_t block) {
    float sum[BLOCK] = {}, t[BLOCK];
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const Payload from(payloads, rank, blocks);
      dequantize(from.block(block), from.scale(block), t);
      for (int i = 0; i < BLOCK; ++i) sum[i] += t[i];
    }
    const float* old = residual + block * BLOCK;
    for (int i = 0; i < BLOCK; ++i) sum[i] = t[i] = sum[i] + old[i] * unit;
    to.set_scale(block, quantize(t, false, to.block(block)));
    for (int i = 0; i < BLOCK; ++i) new_residual[block * BLOCK + i] = (sum[i] - t[i]) / unit;
  });
}

// As `decode` in codec.py, with
//   blocks   of each payload
//   count    elements of out
//   threads  the most threads to use
extern "C" void hvd_adam_decode(const uint8_t* payloads, int64_t blocks, float* out, int64_t count, int threads) {
  for_each_block((count + BLOCK - 1) / BLOCK, threads, [=](int64_t block) {
    const Payload from(payloads, block / blocks, blocks);
    const int64_t start = block * BLOCK;
    float t[BLOCK];
    dequantize(from.block(block % blocks), from.scale(block % blocks), t);
    if (ROTATED) rotate(t);
    const int64_t elements = std::min<int64_t>(BLOCK, count - start);
    for (int64_t i = 0; i < elements; ++i) out[start + i] = ROTATED ? t[i] * (1.0f / GROUP) : t[i];
  });
}
