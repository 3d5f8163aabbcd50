// Selects the kernels: those of the best instruction set that this processor supports, unless set_isa chooses
// another. Some instruction sets differ in the kernels on quantized values only (avx512 and avx512_vnni).
#pragma once

namespace fastquant {

struct Kernels;
struct QuantizedKernels;
struct TileKernels;

// The tables in use.
const Kernels& kernels();
const QuantizedKernels& quantized_kernels();
const TileKernels* tile_kernels();  // null where the instruction set has no tiles

// Name of the instruction set in use.
const char* isa();

// The name of the i-th instruction set that was built and that this processor supports, best first; nullptr
// past the end.
const char* usable_isa(int i);

// The name of the i-th instruction set that was built, best first; nullptr past the end.
const char* built_isa(int i);

// Switches to the instruction set with this name. Returns false, and changes nothing, if there is no usable
// one.
bool set_isa(const char* name);

}  // namespace fastquant
