// Which kernel table is in use: the best one that this processor runs, until set_isa names another.
#pragma once

namespace fastquant {

struct Kernels;

// The table in use.
const Kernels& kernels();

// Name of the table in use.
const char* isa();

// The i-th table that was built and that this processor runs, best first; nullptr past the end.
const char* usable_isa(int i);

// The i-th table that was built, best first; nullptr past the end.
const char* built_isa(int i);

// Switches to a usable table. False, with nothing changed, where there is none of that name.
bool set_isa(const char* name);

}  // namespace fastquant
