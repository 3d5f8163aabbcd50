// The arguments of observe_qparams_ and of the fused ops as one struct. Torch calls an op with its arguments
// one by one, in the order of its schema: the functions below are the only ones that list them.
#pragma once

#include <utility>

#include "settings.h"
#include "tensors.h"

namespace fastquant {

struct FusedArguments {
  Tensor x, observer_enabled, fake_quant_enabled;
  Tensor min_val, max_val, scale, zero_point, nonfinite_count, eps;
  ObserveSettings settings;
};

inline FusedArguments fused_arguments(const Tensor& x, const Tensor& observer_enabled,
                                      const Tensor& fake_quant_enabled, Tensor min_val, Tensor max_val,
                                      Tensor scale, Tensor zero_point, Tensor nonfinite_count,
                                      const Tensor& eps, std::optional<int64_t> ch_axis,
                                      std::optional<double> averaging_constant, int64_t quant_min,
                                      int64_t quant_max, int64_t scheme, int64_t symmetric_zero_point,
                                      int64_t nonfinite) {
  const QParamsConfig qparams = {quant_min, quant_max, static_cast<Scheme>(scheme), symmetric_zero_point};
  return {x,
          observer_enabled,
          fake_quant_enabled,
          std::move(min_val),
          std::move(max_val),
          std::move(scale),
          std::move(zero_point),
          std::move(nonfinite_count),
          eps,
          {ch_axis, averaging_constant, qparams, static_cast<NonFinite>(nonfinite)}};
}

// The function to register for a fused op: it collects the arguments into the struct and calls kOp with it.
template <auto kOp>
auto fused_op(const Tensor x, const Tensor observer_enabled, const Tensor fake_quant_enabled, Tensor min_val,
              Tensor max_val, Tensor scale, Tensor zero_point, Tensor nonfinite_count, const Tensor eps,
              std::optional<int64_t> ch_axis, std::optional<double> averaging_constant, int64_t quant_min,
              int64_t quant_max, int64_t scheme, int64_t symmetric_zero_point, int64_t nonfinite) {
  return kOp(fused_arguments(x, observer_enabled, fake_quant_enabled, std::move(min_val), std::move(max_val),
                             std::move(scale), std::move(zero_point), std::move(nonfinite_count), eps, ch_axis,
                             averaging_constant, quant_min, quant_max, scheme, symmetric_zero_point,
                             nonfinite));
}

// The same for observe_qparams_, which has no argument fake_quant_enabled.
template <auto kOp>
auto observe_op(const Tensor x, const Tensor observer_enabled, Tensor min_val, Tensor max_val, Tensor scale,
                Tensor zero_point, Tensor nonfinite_count, const Tensor eps, std::optional<int64_t> ch_axis,
                std::optional<double> averaging_constant, int64_t quant_min, int64_t quant_max, int64_t scheme,
                int64_t symmetric_zero_point, int64_t nonfinite) {
  return fused_op<kOp>(x, observer_enabled, observer_enabled, std::move(min_val), std::move(max_val),
                       std::move(scale), std::move(zero_point), std::move(nonfinite_count), eps, ch_axis,
                       averaging_constant, quant_min, quant_max, scheme, symmetric_zero_point, nonfinite);
}

// The same for add_observe_fake_quantize, which quantizes per tensor and takes a second tensor and two bounds.
template <auto kOp>
auto add_op(const Tensor a, const Tensor b, double low, double high, const Tensor observer_enabled,
            const Tensor fake_quant_enabled, Tensor min_val, Tensor max_val, Tensor scale, Tensor zero_point,
            Tensor nonfinite_count, const Tensor eps, std::optional<double> averaging_constant,
            int64_t quant_min, int64_t quant_max, int64_t scheme, int64_t symmetric_zero_point,
            int64_t nonfinite) {
  return kOp(
      fused_arguments(a, observer_enabled, fake_quant_enabled, std::move(min_val), std::move(max_val),
                      std::move(scale), std::move(zero_point), std::move(nonfinite_count), eps, std::nullopt,
                      averaging_constant, quant_min, quant_max, scheme, symmetric_zero_point, nonfinite),
      b, low, high);
}

// The same for observe_folded_weight_, whose x is a weight. kOp takes what the batch norm has besides.
template <auto kOp>
auto folded_weight_op(const Tensor weight, const Tensor bn_weight, const Tensor bn_std,
                      const Tensor observer_enabled, const Tensor fake_quant_enabled, Tensor min_val,
                      Tensor max_val, Tensor scale, Tensor zero_point, Tensor nonfinite_count, const Tensor eps,
                      std::optional<int64_t> ch_axis, std::optional<double> averaging_constant,
                      int64_t quant_min, int64_t quant_max, int64_t scheme, int64_t symmetric_zero_point,
                      int64_t nonfinite) {
  return kOp(
      fused_arguments(weight, observer_enabled, fake_quant_enabled, std::move(min_val), std::move(max_val),
                      std::move(scale), std::move(zero_point), std::move(nonfinite_count), eps, ch_axis,
                      averaging_constant, quant_min, quant_max, scheme, symmetric_zero_point, nonfinite),
      bn_weight, bn_std);
}

// What observe_batch_norm_ takes besides the arguments of a fused op.
struct BatchNormArguments {
  Tensor weight, bias, running_mean, running_var;
  bool training;
  double momentum, eps, low, high;
};

// The same for observe_batch_norm_, which quantizes per tensor.
template <auto kOp>
auto batch_norm_op(const Tensor x, const Tensor weight, const Tensor bias, Tensor running_mean,
                   Tensor running_var, bool training, double momentum, double bn_eps, double low, double high,
                   const Tensor observer_enabled, const Tensor fake_quant_enabled, Tensor min_val,
                   Tensor max_val, Tensor scale, Tensor zero_point, Tensor nonfinite_count, const Tensor eps,
                   std::optional<double> averaging_constant, int64_t quant_min, int64_t quant_max,
                   int64_t scheme, int64_t symmetric_zero_point, int64_t nonfinite) {
  const BatchNormArguments batch_norm = {
      weight, bias, std::move(running_mean), std::move(running_var), training, momentum, bn_eps, low, high};
  return kOp(
      fused_arguments(x, observer_enabled, fake_quant_enabled, std::move(min_val), std::move(max_val),
                      std::move(scale), std::move(zero_point), std::move(nonfinite_count), eps, std::nullopt,
                      averaging_constant, quant_min, quant_max, scheme, symmetric_zero_point, nonfinite),
      batch_norm);
}

}  // namespace fastquant
