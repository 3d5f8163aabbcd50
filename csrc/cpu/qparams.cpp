// Computes quantization parameters from the statistics of observers.
#include "statistics.h"

namespace fastquant {
namespace {

template <class B>
void choose_into(const Array& min_val, const Array& max_val, const Array& eps, const QParamsConfig& config,
                 const Array& scale, const Array& zero_point) {
  const B smallest = read_value<B>(eps);
  const auto lows = read_values<B, FewOrMany<B>>(min_val), highs = read_values<B, FewOrMany<B>>(max_val);
  FewOrMany<B> scales(lows.size());
  FewOrMany<double> zero_points(lows.size());
  for (int64_t i = 0; i < lows.size(); ++i) {
    const auto q = qparams_of<B>({lows[i], highs[i]}, smallest, config);
    scales[i] = q.scale;
    zero_points[i] = q.zero_point;
  }
  write_values(scale, scales);
  write_values(zero_point, zero_points);
}

}  // namespace

void choose_qparams(const Array& min_val, const Array& max_val, const Array& eps, const QParamsConfig& config,
                    const Array& scale, const Array& zero_point) {
  for (const Array* a : {&max_val, &scale, &zero_point}) check_count(*a, min_val.numel);
  if (min_val.type == Element::f64) {
    choose_into<double>(min_val, max_val, eps, config, scale, zero_point);
  } else {
    choose_into<float>(min_val, max_val, eps, config, scale, zero_point);
  }
}

void observe_qparams(const Dense& x, const FusedBuffers& buffers, const ObserveSettings& settings) {
  const auto& [min_val, max_val, scale, zero_point, nonfinite_count, eps] = buffers;
  for (const Array* a : {&max_val, &scale, &zero_point}) check_count(*a, min_val.numel);
  observe_minmax(x, min_val, max_val, nonfinite_count, settings.averaging_constant, settings.nonfinite);
  choose_qparams(min_val, max_val, eps, settings.qparams, scale, zero_point);
}

}  // namespace fastquant
