// The instructions of AMX, emulated for the native tests on processors that have none. See amx_emulation.cpp.
#pragma once

namespace fastquant {

// Whether amx_is_usable() is true because of the emulation.
bool amx_is_emulated();

// Products of tiles computed so far.
long emulated_products();

}  // namespace fastquant
