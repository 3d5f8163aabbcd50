// Observing the range of a tensor.
#include "extremes.h"
#include "locks.h"
#include "statistics.h"

namespace fastquant {

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
    update_range(current, averaging_constant, min_val, max_val);
    add_nonfinite(nonfinite_count, left_out);
  });
}

}  // namespace fastquant
