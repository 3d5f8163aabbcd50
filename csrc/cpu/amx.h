// Whether this process may use AMX, the tile registers of Intel's server processors since Sapphire Rapids.
#pragma once

namespace fastquant {

// Asks the operating system for permission at the first call: the tile registers belong to a process only if it
// has asked for them. Children that it forks inherit the permission.
bool amx_is_usable();

}  // namespace fastquant
