// Defines the kernel table of one instruction set from the templates in kernels/. There, V is a vector type
// (../math/vector.h), S the type of the elements in memory, and T the type of the arithmetic.
//
// Included only by the kernels_<isa>.cpp files, each of which is compiled for its instruction set. Everything
// is in an anonymous namespace, and std:: is not used: the linker keeps one copy of an inline function, and if
// it kept the one from such a file, other code would run instructions that the processor may not have.
#pragma once

#include "../math/vector.h"
#include "kernels.h"
#include "kernels/batch_norm_columns-inl.h"
#include "kernels/batch_norm_rows-inl.h"
#include "kernels/clamped_sum-inl.h"
#include "kernels/depthwise-inl.h"
#include "kernels/errors-inl.h"
#include "kernels/fake_quantize-inl.h"
#include "kernels/folded_weight-inl.h"
#include "kernels/half_linear-inl.h"
#include "kernels/histogram-inl.h"
#include "kernels/learnable-inl.h"
#include "kernels/minmax-inl.h"
#include "kernels/pointwise-inl.h"
#include "kernels/quantization_error-inl.h"
#include "kernels/winograd-inl.h"

namespace fastquant {
namespace {

template <class V, class S>
constexpr KernelsFor<S, typename V::Element> kernels_for() {
  using T = typename V::Element;
  KernelsFor<S, T> kernels = {
      minmax<V, S, T>,
      minmax_finite<V, S, T>,
      minmax_columns<V, S, T>,
      histogram<V, S, T>,
      parts_before<T>,
      fake_quantize_rows<V, S, T>,
      fake_quantize_periodic<V, S, T>,
      minmax_of_sum<V, S, T>,
      minmax_finite_of_clamped_sum<V, S, T>,
      fake_quantize_clamped_sum<V, S, T>,
      clamped_sum<V, S, T>,
      mask_gradient<V, S, T>,
      learnable_backward<V, S, T>,
      {fold_weight<V, S, S, T>, fold_weight_backward<V, S, S, T>},
      moments_of_rows<V, S, T>,
      normalize_rows<V, S, T>,
      gradient_sums_of_rows<V, S, T>,
      gradient_of_rows<V, S, T>,
      moments_of_columns<V, S, T>,
      normalize_columns<V, S, T>,
      gradient_sums_of_columns<V, S, T>,
      gradient_of_columns<V, S, T>,
  };
  if constexpr (sizeof(S) == 2 && V::N > 1) {
    kernels.minmax = minmax_words<V, S>;
    kernels.minmax_columns = minmax_columns_of_words<V, S>;
  }
  return kernels;
}

template <template <class> class V>
constexpr Kernels kernel_table(const char* isa) {
  static_assert(has_vector_interface<V<float>>() && has_vector_interface<V<double>>(), "see math/vector.h");
  return {
      isa,
      kernels_for<V<float>, float>(),
      kernels_for<V<double>, double>(),
      kernels_for<V<float>, Half>(),
      kernels_for<V<float>, BFloat16>(),
      {fold_weight<V<float>, float, Half, float>, fold_weight_backward<V<float>, float, Half, float>},
      {fold_weight<V<float>, float, BFloat16, float>, fold_weight_backward<V<float>, float, BFloat16, float>},
      quantization_error<V<float>, V<double>>,
      error_sums<V<double>>,
      mark_integers<V<float>>,
      quantize<V<float>>,
      half_linear<V<float>>,
      depthwise_kernels<V<float>, float>(),
      depthwise_kernels<V<float>, BFloat16>(),
      pointwise_kernels<V<float>, float>(),
      pointwise_kernels<V<float>, BFloat16>(),
      winograd_kernels<V<float>>(),
      sum_units,
  };
}

}  // namespace
}  // namespace fastquant
