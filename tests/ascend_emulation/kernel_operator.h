// Stands in for the header of the same name that a kernel includes: the few calls that ours make,
// on the host.
#pragma once

#include <tuple>

#include "copy.h"
#include "pipe.h"
#include "vector.h"

// NOLINTBEGIN(bugprone-reserved-identifier): the names are the vendor's.
#define __aicore__
#define __global__
#define __vector__
// NOLINTEND(bugprone-reserved-identifier)
