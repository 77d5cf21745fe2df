// Which instruction sets this machine can run.
#pragma once
#include "types.hpp"

#include <string>
#include <vector>

namespace loki {

// Names of the instruction sets that can run here, the best first; "portable" always.
std::vector<std::string> usable();

// The kernels of that name; throws std::invalid_argument for one that is unknown or cannot run here.
const Kernels& kernels_of(const std::string& name);

// Names of the features that the choice looks at, those that this machine has.
std::vector<std::string> features();

}  // namespace loki
