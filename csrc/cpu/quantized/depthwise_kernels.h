// The table of depthwise kernels.
//
// A depthwise convolution is computed row of outputs by row of outputs, for 16 to 64 channels at a time. The
// taps of its kernel are laid out as a grid of `taps` rows and `columns` columns: those of one grid row read
// one line of the input, at columns that lie `dilation` apart. Four lines are interleaved so that the four
// values of a channel stand side by side, as the dot-product instructions want them; what is interleaved once
// serves every output that reads that column of the input.
#pragma once

#include <cstdint>

#include "output.h"

namespace fastquant {

// A line of the input. Column i, for begin <= i < end, is at data + i * step; where the line has no column, the
// padding is read. Points at the first channel.
struct DepthwiseLine {
  const uint8_t* data;
  int64_t step;
  int64_t begin, end;
  // Where the row of outputs after this one reads first, from here on: kernels ask for that memory in advance.
  int64_t ahead;
};

// What all rows of outputs of one convolution have in common.
struct DepthwiseGeometry {
  int64_t rows;         // of the grid of taps
  int64_t columns;      // of the grid of taps
  int64_t stride;       // input columns from one output to the next
  int64_t dilation;     // input columns from one tap to the next
  int64_t outputs;      // in a row
  int64_t output_step;  // elements from one output of a row to the next
  int64_t output_row;   // bytes from one row to the next, to ask for that memory in advance
  // One input value for each channel, the zero point, and 16 more.
  const uint8_t* padding;
  // The weights of the tap in row r and column k: taps[k * rows + r], one int8 for each channel, with zeros up
  // to a multiple of 16 channels.
  const int8_t* const* taps;
  // Elements of the input are taken as unsigned bytes after an exclusive or with input_flip (0x80 for int8).
  // input_zero_point is that of the unsigned bytes.
  uint8_t input_flip;
  int32_t input_zero_point;
  // Without offsets: the kernel computes its own. There are 16 more factors and biases than channels. The
  // stage's data and stride are not used.
  OutputStage stage;
};

// A range of channels that a kernel takes at once. `width` is one of its widths. The last blocks of a tensor
// may overlap the ones before; only where a tensor has fewer than 16 channels, `channels` is less than the
// width.
struct DepthwiseBlock {
  int64_t first;
  int width;
  int channels;
};

struct DepthwiseKernels {
  int max_width;  // widths are 16, 32, .. max_width
  // The size of a prepared block, a multiple of 64.
  int64_t (*prepared_size)(const DepthwiseGeometry&);
  // Lays out the weights and parameters of a block as `run` reads them. `prepared` is aligned to 64 bytes.
  void (*prepare)(const DepthwiseGeometry&, const DepthwiseBlock&, void* prepared);
  // The size of the scratch memory for `run`, a multiple of 64.
  int64_t (*scratch_size)(const DepthwiseGeometry&);
  // Computes `count` rows of outputs: row i from the lines [i * rows, (i + 1) * rows), to outputs[i], which
  // points at the first channel. `scratch` is aligned to 64 bytes.
  void (*run)(const DepthwiseGeometry&, const DepthwiseBlock&, const void* prepared, const DepthwiseLine* lines,
              void* const* outputs, int64_t count, void* scratch);
};

extern const DepthwiseKernels kDepthwiseScalar;
extern const DepthwiseKernels kDepthwiseAvx2;
extern const DepthwiseKernels kDepthwiseAvxVnni;
extern const DepthwiseKernels kDepthwiseAvx512;
extern const DepthwiseKernels kDepthwiseAvx512Vnni;
extern const DepthwiseKernels kDepthwiseNeon;
extern const DepthwiseKernels kDepthwiseNeonDot;

}  // namespace fastquant
