// Selects the kernel table: the best one that this processor supports, unless set_isa chooses another.
#pragma once

namespace fastquant {

struct Kernels;

// The table in use.
const Kernels& kernels();

// Name of the table in use.
const char* isa();

// The name of the i-th table that was built and that this processor supports, best first; nullptr past the end.
const char* usable_isa(int i);

// The name of the i-th table that was built, best first; nullptr past the end.
const char* built_isa(int i);

// Switches to the table with this name. Returns false, and changes nothing, if there is no usable one.
bool set_isa(const char* name);

}  // namespace fastquant
