// Observing the range of a tensor.
#include "extremes.h"
#include "locks.h"
#include "statistics.h"

namespace fastquant {
namespace {

// The extremes of the elements that the policy lets take part. *left_out is set to the number of the others.
// Under NonFinite::raise, throws if there are any.
template <class S, class T>
Extremes<T> observed_extremes(const S* x, const Dense& d, NonFinite policy, int64_t* left_out) {
  Extremes<T> result(d.channels);
  *left_out = 0;
  if (!extremes(x, d, &result)) return result;
  if (policy == NonFinite::propagate) {
    propagate_nan(x, d, &result);
    return result;
  }
  Extremes<T> finite(d.channels);
  *left_out = finite_extremes(x, d, &finite);
  if (policy == NonFinite::raise) throw NonfiniteElements(*left_out);
  return finite;
}

// Updates min_val and max_val from a tensor's extremes. B is the type of the buffers' arithmetic.
template <class B, class T>
void update_buffers(const Extremes<T>& current, std::optional<double> averaging_constant, const Array& min_val,
                    const Array& max_val) {
  const B constant = static_cast<B>(averaging_constant.value_or(0.0));
  std::vector<B> lows = read_values<B>(min_val), highs = read_values<B>(max_val);
  for (size_t c = 0; c < lows.size(); ++c) {
    if (current.low[c] > current.high[c]) continue;
    const B low = static_cast<B>(rounded_to(min_val.type, current.low[c]));
    const B high = static_cast<B>(rounded_to(max_val.type, current.high[c]));
    const auto moved = folded<B>({lows[c], highs[c]}, {low, high}, averaging_constant.has_value(), constant);
    lows[c] = moved.low;
    highs[c] = moved.high;
  }
  write_values(min_val, lows);
  write_values(max_val, highs);
}

}  // namespace

void observe_minmax(const Dense& x, const Array& min_val, const Array& max_val, const Array& nonfinite_count,
                    std::optional<double> averaging_constant, NonFinite policy) {
  with_stored_type(x.type, [&](auto stored) {
    using S = decltype(stored);
    if (x.numel() == 0) return;
    check_count(min_val, x.channels);
    check_count(max_val, x.channels);
    int64_t left_out;
    const auto current = observed_extremes<S, Compute<S>>(static_cast<const S*>(x.data), x, policy, &left_out);
    const auto lock = locked(min_val);
    if (min_val.type == Element::f64) {
      update_buffers<double>(current, averaging_constant, min_val, max_val);
    } else {
      update_buffers<float>(current, averaging_constant, min_val, max_val);
    }
    add_nonfinite(nonfinite_count, left_out);
  });
}

}  // namespace fastquant
