// Kernels for fake-quantize, its straight-through gradient, and quantizing weights to int8.
#pragma once

#include "../../math/fake_quantize.h"
#include "../kernels.h"
#include "../vec_scalar.h"
#include "prefetch-inl.h"
#include "sources-inl.h"

namespace fastquant {
namespace {

// Packs bits into 64-bit words, a few at a time. Does nothing if `words` is null.
class BitWriter {
 public:
  explicit BitWriter(uint64_t* words) : words_(words) {}

  // count must be at most 63.
  void push(uint64_t bits, int count) {
    if (words_ == nullptr) return;
    word_ |= bits << fill_;
    fill_ += count;
    if (fill_ < 64) return;
    *words_++ = word_;
    fill_ -= 64;
    word_ = fill_ == 0 ? 0 : bits >> (count - fill_);
  }

  void push_word(uint64_t bits) {
    *words_++ = word_ | bits << fill_;
    word_ = fill_ == 0 ? 0 : bits >> (64 - fill_);
  }

  void flush() {
    if (words_ != nullptr && fill_ > 0) *words_ = word_;
  }

 private:
  uint64_t* words_;
  uint64_t word_ = 0;
  int fill_ = 0;
};

template <class V, class T>
FakeQuantizer<V> quantizer_at(const QuantParams<T>& p, int64_t i) {
  return {V::load(p.scale + i), V::load(p.inverse_scale + i), V::load(p.low + i),
          V::load(p.high + i),  V::load(p.low_edge + i),      V::load(p.high_edge + i)};
}

template <class V, class T>
FakeQuantizer<V> quantizer_of_channel(const QuantParams<T>& p, int64_t c) {
  return {V::set1(p.scale[c]), V::set1(p.inverse_scale[c]), V::set1(p.low[c]),
          V::set1(p.high[c]),  V::set1(p.low_edge[c]),      V::set1(p.high_edge[c])};
}

// Whether the gradient passes through an element of the source: through its clamping, if it does any, and
// through quantizer q, which gets it in steps.
template <class V, class Source>
typename V::Mask passes(const Source& x, typename V::Reg element, const FakeQuantizer<V>& q,
                        typename V::Reg steps) {
  if constexpr (Source::kClamps) {
    return V::both(q.inside(steps), x.template sum<V>().passes(element));
  } else {
    return q.inside(steps);
  }
}

// Fake-quantizes the elements [begin, end), all with quantizer q, as far as whole vectors cover them. Returns
// the index of the first element that is left.
template <bool kMask, class V, class Source>
int64_t fake_quantize_run(const Source& x, typename Source::Stored* y, int64_t begin, int64_t end,
                          const FakeQuantizer<V>& q, BitWriter* writer) {
  constexpr int kPair = 2 * V::N;
  constexpr int kGroup = 64;  // elements whose bits fill one word of the mask
  const auto pair = [&](int64_t i) {
    typename V::Reg a, b;
    x.template load_pair<V>(i, &a, &b);
    const auto s = q.steps(a), t = q.steps(b);
    V::store_pair_normal(y + i, q.value(s), q.value(t));
    return kMask ? V::pair_bits(y, passes(x, a, q, s), passes(x, b, q, t)) : 0;
  };
  int64_t i = begin;
  for (; i + kGroup <= end; i += kGroup) {
    x.template fetch<kGroup>(i);
    fetch_ahead<kGroup>(y + i);
    uint64_t bits = 0;
    for (int k = 0; k < kGroup; k += kPair) bits |= static_cast<uint64_t>(pair(i + k)) << k;
    if (kMask) writer->push_word(bits);
  }
  for (; i + kPair <= end; i += kPair) {
    const uint64_t bits = pair(i);
    if (kMask) writer->push(bits, kPair);
  }
  return i;
}

// Fake-quantizes element i.
template <bool kMask, class T, class Source>
void fake_quantize_one(const Source& x, typename Source::Stored* y, int64_t i,
                       const FakeQuantizer<Scalar<T>>& q, BitWriter* writer) {
  using One = Scalar<T>;
  const T element = x.template load<One>(i), t = q.steps(element);
  One::store(y + i, q.value(t));
  if (kMask) writer->push(passes<One>(x, element, q, t), 1);
}

// Fake-quantizes element i with the parameters at index k.
template <class Source, class T>
void fake_quantize_exact(const Source& x, typename Source::Stored* y, int64_t i, const QuantParams<T>& p,
                         int64_t k, BitWriter* writer) {
  using One = Scalar<T>;
  const ExactQuantizer<One> q = {p.scale[k],  p.inverse_scale[k], p.zero_point[k],
                                 p.quant_min, p.quant_max,        p.float_zero_point};
  const T element = x.template load<One>(i);
  bool inside;
  One::store(y + i, q.value(element, &inside));
  if constexpr (Source::kClamps) inside = inside && x.template sum<One>().passes(element);
  writer->push(inside, 1);
}

template <bool kMask, class V, class Source, class T>
void fake_quantize_rows_masked(const Source& x, typename Source::Stored* y, int64_t begin, int64_t end,
                               const QuantParams<T>& p, BitWriter* writer) {
  int64_t row = begin / p.inner;
  int64_t channel = row % p.channels;
  for (int64_t i = begin; i < end;) {
    const int64_t stop = smaller(end, (row + 1) * p.inner);
    if (!p.exact) {
      i = fake_quantize_run<kMask>(x, y, i, stop, quantizer_of_channel<V>(p, channel), writer);
      const auto one = quantizer_of_channel<Scalar<T>>(p, channel);
      for (; i < stop; ++i) fake_quantize_one<kMask, T>(x, y, i, one, writer);
    }
    for (; i < stop; ++i) fake_quantize_exact(x, y, i, p, channel, writer);
    ++row;
    channel = channel + 1 == p.channels ? 0 : channel + 1;
  }
}

template <bool kMask, class V, class S, class T>
void fake_quantize_periodic_masked(const S* x, S* y, int64_t begin, int64_t end, const QuantParams<T>& p,
                                   BitWriter* writer) {
  constexpr int kGroup = 64;  // elements per prefetch
  int64_t phase = begin % p.period;
  const auto advance = [&](int64_t by) {
    phase += by;
    if (phase >= p.period) phase -= p.period;
  };
  int64_t i = begin;
  if (!p.exact) {
    for (; i + V::N <= end; i += V::N, advance(V::N)) {
      if (i % kGroup == 0) {
        fetch_ahead<kGroup>(x + i);
        fetch_ahead<kGroup>(y + i);
      }
      const auto q = quantizer_at<V>(p, phase);
      const auto t = q.steps(V::load(x + i));
      V::store(y + i, q.value(t));
      if (kMask) writer->push(V::bits(q.inside(t)), V::N);
    }
    for (; i < end; ++i, advance(1)) {
      fake_quantize_one<kMask, T>(Elements<S>{x}, y, i, quantizer_at<Scalar<T>>(p, phase), writer);
    }
  }
  for (; i < end; ++i, advance(1)) {
    fake_quantize_exact(Elements<S>{x}, y, i, p, phase, writer);
  }
}

template <class V, class Source, class T>
void fake_quantize_rows_of(const Source& x, typename Source::Stored* y, uint64_t* mask, int64_t begin,
                           int64_t end, const QuantParams<T>& p) {
  BitWriter writer(mask == nullptr ? nullptr : mask + begin / 64);
  if (mask == nullptr) {
    fake_quantize_rows_masked<false, V>(x, y, begin, end, p, &writer);
  } else {
    fake_quantize_rows_masked<true, V>(x, y, begin, end, p, &writer);
  }
  writer.flush();
}

template <class V, class S, class T>
void fake_quantize_rows(const S* x, S* y, uint64_t* mask, int64_t begin, int64_t end, const QuantParams<T>& p) {
  fake_quantize_rows_of<V>(Elements<S>{x}, y, mask, begin, end, p);
}

template <class V, class S, class T>
void fake_quantize_periodic(const S* x, S* y, uint64_t* mask, int64_t begin, int64_t end,
                            const QuantParams<T>& p) {
  BitWriter writer(mask == nullptr ? nullptr : mask + begin / 64);
  if (mask == nullptr) {
    fake_quantize_periodic_masked<false, V>(x, y, begin, end, p, &writer);
  } else {
    fake_quantize_periodic_masked<true, V>(x, y, begin, end, p, &writer);
  }
  writer.flush();
}

template <class V, class S, class T>
void mask_gradient(const S* grad, const uint64_t* mask, S* out, int64_t begin, int64_t end) {
  // Torch multiplies the gradient by the mask. Selecting would differ for NaN and for the sign of zero.
  const auto zero = V::set1(T{0}), one = V::set1(T{1});
  int64_t i = begin;
  for (; i + 64 <= end; i += 64) {
    fetch_ahead<64>(grad + i);
    fetch_ahead<64>(out + i);
    uint64_t word = mask[i / 64];
    for (int k = 0; k < 64; k += V::N) {
      const auto keep = V::select(V::from_bits(static_cast<uint32_t>(word >> k)), one, zero);
      V::store(out + i + k, V::mul(V::load(grad + i + k), keep));
    }
  }
  for (; i < end; ++i) {
    const T keep = static_cast<T>((mask[i / 64] >> (i % 64)) & 1u);
    Scalar<T>::store(out + i, Scalar<T>::load(grad + i) * keep);
  }
}

// Uses no vector type, because compilers vectorize this loop by themselves.
template <class V>
void quantize(const float* x, int8_t* out, int64_t n, float inverse_scale, float low, float high) {
  for (int64_t i = 0; i < n; ++i) out[i] = quantized_to_int8(x[i], inverse_scale, low, high);
}

}  // namespace
}  // namespace fastquant
