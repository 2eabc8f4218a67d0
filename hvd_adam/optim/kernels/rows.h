// The table of tensors that a kernel for CPUs updates, the numbers of an update, and the threads. Comes after numbers.h.

namespace {

// One tensor, or the part of it that this rank updates. Pointers are numbers, so that NumPy can fill them in.
struct Row {
  int64_t param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master_param;
  int64_t exp_avg_scales, exp_avg_sq_scales, param_correction;
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

enum Decay { NONE, COUPLED, DECOUPLED };

inline Decay decay_of(const Group& group) {
  return group.weight_decay == 0 ? NONE : group.decoupled ? DECOUPLED : COUPLED;
}

inline int64_t rounded_up(int64_t n, int64_t multiple, int64_t most) {
  return std::min((n + multiple - 1) / multiple * multiple, most);
}

// Fewer elements are not worth a second thread.
constexpr int64_t MIN_ELEMENTS_PER_THREAD = 1 << 15;

// Counts a step of every row and updates it.
//   rows      `count` rows
//   groups    the hyper-parameters that the rows name
//   threads   the most threads to use
//   multiple  threads divide a tensor at multiples of this number of its elements
//   update    called with a row, the first and the last element of a part, and the row's hyper-parameters and step
template <typename Update>
void for_parts(const Row* rows, int64_t count, const Group* groups, int threads, int64_t multiple,
               Update update) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    *reinterpret_cast<float*>(rows[i].step) += 1;
    total += rows[i].elements;
  }
  threads = static_cast<int>(std::clamp<int64_t>(total / MIN_ELEMENTS_PER_THREAD, 1, threads));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t first = total * thread / threads;
    const int64_t last = total * (thread + 1) / threads;
    int64_t start = 0;  // of the row, counted over all rows
    for (int64_t i = 0; i < count && start < last; start += rows[i++].elements) {
      const int64_t begin = rounded_up(std::max<int64_t>(first - start, 0), multiple, rows[i].elements);
      const int64_t end = rounded_up(last - start, multiple, rows[i].elements);
      if (begin >= end) continue;
      const double step = *reinterpret_cast<const float*>(rows[i].step);
      update(rows[i], begin, end, groups[rows[i].group], step);
    }
  }
}

}  // namespace
