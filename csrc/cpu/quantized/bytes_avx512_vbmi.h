// Vectors of bytes of AVX-512 with VBMI, which looks bytes up in two registers.
#pragma once

#include "bytes_avx512.h"

namespace fastquant {
namespace {

struct Avx512VbmiBytes : Avx512Bytes {
  // The lower seven bits of x choose among 128 entries, and the highest bit between both halves of the table.
  static Reg look_up(const Table& table, Reg x) {
    const __m512i low = _mm512_permutex2var_epi8(table.rows[0], x, table.rows[1]);
    const __m512i high = _mm512_permutex2var_epi8(table.rows[2], x, table.rows[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high);
  }
};

}  // namespace
}  // namespace fastquant
