// The Adam update of expression.py for CPUs, in one pass over a list of tensors. Compiled by cpu_kernel.py with
//   PARAM     the type of parameters and gradients
//   MOMENT    the type of the moments
//   ROUNDING  NEAREST, MASTER or STOCHASTIC, as KernelSpec.rounding
// Every operation is rounded by itself (-ffp-contract=off), so the result of an element does not depend on where
// it lies, on how many threads work, or on the vector registers of the processor.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace {

enum Rounding { NEAREST, MASTER, STOCHASTIC };

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

// One tensor, or the part of it that this rank updates. Pointers are numbers, so that NumPy can fill them in.
struct Row {
  int64_t param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master_param;
  int64_t step;      // address of the float32 that counts this parameter's updates
  int64_t elements;
  int64_t position;  // index of the first element among all of the optimizer's, for stochastic rounding
  int64_t group;     // index into the hyper-parameters
};

// Hyper-parameters of a group; see cpu_kernel.py.
struct Group {
  double lr, beta1, beta2, eps, weight_decay, decoupled, sign;
};

// The numbers of one update, as expression.Scalars.
struct Scalars {
  Compute scale, weight_decay, one_minus_beta1, beta2, one_minus_beta2, step_size, eps;
  uint32_t seed;
};

Scalars scalars(const Group& group, double step, int64_t position, double grad_scale) {
  const double root = std::sqrt(1 - std::pow(group.beta2, step));
  Scalars s;
  s.scale = static_cast<Compute>(group.sign * grad_scale);
  s.weight_decay = static_cast<Compute>(group.decoupled ? -group.weight_decay * group.lr : group.weight_decay);
  s.one_minus_beta1 = static_cast<Compute>(1 - group.beta1);
  s.beta2 = static_cast<Compute>(group.beta2);
  s.one_minus_beta2 = static_cast<Compute>(1 - group.beta2);
  s.step_size = static_cast<Compute>(group.lr * root / (1 - std::pow(group.beta1, step)));
  s.eps = static_cast<Compute>(group.eps * root);
  s.seed = static_cast<uint32_t>((static_cast<uint64_t>(step) * 0x9E3779B1u + position) & 0x7FFFFFFF);
  return s;
}

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

// As expression.round_stochastically, to the bit.
inline float round_stochastically(float x, uint32_t seed) {
  uint32_t h = seed & 0x7FFFFFFF;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  const uint32_t noise = (h ^ (h >> 16)) & 0xFFFF;
  const float rounded = from_bits((to_bits(x) + noise) & 0xFFFF0000u);
  return std::fabs(x) < std::numeric_limits<float>::infinity() ? rounded : x;
}

enum Decay { NONE, COUPLED, DECOUPLED };

// Updates elements [begin, end) of a row.
template <bool AMSGRAD, Decay DECAY>
void update(const Row& row, int64_t begin, int64_t end, const Scalars s) {
  Param* __restrict__ param = reinterpret_cast<Param*>(row.param);
  const Param* __restrict__ grad = reinterpret_cast<const Param*>(row.grad);
  Moment* __restrict__ exp_avg = reinterpret_cast<Moment*>(row.exp_avg);
  Moment* __restrict__ exp_avg_sq = reinterpret_cast<Moment*>(row.exp_avg_sq);
  Moment* __restrict__ max_exp_avg_sq = reinterpret_cast<Moment*>(row.max_exp_avg_sq);
  float* __restrict__ master_param = reinterpret_cast<float*>(row.master_param);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    Compute theta = load(param[i]);
    if constexpr (ROUNDING == MASTER) theta = current_master(theta, master_param[i]);
    Compute g = load(grad[i]) * s.scale;
    Compute m = load(exp_avg[i]);
    Compute v = load(exp_avg_sq[i]);
    if constexpr (DECAY == COUPLED) g = g + s.weight_decay * theta;
    if constexpr (DECAY == DECOUPLED) theta = theta + s.weight_decay * theta;
    m = m + s.one_minus_beta1 * (g - m);
    v = s.beta2 * v + s.one_minus_beta2 * (g * g);
    store(exp_avg[i], m);
    store(exp_avg_sq[i], v);
    if constexpr (AMSGRAD) {
      const Compute largest = load(max_exp_avg_sq[i]);
      v = largest >= v || largest != largest ? largest : v;  // NaN is kept, as in torch.maximum
      store(max_exp_avg_sq[i], v);
    }
    theta = theta - s.step_size * (m / (std::sqrt(v) + s.eps));
    if constexpr (ROUNDING == MASTER) master_param[i] = theta;
    if constexpr (ROUNDING == STOCHASTIC) theta = round_stochastically(theta, s.seed + static_cast<uint32_t>(i));
    store(param[i], theta);
  }
}

void update(const Row& row, int64_t begin, int64_t end, const Group& group, const Scalars& s) {
  const Decay decay = s.weight_decay == 0 ? NONE : group.decoupled ? DECOUPLED : COUPLED;
  if (row.max_exp_avg_sq) {
    if (decay == NONE) return update<true, NONE>(row, begin, end, s);
    if (decay == COUPLED) return update<true, COUPLED>(row, begin, end, s);
    return update<true, DECOUPLED>(row, begin, end, s);
  }
  if (decay == NONE) return update<false, NONE>(row, begin, end, s);
  if (decay == COUPLED) return update<false, COUPLED>(row, begin, end, s);
  return update<false, DECOUPLED>(row, begin, end, s);
}

// Fewer elements are not worth a second thread.
constexpr int64_t MIN_ELEMENTS_PER_THREAD = 1 << 15;
// Threads divide a tensor between cache lines.
constexpr int64_t LINE = 64;

}  // namespace

// Counts a step of every row and updates it.
//   rows        `count` rows
//   groups      the hyper-parameters that the rows name
//   grad_scale  multiplies all gradients
//   threads     the most threads to use
extern "C" void hvd_adam_update(const Row* rows, int64_t count, const Group* groups, double grad_scale, int threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    *reinterpret_cast<float*>(rows[i].step) += 1;
    total += rows[i].elements;
  }
  threads = static_cast<int>(std::clamp<int64_t>(total / MIN_ELEMENTS_PER_THREAD, 1, threads));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t first = total * thread / threads / LINE * LINE;
    const int64_t last = thread + 1 == threads ? total : total * (thread + 1) / threads / LINE * LINE;
    int64_t start = 0;  // of the row, counted over all rows
    for (int64_t i = 0; i < count && start < last; start += rows[i++].elements) {
      const int64_t begin = std::max<int64_t>(first - start, 0);
      const int64_t end = std::min(last - start, rows[i].elements);
      if (begin >= end) continue;
      const Group& group = groups[rows[i].group];
      const double step = *reinterpret_cast<const float*>(rows[i].step);
      update(rows[i], begin, end, group, scalars(group, step, rows[i].position, grad_scale));
    }
  }
}
