// Registers the CPU implementations of the ops of embeddings.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../../tensors.h"
#include "../huge_pages.h"
#include "embedding.h"

namespace fastquant {
namespace {

EmbeddingTable table_of(const Tensor& packed, int64_t dim, int64_t bits) {
  const int64_t row_bytes = embedding_row_bytes(dim, bits);
  check(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
        "packed must be a contiguous uint8 tensor on the CPU");
  check(packed.dim() == 2 && packed.size(1) == row_bytes, "packed must have rows of ", row_bytes, " bytes");
  return {static_cast<const uint8_t*>(packed.const_data_ptr()), packed.size(0), dim, bits};
}

Integers1d integers(const Tensor& t) { return {t.const_data_ptr(), element(t.scalar_type()), t.numel()}; }

// Of a tensor that has elements or not, but a tensor all the same.
Integers1d integers_or_none(const std::optional<Tensor>& t, const char* name) {
  if (!t.has_value()) return {nullptr, Element::i64, 0};
  static const int64_t none = 0;
  check(t->is_cpu() && t->dim() == 1 && t->is_contiguous(), name, " must be contiguous, with 1 dimension");
  Integers1d found = integers(*t);
  if (found.data == nullptr) found.data = &none;
  return found;
}

Tensor new_floats(std::vector<int64_t> sizes, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d-- > 0;) strides[d] = strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
  Tensor y =
      empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), ScalarType::Float, like);
  prefer_huge_pages(y.mutable_data_ptr(), y.numel() * static_cast<int64_t>(sizeof(float)));
  return y;
}

Tensor embedding_op(const Tensor packed, int64_t dim, int64_t bits, const Tensor indices) {
  const EmbeddingTable table = table_of(packed, dim, bits);
  const Tensor i = torch::stable::contiguous(indices);
  check(i.is_cpu(), "indices must be on the CPU");
  std::vector<int64_t> sizes(i.sizes().begin(), i.sizes().end());
  sizes.push_back(dim);
  Tensor y = new_floats(sizes, packed);
  embedding(table, integers(i), static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

Tensor embedding_bag_op(const Tensor packed, int64_t dim, int64_t bits, const Tensor indices,
                        const std::optional<Tensor> offsets, const std::optional<Tensor> per_sample_weights,
                        const std::optional<Tensor> mapping, int64_t mode, bool include_last_offset,
                        std::optional<int64_t> padding_idx) {
  const EmbeddingTable table = table_of(packed, dim, bits);
  const Tensor i = torch::stable::contiguous(indices);
  check(i.is_cpu() && i.dim() == (offsets.has_value() ? 1 : 2),
        "indices must have 1 dimension, or 2 without offsets, and be on the CPU");
  check(0 <= mode && mode <= 2, "mode must be 0, 1 or 2, got ", mode);
  Bags bags = {integers_or_none(offsets, "offsets"),
               0,
               0,
               include_last_offset,
               nullptr,
               integers_or_none(mapping, "mapping"),
               static_cast<BagMode>(mode),
               padding_idx};
  if (offsets.has_value()) {
    bags.count = bags.offsets.count - include_last_offset;
    check(bags.count >= 0, "offsets must have an element, the last offset");
  } else {
    bags.count = i.size(0);
    bags.size = i.size(1);
  }
  Tensor weights = packed;
  if (per_sample_weights.has_value()) {
    weights = torch::stable::contiguous(*per_sample_weights);
    check(weights.is_cpu() && weights.scalar_type() == ScalarType::Float && weights.numel() == i.numel(),
          "per_sample_weights must be float32 on the CPU, one for each of ", i.numel(), " indices");
    check(bags.mode == BagMode::sum, "per_sample_weights need the mode sum");
    bags.weights = static_cast<const float*>(weights.const_data_ptr());
  }
  Tensor y = new_floats({bags.count, dim}, packed);
  embedding_bag(table, integers(i), bags, static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastquant, CPU, m) {
  m.impl("quantized_embedding", TORCH_BOX(&embedding_op));
  m.impl("quantized_embedding_bag", TORCH_BOX(&embedding_bag_op));
}

}  // namespace fastquant
