// The Adam update of expression.py for CPUs, in one pass over a list of tensors. Comes after numbers.h and rows.h.
// Every operation is rounded by itself (-ffp-contract=off), so the result of an element does not depend on where
// it lies, on how many threads work, or on the vector registers of the processor.

namespace {

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
  const Decay decay = decay_of(group);
  if (row.max_exp_avg_sq) {
    if (decay == NONE) return update<true, NONE>(row, begin, end, s);
    if (decay == COUPLED) return update<true, COUPLED>(row, begin, end, s);
    return update<true, DECOUPLED>(row, begin, end, s);
  }
  if (decay == NONE) return update<false, NONE>(row, begin, end, s);
  if (decay == COUPLED) return update<false, COUPLED>(row, begin, end, s);
  return update<false, DECOUPLED>(row, begin, end, s);
}

// Threads divide a tensor between cache lines.
constexpr int64_t LINE = 64;

}  // namespace

// Counts a step of every row and updates it.
//   rows        `count` rows
//   groups      the hyper-parameters that the rows name
//   grad_scale  multiplies all gradients
//   threads     the most threads to use
extern "C" void hvd_adam_update(const Row* rows, int64_t count, const Group* groups, double grad_scale, int threads) {
  for_parts(rows, count, groups, threads, LINE,
            [=](const Row& row, int64_t begin, int64_t end, const Group& group, double step) {
              update(row, begin, end, group, scalars(group, step, row.position, grad_scale));
            });
}
