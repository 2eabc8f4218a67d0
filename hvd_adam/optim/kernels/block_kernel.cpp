// The Adam update of formats/expression.py for CPUs, in one pass over a list of tensors whose state is held in few bits.
// Compiled with STATE, as KernelSpec.state_format: FLOAT32, BFLOAT16 or EIGHT_BIT. Comes after numbers.h, rows.h, block.h
// and eight_bit.h. A block of parameters is made float32 in the first-level cache, updated there and stored.

namespace {

enum State { FLOAT32, BFLOAT16, EIGHT_BIT };

// The addresses of a block.
struct Block {
  Param* param;
  const Param* grad;
  Moment* exp_avg;
  Moment* exp_avg_sq;
  int8_t* first_codes;
  uint8_t* second_codes;
  uint16_t* first_scales;
  uint16_t* second_scales;
  float* master_param;
  int8_t* correction;
};

Numbers numbers(const Group& group, const Scalars& s) {
  const bool coupled = decay_of(group) == COUPLED;  // then the gradient is scaled before the decay is added
  const double scale = coupled ? 1 : s.scale, beta2 = group.beta2;
  const bool codes = STATE == EIGHT_BIT;
  Numbers n;
  n.grad_scale = s.scale;
  n.weight_decay = s.weight_decay;
  n.first_kept = static_cast<float>(codes ? group.beta1 / LEVELS : group.beta1);
  n.second_kept = static_cast<float>(codes ? std::sqrt(beta2) / CODES : beta2);
  n.first_new = static_cast<float>((1 - group.beta1) * scale);
  n.second_new = static_cast<float>(std::sqrt(1 - beta2) * scale);
  n.step_size = s.step_size;
  n.eps = s.eps;
  return n;
}

// Moments that are held as float32, or as bfloat16 that is rounded stochastically.
template <Decay DECAY>
void update_moments(float* __restrict__ theta, const float* __restrict__ grad, Moment* __restrict__ exp_avg,
                    Moment* __restrict__ exp_avg_sq, const Numbers s, const uint32_t* __restrict__ words) {
  const PairWords pair(words);
  for (int row = 0; row < BLOCK; row += PAIR) {
    const uint32_t next = pair_word(row);
    if (row % PART == 0) {
      if constexpr (std::is_same_v<Param, float>) {
        fetch<true>(theta + row);
        fetch<false>(grad + row);
      }
      fetch<true>(exp_avg + row);
      fetch<true>(exp_avg_sq + row);
    }
#pragma omp simd
    for (int j = 0; j < PAIR; ++j) {
      const int i = row + j;
      const float g = decayed_gradient<DECAY>(grad[i], theta[i], s);
      const float m = s.first_kept * load(exp_avg[i]) + s.first_new * g;
      const float added = s.second_new * g;
      const float v = s.second_kept * load(exp_avg_sq[i]) + added * added;
      theta[i] = decayed<DECAY>(theta[i], s) - s.step_size * (m / (std::sqrt(v) + s.eps));
      if constexpr (STATE == BFLOAT16) {
        store_rounded(exp_avg[i], m, (pair.words[j] + next) & 0xFFFF);
        store_rounded(exp_avg_sq[i], v, (pair.words[j] + next) >> 16);
      } else {
        store(exp_avg[i], m);
        store(exp_avg_sq[i], v);
      }
    }
  }
}

// The float32 values of a block of parameters, in the first-level cache.
void load_block(const Block& block, float* __restrict__ theta, float* __restrict__ grad) {
  for (int at = 0; at < BLOCK; at += PART) {
    fetch<true>(block.param + at);
    fetch<false>(block.grad + at);
    if constexpr (ROUNDING == CORRECTION) {
      fetch<true>(block.correction + at);
      alignas(64) int16_t extra[PART];  // between 8 bits and 32: vectors widen in steps
#pragma omp simd
      for (int i = 0; i < PART; ++i) extra[i] = block.correction[at + i];
      const uint16_t* bits = reinterpret_cast<const uint16_t*>(block.param);
#pragma omp simd
      for (int i = 0; i < PART; ++i) theta[at + i] = corrected(bits[at + i], extra[i]);
    } else if constexpr (ROUNDING == MASTER) {
      fetch<true>(block.master_param + at);
#pragma omp simd
      for (int i = at; i < at + PART; ++i) theta[i] = current_master(load(block.param[i]), block.master_param[i]);
    } else {
#pragma omp simd
      for (int i = at; i < at + PART; ++i) theta[i] = load(block.param[i]);
    }
#pragma omp simd
    for (int i = at; i < at + PART; ++i) grad[i] = load(block.grad[i]);
  }
}

void store_block(const Block& block, float* __restrict__ theta, const uint32_t* words, uint32_t seed) {
  if constexpr (ROUNDING == CORRECTION) {
    alignas(64) int16_t extra[BLOCK];
    uint16_t* __restrict__ bits = reinterpret_cast<uint16_t*>(block.param);
    const PairWords pair(words);
    for (int row = 0; row < BLOCK; row += PAIR) {
      const uint32_t next = pair_word(row);
#pragma omp simd
      for (int j = 0; j < PAIR; ++j) {
        bits[row + j] = split(theta[row + j], ((pair.words[j] + next) >> 2) & 0xFF, extra[row + j]);
      }
    }
#pragma omp simd
    for (int i = 0; i < BLOCK; ++i) block.correction[i] = static_cast<int8_t>(extra[i]);
    return;
  } else if constexpr (ROUNDING == MASTER) {
    std::copy_n(theta, BLOCK, block.master_param);
  } else if constexpr (ROUNDING == STOCHASTIC) {
#pragma omp simd
    for (int i = 0; i < BLOCK; ++i) theta[i] = round_stochastically(theta[i], seed + static_cast<uint32_t>(i));
  }
#pragma omp simd
  for (int i = 0; i < BLOCK; ++i) store(block.param[i], theta[i]);
}

// Updates a block; of 8 bits, it is encoded with the next one, or by `encode`.
template <Decay DECAY>
void update_block(const Block& block, const Numbers& n, uint32_t seed, Updated& now, const Updated* done) {
  alignas(64) float wide[BLOCK], gradients[BLOCK];
  first_words(seed, now.words);
  float* theta = wide;
  const float* grad = gradients;
  if constexpr (std::is_same_v<Param, float>) {
    theta = reinterpret_cast<float*>(block.param);  // Clang compiles this for other types, too
    grad = reinterpret_cast<const float*>(block.grad);
  } else {
    load_block(block, wide, gradients);
  }
  if constexpr (STATE == EIGHT_BIT) {
    now.exp_avg = block.first_codes;
    now.exp_avg_sq = block.second_codes;
    now.exp_avg_scales = block.first_scales;
    now.exp_avg_sq_scales = block.second_scales;
    update_eight_bit<DECAY>(theta, grad, now, done, n);
  } else {
    update_moments<DECAY>(theta, grad, block.exp_avg, block.exp_avg_sq, n, now.words);
  }
  if constexpr (!std::is_same_v<Param, float>) store_block(block, wide, now.words, seed);
}

// A part of a row, from one element on, as a block.
Block block_at(const Row& row, int64_t i) {
  const auto at = [](int64_t address, int64_t index, auto* type) {
    return address ? reinterpret_cast<decltype(type)>(address) + index : nullptr;
  };
  const int64_t scale = i / BLOCK * LANES;
  Block b{};
  b.param = at(row.param, i, b.param);
  b.grad = at(row.grad, i, static_cast<Param*>(nullptr));
  if constexpr (STATE == EIGHT_BIT) {
    b.first_codes = at(row.exp_avg, i, b.first_codes);
    b.second_codes = at(row.exp_avg_sq, i, b.second_codes);
    b.first_scales = at(row.exp_avg_scales, scale, b.first_scales);
    b.second_scales = at(row.exp_avg_sq_scales, scale, b.second_scales);
  } else {
    b.exp_avg = at(row.exp_avg, i, b.exp_avg);
    b.exp_avg_sq = at(row.exp_avg_sq, i, b.exp_avg_sq);
  }
  b.master_param = at(row.master_param, i, b.master_param);
  b.correction = at(row.param_correction, i, b.correction);
  return b;
}

// Copies of the last elements of a tensor, followed by zeros, which a whole block is made of.
struct Padded {
  Param param[BLOCK] = {}, grad[BLOCK] = {};
  Moment exp_avg[BLOCK] = {}, exp_avg_sq[BLOCK] = {};
  int8_t first_codes[BLOCK] = {}, correction[BLOCK] = {};
  uint8_t second_codes[BLOCK] = {};
  float master_param[BLOCK] = {};
};

template <Decay DECAY>
void update_last(const Block& block, int64_t count, const Numbers& n, uint32_t seed) {
  Padded padded;
  const auto copy = [count](auto* to, const auto* from) {
    if (to && from) std::copy_n(from, count, to);
  };
  Block whole = block;
  const auto replace = [&](auto*& place, auto* by) {
    if (!place) return;
    copy(by, place);
    place = by;
  };
  copy(padded.grad, block.grad);
  whole.grad = padded.grad;
  replace(whole.param, padded.param);
  replace(whole.exp_avg, padded.exp_avg);
  replace(whole.exp_avg_sq, padded.exp_avg_sq);
  replace(whole.first_codes, padded.first_codes);
  replace(whole.second_codes, padded.second_codes);
  replace(whole.master_param, padded.master_param);
  replace(whole.correction, padded.correction);
  Updated now;
  update_block<DECAY>(whole, n, seed, now, nullptr);
  if constexpr (STATE == EIGHT_BIT) encode(now);
  copy(block.param, whole.param);
  copy(block.exp_avg, whole.exp_avg);
  copy(block.exp_avg_sq, whole.exp_avg_sq);
  copy(block.first_codes, whole.first_codes);
  copy(block.second_codes, whole.second_codes);
  copy(block.master_param, whole.master_param);
  copy(block.correction, whole.correction);
}

template <Decay DECAY>
void update(const Row& row, int64_t begin, int64_t end, const Numbers& n, uint32_t seed) {
  Updated updated[2];
  const Updated* done = nullptr;
  int64_t i = begin;
  for (; end - i >= BLOCK; i += BLOCK) {
    Updated& now = updated[done == updated];
    update_block<DECAY>(block_at(row, i), n, seed + static_cast<uint32_t>(i), now, done);
    done = &now;
  }
  if (STATE == EIGHT_BIT && done) encode(*done);
  if (i < end) update_last<DECAY>(block_at(row, i), end - i, n, seed + static_cast<uint32_t>(i));
}

}  // namespace

// As hvd_adam_update of cpu_kernel.cpp.
extern "C" void hvd_adam_update(const Row* rows, int64_t count, const Group* groups, double grad_scale, int threads) {
  for_parts(rows, count, groups, threads, BLOCK,
            [=](const Row& row, int64_t begin, int64_t end, const Group& group, double step) {
              const Scalars s = scalars(group, step, row.position, grad_scale);
              const Numbers n = numbers(group, s);
              const Decay decay = decay_of(group);
              if (decay == NONE) return update<NONE>(row, begin, end, n, s.seed);
              if (decay == COUPLED) return update<COUPLED>(row, begin, end, n, s.seed);
              return update<DECOUPLED>(row, begin, end, n, s.seed);
            });
}
