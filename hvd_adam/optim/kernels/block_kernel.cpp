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

struct Numbers {
  float grad_scale, weight_decay, kept_second;
  EightBit update;
};

Numbers numbers(const Group& group, const Scalars& s) {
  const bool coupled = decay_of(group) == COUPLED;  // then the gradient is scaled before the decay is added
  const double scale = coupled ? 1 : s.scale, beta2 = group.beta2;
  Numbers n;
  n.grad_scale = s.scale;
  n.weight_decay = s.weight_decay;
  n.kept_second = static_cast<float>(beta2);
  const bool codes = STATE == EIGHT_BIT;
  n.update.first_kept = static_cast<float>(codes ? group.beta1 / LEVELS : group.beta1);
  n.update.second_kept = static_cast<float>(codes ? std::sqrt(beta2) / CODES : beta2);
  n.update.first_new = static_cast<float>((1 - group.beta1) * scale);
  n.update.second_new = static_cast<float>(std::sqrt(1 - beta2) * scale);
  n.update.step_size = s.step_size;
  n.update.eps = s.eps;
  return n;
}

// Moments that are held as float32, or as bfloat16 that is rounded stochastically.
void update_moments(float* theta, const float* grad, Moment* exp_avg, Moment* exp_avg_sq, const EightBit& s,
                    const uint32_t* words) {
  for (int row = 0; row < BLOCK; row += LANES) {
#pragma omp simd
    for (int j = 0; j < LANES; ++j) {
      const int i = row + j;
      const uint32_t word = words[j] + static_cast<uint32_t>(row / LANES) * GOLDEN;
      const float m = s.first_kept * load(exp_avg[i]) + s.first_new * grad[i];
      const float added = s.second_new * grad[i];
      const float v = s.second_kept * load(exp_avg_sq[i]) + added * added;
      theta[i] = theta[i] - s.step_size * (m / (std::sqrt(v) + s.eps));
      store(exp_avg[i], STATE == BFLOAT16 ? rounded_by(m, word & 0xFFFF) : m);
      store(exp_avg_sq[i], STATE == BFLOAT16 ? rounded_by(v, word >> 16) : v);
    }
  }
}

template <Decay DECAY>
void update_block(const Block& block, const Numbers& n, uint32_t seed) {
  alignas(64) float wide[BLOCK], gradients[BLOCK];
  alignas(64) uint32_t words[LANES];
  first_words(seed, words);
  constexpr bool in_place = std::is_same_v<Param, float> && DECAY == NONE;
  float* theta = wide;
  const float* grad = gradients;
  if constexpr (in_place) {
    theta = block.param;
    grad = block.grad;
  } else {
#pragma omp simd
    for (int i = 0; i < BLOCK; ++i) {
      float x = load(block.param[i]), g = load(block.grad[i]);
      if constexpr (ROUNDING == MASTER) x = current_master(x, block.master_param[i]);
      if constexpr (ROUNDING == CORRECTION) x = corrected(x, block.correction[i]);
      if constexpr (DECAY == COUPLED) g = g * n.grad_scale + n.weight_decay * x;
      if constexpr (DECAY == DECOUPLED) x = x + n.weight_decay * x;
      wide[i] = x;
      gradients[i] = g;
    }
  }
  if constexpr (STATE == EIGHT_BIT) {
    update_eight_bit(theta, grad, block.first_codes, block.second_codes, block.first_scales, block.second_scales,
                     n.update, words);
  } else {
    update_moments(theta, grad, block.exp_avg, block.exp_avg_sq, n.update, words);
  }
  if constexpr (!in_place) {
    for (int row = 0; row < BLOCK; row += LANES) {
#pragma omp simd
      for (int j = 0; j < LANES; ++j) {
        const int i = row + j;
        float x = wide[i];
        if constexpr (ROUNDING == MASTER) block.master_param[i] = x;
        if constexpr (ROUNDING == STOCHASTIC) x = round_stochastically(x, seed + static_cast<uint32_t>(i));
        if constexpr (ROUNDING == CORRECTION) {
          const uint32_t word = words[j] + static_cast<uint32_t>(row / LANES) * GOLDEN;
          x = split(x, (word >> 2) & 0xFF, block.correction[i]);
        }
        store(block.param[i], x);
      }
    }
  }
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
  update_block<DECAY>(whole, n, seed);
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
  for (int64_t i = begin; i < end; i += BLOCK) {
    const uint32_t own = seed + static_cast<uint32_t>(i);
    if (end - i >= BLOCK) {
      update_block<DECAY>(block_at(row, i), n, own);
    } else {
      update_last<DECAY>(block_at(row, i), end - i, n, own);
    }
  }
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
