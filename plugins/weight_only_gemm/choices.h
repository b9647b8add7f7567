// Measured choices: what was the fastest on a device, from a text file beside the library.
#pragma once

#include "config.h"

namespace wog {

struct Choice {
    int32_t row;  // an index of kRows; -1: nothing was measured
    int32_t splits;
};

// The file is <the shared library that this is in, without .so>.choices; the first call reads it, from where
// the library was loaded. A line of it:
//     sm multiprocessors bits group activation_bits n k max_m row splits
// On such a device, for such weights, up to `max_m` rows of x take that row of the table, by name, with K in so many
// parts. Where several lines are of the same weights, the smallest max_m that is enough decides, and of equal ones the
// first. `#` starts a comment. A line that is not so is said on stderr and ignored.
Choice measured_choice(wog_problem const& p);

}  // namespace wog
