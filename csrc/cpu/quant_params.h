// The parameters of fake-quantize in the form that kernels take them.
#pragma once

#include "../math/fake_quantize.h"
#include "arrays.h"

namespace fastquant {
namespace {

inline bool is_floating(const Array& a) { return a.type != Element::i32 && a.type != Element::i64; }

// Of a tensor with one scale and zero point. Owns what its QuantParams points to.
template <class T>
class TensorParams {
 public:
  TensorParams(int64_t numel, const Array& scale, const Array& zero_point, int64_t quant_min, int64_t quant_max)
      : values_(channel_params<T>(read_value<T>(scale), scale.type == Element::f64, read_value<T>(zero_point),
                                  is_floating(zero_point), quant_min, quant_max)),
        params_{&values_.scale,
                &values_.inverse_scale,
                &values_.zero_point,
                &values_.low,
                &values_.high,
                &values_.low_edge,
                &values_.high_edge,
                numel,
                1,
                0,
                quant_min,
                quant_max,
                is_floating(zero_point),
                values_.exact} {}
  TensorParams(const TensorParams&) = delete;
  TensorParams& operator=(const TensorParams&) = delete;

  const QuantParams<T>& get() const { return params_; }

 private:
  const ChannelParams<T> values_;
  const QuantParams<T> params_;
};

}  // namespace
}  // namespace fastquant
